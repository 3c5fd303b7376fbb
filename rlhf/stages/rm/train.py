"""Reward-model training: the loop."""

import math
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from rlhf.batch import PreferenceBatch
from rlhf.config.schema import Config
from rlhf.data.collate import collate_pairs
from rlhf.data.loader import GlobalLoader, eval_batches
from rlhf.engine.build import partitioned_loading
from rlhf.engine.distributed import seed_everything
from rlhf.engine.export import export_model
from rlhf.engine.heads import new_head
from rlhf.engine.update import Objective, optimizer_step
from rlhf.functional.losses import preference_loss
from rlhf.models.load import ScalarModel, load_scalar_model, set_dropout
from rlhf.models.score_rule import score_tail, write_score_rule
from rlhf.rollout.forward import sequence_scores
from rlhf.stages.policy import finish_engine
from rlhf.stages.rm.config import RMConfig
from rlhf.stages.session import (
    Session,
    count_steps,
    open_session,
    option_prefix,
    record_step,
)


def run(config: Config, run_dir: Path) -> None:
    """Train on preference pairs, evaluate on held-out ones, and export the model with its score statistics."""
    stage = cast(RMConfig, config.stage)
    session = open_session(config, run_dir, base=None if stage.sft_model else config.reward_model)
    loader = GlobalLoader(
        session.data.part("rm", held_out=False),
        batch_size=stage.batch_size,
        collate=partial(collate_pairs, pad_id=session.pad_id, tail=score_tail(session.tokenizer)),
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
        model = load_scalar_model(
            stage.sft_model or session.base or "",
            session.tokenizer,
            dtype=session.dtype,
            attention=config.reward_model.attention,
            revision=None if stage.sft_model else config.reward_model.revision,
        )
    new_head(model, seed=config.seed)
    if stage.dropout is not None:
        set_dropout(model.classifier, stage.dropout, key=f"{option_prefix(run_dir, 'rm')}.dropout")
    engine = finish_engine(config, role, model, model.classifier, total_steps=total_steps)
    seed_everything(config.seed + session.rank)

    before = latest = evaluate(session, engine, step=0)
    for step, batch in zip(range(1, total_steps + 1), loader, strict=False):
        train_step(session, engine, batch, step=step, sources=loader.source_counts)
        if step % stage.eval_every == 0 or step == total_steps:
            latest = evaluate(session, engine, step=step)

    with session.recorder.phase("export"):
        export_reward_model(session, engine, model, latest)
    with session.recorder.phase("samples"):
        record_samples(session, engine, step=total_steps)
    session.finish(before=before, after=latest)


def pair_scores(engine: Any, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
    """Scores of the chosen and the rejected sides [B], both in one forward pass."""
    scores = sequence_scores(
        engine,
        torch.cat([batch.chosen_ids, batch.rejected_ids]),
        torch.cat([batch.chosen_mask, batch.rejected_mask]),
    )
    chosen, rejected = scores.chunk(2)
    return chosen, rejected


def train_step(session: Session, engine: Any, batch: PreferenceBatch, *, step: int, sources: dict[str, int]) -> None:
    """One optimizer step and its metrics."""
    engine.train()
    batch = batch.to(session.device)
    stage = cast(RMConfig, session.config.stage)
    accumulator = session.accumulator

    def loss_sum(part: PreferenceBatch) -> Tensor:
        chosen, rejected = pair_scores(engine, part)
        loss, stats = preference_loss(chosen, rejected, centering_coef=stage.centering_coef)
        accumulator.add("train/accuracy", stats.correct, len(part))
        accumulator.add("train/margin", stats.margin, len(part))
        return loss

    micro_batches = batch.split(stage.micro_batch_size_per_gpu)
    with session.recorder.phase("training"):
        result = optimizer_step(
            engine, Objective(micro_batches=micro_batches, loss_sum=loss_sum, num_targets=stage.batch_size)
        )
    accumulator.add("train/loss", result.loss_sum, len(batch))
    accumulator.add("train/tokens", (batch.chosen_mask.sum() + batch.rejected_mask.sum()) * session.ranks, 1)
    record_step(session, result, step=step, sources=sources, shown=("loss", "accuracy"))


@torch.no_grad()
def evaluate(session: Session, engine: Any, *, step: int) -> dict[str, float]:
    """Held-out accuracy and margin, and mean and standard deviation of the scores of the reference responses."""
    stage = cast(RMConfig, session.config.stage)
    engine.eval()
    rows = session.data.part("rm", held_out=True)
    batches = eval_batches(
        rows.select(range(min(stage.eval_examples, len(rows)))),
        batch_size=stage.micro_batch_size_per_gpu * 2,
        collate=partial(collate_pairs, pad_id=session.pad_id, tail=score_tail(session.tokenizer)),
        rank=session.rank,
        ranks=session.ranks,
    )
    with session.recorder.phase("evaluation"):
        for batch, valid in batches:
            chosen, rejected = (side[:valid] for side in pair_scores(engine, batch.to(session.device)))
            both = torch.cat([chosen, rejected])
            loss, stats = preference_loss(chosen, rejected, centering_coef=stage.centering_coef)
            session.accumulator.add("eval/loss", loss, valid)
            session.accumulator.add("eval/accuracy", stats.correct, valid)
            session.accumulator.add("eval/margin", stats.margin, valid)
            session.accumulator.add("eval/score_mean", both.sum(), 2 * valid)
            session.accumulator.add("eval/score_square", both.square().sum(), 2 * valid)
        values = session.reduced_metrics()
    variance = values.pop("eval/score_square") - values["eval/score_mean"] ** 2
    values["eval/score_std"] = math.sqrt(max(variance, 1e-12))
    session.recorder.metrics(step, values)
    session.recorder.line(
        f"step {step}: held-out accuracy {values['eval/accuracy']:.3f}, margin {values['eval/margin']:.3f}"
    )
    return values


@torch.no_grad()
def record_samples(session: Session, engine: Any, *, step: int, count: int = 10) -> None:
    """A few held-out pairs with their scores."""
    rows = session.data.part("rm", held_out=True)
    rows = rows.select(range(min(count, len(rows)))).to_list()
    tail = score_tail(session.tokenizer)
    batch = collate_pairs(rows, pad_id=session.pad_id, tail=tail).to(session.device)
    chosen, rejected = pair_scores(engine, batch)
    session.recorder.samples(
        step,
        [
            {
                "prompt": row["prompt_text"],
                "responses": {
                    "chosen": {"text": row["chosen_text"], "score": high},
                    "rejected": {"text": row["rejected_text"], "score": low},
                },
            }
            for row, high, low in zip(rows, chosen.tolist(), rejected.tolist(), strict=True)
        ],
    )


def export_reward_model(session: Session, engine: Any, model: ScalarModel, values: dict[str, float]) -> None:
    """Save the sequence classifier; its config.json says where scores are read and how held-out ones are spread."""
    mean, std = values["eval/score_mean"], values["eval/score_std"]
    export_model(
        engine,
        model.classifier,
        session.tokenizer,
        session.run_dir / "model",
        prefix=ScalarModel.prefix,
        finish=lambda directory: write_score_rule(directory, session.tokenizer, mean=mean, std=std),
    )
