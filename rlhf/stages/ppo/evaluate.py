"""Held-out evaluation of a policy: score, KL, length, and what a judge says that the policy never saw."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch

from rlhf.batch import PromptBatch, Rollout
from rlhf.data.collate import collate_prompts, collate_sft
from rlhf.data.judge import Judge, fit_judge
from rlhf.data.loader import eval_batches
from rlhf.data.split import PTX
from rlhf.engine.distributed import all_reduce_sum, gather_objects
from rlhf.functional.kl import per_sequence_kl
from rlhf.rollout.forward import in_groups, next_token_loss, response_logprobs
from rlhf.rollout.grouping import equal_groups
from rlhf.rollout.score import ended_with_eos, response_texts
from rlhf.stages.ppo.config import PPOConfig
from rlhf.stages.ppo.trainer import DeepSpeedPPOTrainer
from rlhf.stages.session import Session

Answer = dict[str, Any]


class Evaluator:
    """Answers the same held-out prompts each time it is asked, with the same random numbers.

    The first evaluation's answers, those of the fine-tuned model, are kept and written beside the later ones.
    """

    def __init__(self, session: Session, trainer: DeepSpeedPPOTrainer) -> None:
        self.session = session
        self.trainer = trainer
        self.judge: Judge | None = fit_judge(session.config.data) if session.config.data.judge else None
        if self.judge is not None:
            session.recorder.line(f"judge: right on {100 * self.judge.accuracy:.0f} % of held-out texts")
        rows = session.data.part("ppo", held_out=True)
        self.rows = rows.select(range(min(cast(PPOConfig, session.config.stage).eval_prompts, len(rows))))
        self.texts = held_out_texts(session, most=len(self.rows))
        self.first_answers: dict[str, Answer] = {}

    def evaluate(self, *, step: int) -> dict[str, float]:
        """Answer the prompts, score the answers, write metrics and samples. Every rank must call."""
        session = self.session
        with session.recorder.phase("evaluation"), _forked_random_state(session.config.seed + session.rank):
            answers = self._answers()
            values = self._summarise(answers) | self._text_loss()
        if not self.first_answers:
            self.first_answers = answers
        session.recorder.metrics(step, values)
        session.recorder.samples(
            step,
            [
                {"prompt": prompt, "responses": {"sft": self.first_answers[prompt], session.config.stage.name: answer}}
                for prompt, answer in answers.items()
            ],
        )
        judged = f", judge {100 * values['eval/judge_positive']:.0f} % positive" if self.judge else ""
        session.recorder.line(
            f"iteration {step}: held-out score {values['eval/score']:.2f}, KL {values['eval/kl_per_sequence']:.1f}, "
            f"length {values['eval/response_length']:.1f}, EOS {100 * values['eval/eos_rate']:.0f} %{judged}"
        )
        return values

    @torch.no_grad()
    def _answers(self) -> dict[str, Answer]:
        """Every prompt's answer, on every rank."""
        session = self.session
        batches = eval_batches(
            self.rows,
            batch_size=cast(PPOConfig, session.config.stage).micro_batch_size_per_gpu * 4,
            collate=lambda rows: (rows, collate_prompts(rows, pad_id=session.pad_id)),
            rank=session.rank,
            ranks=session.ranks,
        )
        generator, device = self.trainer.generator, self.trainer.engine.actor.device
        with generator.generation_mode():
            answered = [
                (rows, prompts, generator.generate(prompts.to(device), seed=session.config.seed), valid)
                for (rows, prompts), valid in batches
            ]
        mine: list[tuple[str, Answer]] = []
        for rows, prompts, rollout, valid in answered:
            texts = [row["prompt_text"] for row in rows]
            mine += list(zip(texts, self._described(prompts, rollout), strict=True))[:valid]
        return {prompt: answer for part in gather_objects(mine) for prompt, answer in part}

    def _described(self, prompts: PromptBatch, rollout: Rollout) -> list[Answer]:
        trainer, engine = self.trainer, self.trainer.engine
        ended = ended_with_eos(rollout, ends=trainer.sampling.stop_ids)
        logprobs, reference = (
            in_groups(
                partial(
                    response_logprobs,
                    model,
                    temperature=trainer.sampling.temperature,
                    vocab_limit=engine.vocab_limit,
                ),
                rollout,
                equal_groups(rollout.attention_mask.sum(dim=1), trainer.stage.micro_batch_size_per_gpu),
            )
            for model in (engine.actor, engine.reference)
        )
        columns = {
            "text": response_texts(rollout, engine.tokenizer),
            "score": trainer.scorer(prompts, rollout).tolist(),
            "kl": per_sequence_kl(logprobs, reference, rollout.response_mask).tolist(),
            "reference_nats": (-reference.sum(dim=1)).tolist(),
            "tokens": rollout.response_mask.sum(dim=1).tolist(),
            "ended": ended.tolist(),
        }
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    @torch.no_grad()
    def _text_loss(self) -> dict[str, float]:
        """Next-token loss on held-out text: what the policy forgets while it learns to score."""
        if self.texts is None:
            return {}
        session, engine = self.session, self.trainer.engine
        engine.actor.eval()
        batches = eval_batches(
            self.texts,
            batch_size=cast(PPOConfig, session.config.stage).micro_batch_size_per_gpu * 2,
            collate=partial(collate_sft, pad_id=session.pad_id),
            rank=session.rank,
            ranks=session.ranks,
        )
        sums = torch.zeros(2, dtype=torch.float64, device=session.device)
        for batch, valid in batches:
            batch = batch.to(session.device)
            batch.loss_mask[valid:] = False
            loss = next_token_loss(engine.actor, batch, vocab_limit=engine.vocab_limit)
            sums += torch.stack([loss.double(), batch.loss_mask[:, 1:].sum().double()])
        total, tokens = all_reduce_sum(sums).tolist()
        return {"eval/text_loss": total / max(1.0, tokens)}

    def _summarise(self, answers: dict[str, Answer]) -> dict[str, float]:
        columns = {name: torch.tensor([float(answer[name]) for answer in answers.values()]) for name in _NUMBERS}
        values = {
            "eval/score": float(columns["score"].mean()),
            "eval/score_std": float(columns["score"].std(correction=0)),
            "eval/kl_per_sequence": float(columns["kl"].mean()),
            "eval/reference_perplexity": math.exp(
                min(float(columns["reference_nats"].sum() / columns["tokens"].sum()), 50)
            ),
            "eval/response_length": float(columns["tokens"].mean()),
            "eval/eos_rate": float(columns["ended"].mean()),
        }
        if self.judge is not None:
            positive = self.judge.positive([answer["text"] for answer in answers.values()])
            values["eval/judge_positive"] = sum(positive) / len(positive)
        return values


def held_out_texts(session: Session, *, most: int) -> Any:
    """Held-out rows of what the pretraining mix is drawn from: plain texts, or the SFT part's answers; None without."""
    name = PTX if session.data.has_part(PTX, held_out=False) else "sft"
    if not session.data.has_part(name, held_out=True):
        return None
    rows = session.data.part(name, held_out=True)
    return rows.select(range(min(most, len(rows))))


_NUMBERS = ("score", "kl", "reference_nats", "tokens", "ended")


@contextmanager
def _forked_random_state(seed: int) -> Iterator[None]:
    """Within this context sampling starts from the same seed each time; afterwards it goes on as before."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
