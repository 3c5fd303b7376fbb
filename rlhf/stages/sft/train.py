"""Supervised fine-tuning: the loop."""

import math
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from rlhf.batch import PackedBatch, SFTBatch
from rlhf.config.errors import ConfigError
from rlhf.config.schema import Config
from rlhf.data.collate import collate_prompts, collate_sft
from rlhf.data.loader import GlobalLoader, eval_batches
from rlhf.data.packing import pack
from rlhf.engine.build import build_engine, partitioned_loading
from rlhf.engine.distributed import seed_everything
from rlhf.engine.export import export_model
from rlhf.engine.update import optimizer_step
from rlhf.functional.logprobs import token_logprobs
from rlhf.functional.losses import sft_loss
from rlhf.functional.masking import block_causal_bias, position_ids
from rlhf.models.load import load_causal_lm, vocabulary_limit
from rlhf.planner.architecture import PACKABLE, PACKING_ATTENTION
from rlhf.rollout.generate import generate
from rlhf.rollout.score import ended_with_eos, response_texts
from rlhf.stages.session import (
    Session,
    adapt,
    count_steps,
    enable_checkpointing,
    global_count,
    open_session,
    sampling_of,
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
    adapt(model, config, role)
    enable_checkpointing(model, role, memory=config.memory)
    engine = build_engine(model, role, memory=config.memory, ranks=session.ranks, total_steps=total_steps)
    seed_everything(config.seed + session.rank)
    vocab_limit = vocabulary_limit(model, session.tokenizer)

    before = latest = evaluate(session, engine, vocab_limit=vocab_limit, step=0)
    for step, batch in zip(range(1, total_steps + 1), loader, strict=False):
        train_step(session, engine, batch, vocab_limit=vocab_limit, step=step, sources=loader.source_counts)
        if step % stage.eval_every == 0 or step == total_steps:
            latest = evaluate(session, engine, vocab_limit=vocab_limit, step=step)

    with session.recorder.phase("export"):
        export_model(engine, model, session.tokenizer, run_dir / "model")
    with session.recorder.phase("samples"):
        record_samples(session, engine, vocab_limit=vocab_limit, step=total_steps)
    session.finish(before=before, after=latest)


def check_packing(stage: SFTConfig, model: Any) -> None:
    """Raise ConfigError if a model, of a family that only its files told, cannot keep packed examples apart."""
    attention, family = model.config._attn_implementation, model.config.model_type
    if stage.packing and (family not in PACKABLE or attention not in PACKING_ATTENTION):
        raise ConfigError(f"stage.packing=true: not with {family} and attention {attention}; leave packing off")


def batch_loss(engine: Any, batch: SFTBatch | PackedBatch, *, vocab_limit: int) -> Tensor:
    """Summed next-token loss over the target tokens of a micro-batch."""
    if isinstance(batch, PackedBatch):
        mask: Tensor = block_causal_bias(batch.segment_ids, dtype=engine.module.dtype)
        positions = batch.position_ids
    else:
        mask, positions = batch.attention_mask, position_ids(batch.attention_mask)
    logits = engine(input_ids=batch.sequence_ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    logprobs = token_logprobs(logits[:, :-1, :vocab_limit], batch.sequence_ids[:, 1:])
    return sft_loss(logprobs, batch.loss_mask[:, 1:])


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
            [part.to(session.device) for part in parts],
            lambda part: batch_loss(engine, part, vocab_limit=vocab_limit),
            num_targets=global_count(session, [batch.loss_mask[:, 1:]]),
        )
    places = sum(part.sequence_ids.numel() for part in parts)
    session.accumulator.add("train/loss", result.loss_sum, targets)
    session.accumulator.add("train/tokens", tokens * session.ranks, 1)
    session.accumulator.add("train/padding_share", places - tokens, places)
    values = session.reduced_metrics()
    values |= {
        "train/learning_rate": result.learning_rate,
        "train/grad_norm": result.grad_norm,
        "train/skipped": float(not result.applied),
        **session.timing(values.pop("train/tokens")),
        **{f"data/{name}": float(count) for name, count in sources.items()},
    }
    session.recorder.metrics(step, values)
    shown = {"loss": values["train/loss"]}
    session.recorder.progress(step, shown, tokens_per_second=values["time/tokens_per_second"])


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
            loss = batch_loss(engine, batch, vocab_limit=vocab_limit)
            session.accumulator.add("eval/loss", loss, batch.loss_mask[:, 1:].sum())
        values = session.reduced_metrics()
    values["eval/perplexity"] = math.exp(min(values["eval/loss"], 50.0))
    session.recorder.metrics(step, values)
    session.recorder.line(
        f"step {step}: held-out loss {values['eval/loss']:.3f}, perplexity {values['eval/perplexity']:.1f}"
    )
    return values


def record_samples(session: Session, engine: Any, *, vocab_limit: int, step: int, count: int = 10) -> None:
    """Answer a few held-out prompts: PPO's, so that its answers can stand beside them, or else this stage's own."""
    rows = session.data.part("ppo" if session.data.has_part("ppo", held_out=True) else "sft", held_out=True)
    rows = rows.select(range(min(count, len(rows)))).to_list()
    prompts = collate_prompts(rows, pad_id=session.pad_id).to(session.device)
    rollout = generate(
        engine, prompts, tokenizer=session.tokenizer, sampling=sampling_of(session.config), vocab_limit=vocab_limit
    )
    ended = ended_with_eos(rollout, eos_id=session.eos_id).tolist()
    lengths = rollout.response_mask.sum(dim=1).tolist()
    texts = response_texts(rollout, session.tokenizer)
    session.recorder.samples(
        step,
        [
            {"prompt": row["prompt_text"], "responses": {"sft": {"text": text, "tokens": length, "ended": end}}}
            for row, text, length, end in zip(rows, texts, lengths, ended, strict=True)
        ],
    )
