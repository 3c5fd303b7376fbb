"""Supervised fine-tuning: the loop."""

import math
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from rlhf.batch import SFTBatch
from rlhf.config.errors import ConfigError
from rlhf.config.schema import Config
from rlhf.data.collate import collate_sft
from rlhf.data.loader import GlobalLoader, eval_batches
from rlhf.data.packing import pack
from rlhf.engine.build import partitioned_loading
from rlhf.engine.distributed import seed_everything
from rlhf.engine.export import export_model
from rlhf.engine.update import Objective, optimizer_step
from rlhf.models.load import load_causal_lm, set_dropout, vocabulary_limit
from rlhf.planner.architecture import PACKABLE, PACKING_ATTENTION
from rlhf.rollout.forward import next_token_loss
from rlhf.stages.policy import finish_engine
from rlhf.stages.samples import record_samples
from rlhf.stages.session import (
    Session,
    count_steps,
    generator_of,
    global_count,
    open_session,
    option_prefix,
    record_step,
)
from rlhf.stages.sft.config import SFTConfig


def run(config: Config, run_dir: Path) -> None:
    """Train on the demonstrations, evaluate on the held-out ones, and export the model."""
    session = open_session(config, run_dir, base=config.model)
    stage = cast(SFTConfig, config.stage)
    collate = partial(collate_sft, pad_id=session.pad_id)
    loader = GlobalLoader(
        session.data.part("sft", held_out=False),
        batch_size=stage.batch_size,
        collate=collate,
        seed=config.seed,
        rank=session.rank,
        ranks=session.ranks,
        epochs=None,
    )
    total_steps = count_steps(
        batches_per_epoch=loader.batches_per_epoch, epochs=stage.epochs, max_steps=stage.max_steps
    )
    session.recorder.total_steps = total_steps
    (role,) = stage.roles()
    with partitioned_loading(role, memory=config.memory, ranks=session.ranks):
        model = load_causal_lm(
            session.base or "",
            session.tokenizer,
            dtype=session.dtype,
            attention=config.model.attention,
            revision=config.model.revision,
        )
    check_packing(stage, model)
    if stage.dropout is not None:
        set_dropout(model, stage.dropout, key=f"{option_prefix(run_dir, 'sft')}.dropout")
    engine = finish_engine(config, role, model, model, total_steps=total_steps)
    seed_everything(config.seed + session.rank)
    vocab_limit = vocabulary_limit(model, session.tokenizer)
    generator = generator_of(config, engine, session.tokenizer, vocab_limit=vocab_limit)
    session.recorder.line(f"rollout: {generator.description}")

    before = latest = evaluate(session, engine, vocab_limit=vocab_limit, step=0)
    for step, batch in zip(range(1, total_steps + 1), loader, strict=False):
        train_step(session, engine, batch, vocab_limit=vocab_limit, step=step, sources=loader.source_counts)
        if step % stage.eval_every == 0 or step == total_steps:
            latest = evaluate(session, engine, vocab_limit=vocab_limit, step=step)

    with session.recorder.phase("export"):
        export_model(engine, model, session.tokenizer, run_dir / "model")
    with session.recorder.phase("samples"):
        record_samples(session, generator, step=total_steps)
    session.finish(before=before, after=latest)


def check_packing(stage: SFTConfig, model: Any) -> None:
    """Raise ConfigError if a model, of a family that only its files told, cannot keep packed examples apart."""
    attention, family = model.config._attn_implementation, model.config.model_type
    if stage.packing and (family not in PACKABLE or attention not in PACKING_ATTENTION):
        raise ConfigError(f"stage.packing=true: not with {family} and attention {attention}; leave packing off")


def train_step(
    session: Session, engine: Any, batch: SFTBatch, *, vocab_limit: int, step: int, sources: dict[str, int]
) -> None:
    """One optimizer step and its metrics."""
    engine.train()
    stage = cast(SFTConfig, session.config.stage)
    parts: list[Any] = batch.split(stage.micro_batch_size_per_gpu)
    if stage.packing:
        parts = [pack(part, pad_id=session.pad_id) for part in parts]
    tokens, targets = int(batch.attention_mask.sum()), batch.loss_mask[:, 1:].sum()
    with session.recorder.phase("training"):
        result = optimizer_step(
            engine,
            Objective(
                micro_batches=[part.to(session.device) for part in parts],
                loss_sum=lambda part: next_token_loss(engine, part, vocab_limit=vocab_limit),
                num_targets=global_count(session, [batch.loss_mask[:, 1:]]),
            ),
        )
    places = sum(part.sequence_ids.numel() for part in parts)
    session.accumulator.add("train/loss", result.loss_sum, targets)
    session.accumulator.add("train/tokens", tokens * session.ranks, 1)
    session.accumulator.add("train/padding_share", places - tokens, places)
    record_step(session, result, step=step, sources=sources, shown=("loss",))


@torch.no_grad()
def evaluate(session: Session, engine: Any, *, vocab_limit: int, step: int) -> dict[str, float]:
    """Loss per target token and perplexity on held-out demonstrations."""
    stage = cast(SFTConfig, session.config.stage)
    engine.eval()
    rows = session.data.part("sft", held_out=True)
    batches = eval_batches(
        rows.select(range(min(stage.eval_examples, len(rows)))),
        batch_size=stage.micro_batch_size_per_gpu * 4,
        collate=partial(collate_sft, pad_id=session.pad_id),
        rank=session.rank,
        ranks=session.ranks,
    )
    with session.recorder.phase("evaluation"):
        for batch, valid in batches:
            batch = batch.to(session.device)
            batch.loss_mask[valid:] = False
            loss = next_token_loss(engine, batch, vocab_limit=vocab_limit)
            session.accumulator.add("eval/loss", loss, batch.loss_mask[:, 1:].sum())
        values = session.reduced_metrics()
    values["eval/perplexity"] = math.exp(min(values["eval/loss"], 50.0))
    session.recorder.metrics(step, values)
    session.recorder.line(
        f"step {step}: held-out loss {values['eval/loss']:.3f}, perplexity {values['eval/perplexity']:.1f}"
    )
    return values
