"""Policy optimisation: the loop of PPO, and of its variants, which differ in their options."""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import cast

from rlhf.batch import PromptBatch, SFTBatch
from rlhf.config.errors import ConfigError, StoppedError
from rlhf.config.schema import REWARD_MODEL, Config
from rlhf.data.collate import collate_prompts, collate_sft
from rlhf.data.loader import GlobalLoader
from rlhf.data.split import PTX
from rlhf.engine.distributed import seed_everything
from rlhf.engine.export import export_model
from rlhf.rollout.vllm import VllmBackend
from rlhf.stages.ppo.config import PPOConfig
from rlhf.stages.ppo.engine import DeepSpeedRLHFEngine
from rlhf.stages.ppo.evaluate import Evaluator
from rlhf.stages.ppo.record import IterationRecord
from rlhf.stages.ppo.trainer import DeepSpeedPPOTrainer
from rlhf.stages.session import Session, open_session, option_prefix
from rlhf.tracking.health import Finding


def run(config: Config, run_dir: Path) -> None:
    """Optimise the policy against the scorer, evaluate it on held-out prompts, and export it."""
    stage = cast(PPOConfig, config.stage)
    session = open_session(config, run_dir, base=None if stage.actor_model else config.model)
    engine = build_engines(session)
    session.recorder.total_steps = stage.iterations
    trainer = DeepSpeedPPOTrainer(
        engine=engine,
        args=config,
        accumulator=session.accumulator,
        recorder=session.recorder,
        pretraining=pretraining_batches(session),
    )
    prompt_train_dataloader = prompt_batches(session)
    say_what_is_special(session, trainer)
    evaluator = Evaluator(session, trainer)
    record = IterationRecord(session, trainer)
    seed_everything(config.seed + session.rank)

    before = latest = evaluator.evaluate(step=0)
    record.evaluation(before, step=0)
    for iteration, prompt_batch in zip(range(1, stage.iterations + 1), prompt_train_dataloader, strict=False):
        experience = trainer.generate_experience(prompt_batch)
        trainer.train_rlhf(experience)
        finding = record.iteration(step=iteration, sources=prompt_train_dataloader.source_counts)
        if finding is not None:
            stop(session, finding, step=iteration)
        if iteration == stage.iterations:
            export(session, engine)  # Before anything else may fail.
        if iteration % stage.eval_every == 0 or iteration == stage.iterations:
            averaged = engine.average is not None and stage.ema.final_evaluation and iteration == stage.iterations
            with engine.average.in_place() if engine.average is not None and averaged else nullcontext():
                latest = evaluator.evaluate(step=iteration)
            finding = record.evaluation(latest, step=iteration)
            if finding is not None:
                stop(session, finding, step=iteration)
            if iteration < stage.iterations:
                export(session, engine)  # What is left of a run that is stopped or killed.

    session.finish(before=before, after=latest)


def build_engines(session: Session) -> DeepSpeedRLHFEngine:
    """All models of the stage."""
    config, stage = session.config, cast(PPOConfig, session.config.stage)
    if stage.reward_model is None and config.scorer.kind == REWARD_MODEL:
        raise ConfigError("stage.reward_model is not set: give the directory of a model trained with stage=rm")
    return DeepSpeedRLHFEngine(
        actor_model_name_or_path=stage.actor_model or session.base or "",
        critic_model_name_or_path=stage.reward_model,
        tokenizer=session.tokenizer,
        num_total_iters=stage.num_steps,
        args=config,
        reward_tokenizer=session.reward_tokenizer if stage.reward_model is not None else None,
    )


def prompt_batches(session: Session) -> GlobalLoader[PromptBatch]:
    """The prompts of each rollout, without end."""
    stage = cast(PPOConfig, session.config.stage)
    return GlobalLoader(
        session.data.part("ppo", held_out=False),
        batch_size=stage.rollout_batch_size // stage.group_size,
        collate=partial(collate_prompts, pad_id=session.pad_id),
        seed=session.config.seed,
        rank=session.rank,
        ranks=session.ranks,
        epochs=None,
    )


def pretraining_batches(session: Session) -> Iterator[SFTBatch] | None:
    """The text of the pretraining mix, without end: the mix's plain texts, or if it has none the SFT part's answers."""
    stage = cast(PPOConfig, session.config.stage)
    if not stage.ptx_batch_size:
        return None
    name = PTX if session.data.has_part(PTX, held_out=False) else "sft"
    loader = GlobalLoader(
        session.data.part(name, held_out=False),
        batch_size=stage.ptx_batch_size,
        collate=partial(collate_sft, pad_id=session.pad_id),
        seed=session.config.seed,
        rank=session.rank,
        ranks=session.ranks,
        epochs=None,
    )
    return iter(loader)


def say_what_is_special(session: Session, trainer: DeepSpeedPPOTrainer) -> None:
    """What a user should know of the options before the first iteration."""
    say = session.recorder.line
    say(f"rollout: {trainer.generator.description}")
    if not trainer.sampling.unbiased:
        say(
            "warning: tokens are not drawn from the policy's whole distribution (rollout.top_p, top_k, min_p, "
            "repetition_penalty or min_new_tokens), which biases PPO's ratio"
        )
    if session.config.rollout.importance_cap is not None and not trainer.generator.gives_logprobs:
        say("warning: rollout.importance_cap does nothing: what generates gives no log-probabilities of its tokens")
    if isinstance(trainer.generator.backend, VllmBackend) and not trainer.sampling.unbiased:
        say("warning: vLLM's tokens come without log-probabilities then, so that rollout.mismatch is not looked at")
    if session.reward_tokenizer is not None:
        say(
            "the reward model has another tokenizer: answers are scored by their text, and the critic starts from "
            "the actor's model with a new head"
        )


def stop(session: Session, finding: Finding, *, step: int) -> None:
    """End the run because a health rule says so; every rank does."""
    model = session.run_dir / "model"
    kept = f"the model of the last evaluation is in {model}" if model.is_dir() else "no model was exported before"
    session.recorder.close()
    raise StoppedError(
        f"stopped at iteration {step} by the health rule {finding.rule}: {finding.message}; {kept}. A run with "
        f"{option_prefix(session.run_dir, session.config.stage.name)}.health.{finding.rule}.action=warn only says so"
    )


def export(session: Session, engine: DeepSpeedRLHFEngine) -> None:
    """Write the policy, and beside it the average of its weights if there is one."""
    with session.recorder.phase("export"):
        export_model(engine.actor, engine.actor_model, session.tokenizer, session.run_dir / "model")
        if engine.average is not None:
            with engine.average.in_place():
                export_model(engine.actor, engine.actor_model, session.tokenizer, session.run_dir / "ema" / "model")
