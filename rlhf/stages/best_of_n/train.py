"""Best-of-n sampling: answers to held-out prompts, of which the scorer picks one."""

import math
from pathlib import Path
from typing import Any, cast

import torch

from rlhf.config.schema import Config
from rlhf.data.collate import collate_prompts
from rlhf.data.judge import Judge, fit_judge
from rlhf.data.loader import eval_batches
from rlhf.engine.distributed import gather_objects, seed_everything
from rlhf.models.load import vocabulary_limit
from rlhf.rollout.score import ended_with_eos, response_texts
from rlhf.stages.best_of_n.config import BestOfNConfig
from rlhf.stages.policy import build_policy
from rlhf.stages.scoring import build_scorer, load_reward_models
from rlhf.stages.session import Session, generator_of, open_session

Answer = dict[str, Any]


def run(config: Config, run_dir: Path) -> None:
    """Sample the most answers that are asked for, and measure the best of each number of them."""
    stage = cast(BestOfNConfig, config.stage)
    session = open_session(config, run_dir, base=None if stage.actor_model else config.model)
    session.recorder.total_steps = stage.n[-1]
    judge = fit_judge(config.data) if config.data.judge else None
    answers = sample(session)
    measured = [measure(session, answers, n=n, judge=judge) for n in stage.n]
    for n in (stage.n[0], stage.n[-1]):
        rows = [
            {"prompt": prompt, "responses": {f"best of {n}": best_of(given, n)}} for prompt, given in answers.items()
        ]
        session.recorder.samples(n, rows)
    session.finish(before=measured[0], after=measured[-1])


def best_of(answers: list[Answer], n: int) -> Answer:
    """The answer with the highest score among the first n; one whose score is not a number is the worst."""
    scores = [-math.inf if math.isnan(answer["score"]) else answer["score"] for answer in answers[:n]]
    return answers[scores.index(max(scores))]


def kl_of_best_of_n(n: int) -> float:
    """`log n - (n - 1) / n`, in nats: the divergence of best-of-n from the policy if no two answers are the same.

    An upper bound otherwise (Beirami et al. 2024, 2401.01879, theorem 1).
    """
    return math.log(n) - (n - 1) / n


def measure(session: Session, answers: dict[str, list[Answer]], *, n: int, judge: Judge | None) -> dict[str, float]:
    """Score, length, divergence and the judge's share of the best of n, on average over the prompts."""
    best = [best_of(given, n) for given in answers.values()]
    scores = torch.tensor([float(answer["score"]) for answer in best])
    values = {
        "eval/score": float(scores.mean()),
        "eval/score_std": float(scores.std(correction=0)),
        "eval/kl_per_sequence": kl_of_best_of_n(n),
        "eval/response_length": sum(answer["tokens"] for answer in best) / len(best),
        "eval/eos_rate": sum(answer["ended"] for answer in best) / len(best),
    }
    judged = ""
    if judge is not None:
        positive = judge.positive([answer["text"] for answer in best])
        values["eval/judge_positive"] = sum(positive) / len(positive)
        judged = f", judge {100 * values['eval/judge_positive']:.0f} % positive"
    session.recorder.metrics(n, values)
    session.recorder.line(
        f"best of {n}: held-out score {values['eval/score']:.2f}, KL {values['eval/kl_per_sequence']:.2f}, "
        f"length {values['eval/response_length']:.1f}{judged}"
    )
    return values


@torch.no_grad()
def sample(session: Session) -> dict[str, list[Answer]]:
    """The answers to each held-out prompt, with their scores, on every rank."""
    config, stage = session.config, cast(BestOfNConfig, session.config.stage)
    model, actor = build_policy(config, stage.actor_model or session.base or "", session.tokenizer, total_steps=1)
    scorer = build_scorer(
        config.scorer,
        load_reward_models(config, stage.reward_model, session.reward_tokenizer or session.tokenizer),
        tokenizer=session.tokenizer,
        reward_tokenizer=session.reward_tokenizer if stage.reward_model is not None else None,
        micro_batch_size=stage.micro_batch_size_per_gpu,
    )
    seed_everything(config.seed + session.rank)
    rows = session.data.part("ppo", held_out=True)
    batches = eval_batches(
        rows.select(range(min(stage.eval_prompts, len(rows)))),
        batch_size=stage.micro_batch_size_per_gpu,
        collate=lambda rows: (rows, collate_prompts(rows, pad_id=session.pad_id)),
        rank=session.rank,
        ranks=session.ranks,
    )
    mine: list[tuple[str, list[Answer]]] = []
    vocab_limit = vocabulary_limit(model, session.tokenizer)
    generator = generator_of(config, actor, session.tokenizer, vocab_limit=vocab_limit)
    session.recorder.line(f"rollout: {generator.description}")
    with session.recorder.phase("generation"), generator.generation_mode():
        sampled = [
            (rows_of_batch, repeated, generator.generate(repeated.to(session.device), seed=config.seed), valid)
            for (rows_of_batch, prompts), valid in batches
            for repeated in (prompts.repeat(stage.n[-1]),)
        ]
    for rows_of_batch, repeated, rollout, valid in sampled:
        with session.recorder.phase("scoring"):
            columns = {
                "score": scorer(repeated, rollout).tolist(),
                "text": response_texts(rollout, session.tokenizer),
                "tokens": rollout.response_mask.sum(dim=1).tolist(),
                "ended": ended_with_eos(rollout, ends=generator.sampling.stop_ids).tolist(),
            }
        answers = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        for number, row in enumerate(rows_of_batch[:valid]):
            mine.append((row["prompt_text"], answers[number * stage.n[-1] : (number + 1) * stage.n[-1]]))
    return {prompt: answers for part in gather_objects(mine) for prompt, answers in part}
