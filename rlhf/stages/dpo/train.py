"""Direct preference optimisation: the loop."""

from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from rlhf.batch import PreferenceBatch
from rlhf.config.schema import Config
from rlhf.data.collate import collate_pairs
from rlhf.data.loader import GlobalLoader, eval_batches
from rlhf.engine.distributed import seed_everything
from rlhf.engine.export import export_model
from rlhf.engine.update import Objective, optimizer_step
from rlhf.functional.losses import DpoStats, dpo_loss
from rlhf.models.load import vocabulary_limit
from rlhf.rollout.forward import target_logprobs
from rlhf.stages.dpo.config import DPOConfig
from rlhf.stages.policy import build_policy, build_reference
from rlhf.stages.samples import record_samples
from rlhf.stages.session import Session, count_steps, generator_of, open_session, record_step


def run(config: Config, run_dir: Path) -> None:
    """Train the policy on preference pairs, evaluate it on held-out ones, and export it."""
    stage = cast(DPOConfig, config.stage)
    session = open_session(config, run_dir, base=None if stage.actor_model else config.model)
    loader = GlobalLoader(
        session.data.part("rm", held_out=False),
        batch_size=stage.batch_size,
        collate=partial(collate_pairs, pad_id=session.pad_id),
        seed=config.seed,
        rank=session.rank,
        ranks=session.ranks,
        epochs=None,
    )
    total_steps = count_steps(
        batches_per_epoch=loader.batches_per_epoch, epochs=stage.epochs, max_steps=stage.max_steps
    )
    session.recorder.total_steps = total_steps
    start = stage.actor_model or session.base or ""
    model, actor = build_policy(config, start, session.tokenizer, total_steps=total_steps)
    reference = build_reference(config, start, session.tokenizer, actor=actor)
    pairs = PairLoss(session, actor, reference, vocab_limit=vocabulary_limit(model, session.tokenizer))
    generator = generator_of(config, actor, session.tokenizer, vocab_limit=pairs.vocab_limit)
    session.recorder.line(f"rollout: {generator.description}")
    seed_everything(config.seed + session.rank)

    before = latest = evaluate(session, pairs, step=0)
    for step, batch in zip(range(1, total_steps + 1), loader, strict=False):
        train_step(session, pairs, batch, step=step, sources=loader.source_counts)
        if step % stage.eval_every == 0 or step == total_steps:
            latest = evaluate(session, pairs, step=step)

    with session.recorder.phase("export"):
        export_model(actor, model, session.tokenizer, run_dir / "model")
    with session.recorder.phase("samples"):
        record_samples(session, generator, step=total_steps)
    session.finish(before=before, after=latest)


class PairLoss:
    """The loss of a batch of pairs under the actor and the reference."""

    def __init__(self, session: Session, actor: Any, reference: Any, *, vocab_limit: int) -> None:
        self.actor, self.reference, self.vocab_limit = actor, reference, vocab_limit
        self._stage = cast(DPOConfig, session.config.stage)

    def __call__(self, batch: PreferenceBatch, *, count: int) -> tuple[Tensor, DpoStats]:
        """The summed loss of the first `count` pairs and its statistics; all pairs are computed.

        Dropout is off, so that both models differ by training alone.
        """
        sequence_ids = torch.cat([batch.chosen_ids, batch.rejected_ids])
        attention_mask = torch.cat([batch.chosen_mask, batch.rejected_mask])
        targets = torch.cat([batch.chosen_targets, batch.rejected_targets])
        compute = partial(target_logprobs, vocab_limit=self.vocab_limit)
        logprobs = compute(self.actor, sequence_ids, attention_mask, targets)
        with torch.no_grad():
            ref_logprobs = compute(self.reference, sequence_ids, attention_mask, targets)
        sides = [slice(0, count), slice(len(batch), len(batch) + count)]
        return dpo_loss(
            torch.cat([(logprobs - ref_logprobs)[side] for side in sides]),
            torch.cat([targets[side, 1:] for side in sides]),
            beta=self._stage.beta,
            label_smoothing=self._stage.label_smoothing,
            kind=self._stage.loss.name,
        )


def train_step(
    session: Session, pairs: PairLoss, batch: PreferenceBatch, *, step: int, sources: dict[str, int]
) -> None:
    """One optimizer step and its metrics."""
    pairs.actor.train()
    stage = cast(DPOConfig, session.config.stage)
    batch = batch.to(session.device)

    def loss_sum(part: PreferenceBatch) -> Tensor:
        loss, stats = pairs(part, count=len(part))
        record(session, "train", loss.detach(), stats, count=len(part))
        return loss

    micro_batches = batch.split(stage.micro_batch_size_per_gpu)
    with session.recorder.phase("training"):
        result = optimizer_step(
            pairs.actor, Objective(micro_batches=micro_batches, loss_sum=loss_sum, num_targets=stage.batch_size)
        )
    session.accumulator.add("train/tokens", (batch.chosen_mask.sum() + batch.rejected_mask.sum()) * session.ranks, 1)
    record_step(session, result, step=step, sources=sources, shown=("loss", "accuracy"))


def record(session: Session, group: str, loss: Tensor, stats: DpoStats, *, count: int) -> None:
    """Add a batch's numbers to the metrics."""
    add = session.accumulator.add
    add(f"{group}/loss", loss, count)
    add(f"{group}/accuracy", stats.correct, count)
    add(f"{group}/margin", stats.margin, count)
    add(f"{group}/chosen_log_ratio", stats.chosen, count)
    add(f"{group}/rejected_log_ratio", stats.rejected, count)


@torch.no_grad()
def evaluate(session: Session, pairs: PairLoss, *, step: int) -> dict[str, float]:
    """Held-out loss, the share of pairs whose chosen answer gained more than the rejected one, and the margin."""
    stage = cast(DPOConfig, session.config.stage)
    pairs.actor.eval()
    rows = session.data.part("rm", held_out=True)
    batches = eval_batches(
        rows.select(range(min(stage.eval_examples, len(rows)))),
        batch_size=stage.micro_batch_size_per_gpu * 2,
        collate=partial(collate_pairs, pad_id=session.pad_id),
        rank=session.rank,
        ranks=session.ranks,
    )
    with session.recorder.phase("evaluation"):
        for batch, valid in batches:
            loss, stats = pairs(batch.to(session.device), count=valid)
            record(session, "eval", loss, stats, count=valid)
        values = session.reduced_metrics()
    session.recorder.metrics(step, values)
    session.recorder.line(
        f"step {step}: held-out loss {values['eval/loss']:.3f}, accuracy {values['eval/accuracy']:.3f}, "
        f"margin {values['eval/margin']:.3f}"
    )
    return values
