"""Proximal policy optimisation: the loop."""

from functools import partial
from pathlib import Path
from typing import cast

from rlhf.config.errors import ConfigError
from rlhf.config.schema import Config
from rlhf.data.collate import collate_prompts
from rlhf.data.loader import GlobalLoader
from rlhf.engine.distributed import seed_everything
from rlhf.engine.export import export_model
from rlhf.stages.ppo.config import PPOConfig
from rlhf.stages.ppo.engine import DeepSpeedRLHFEngine
from rlhf.stages.ppo.evaluate import Evaluator
from rlhf.stages.ppo.record import record_iteration
from rlhf.stages.ppo.trainer import DeepSpeedPPOTrainer
from rlhf.stages.session import open_session


def run(config: Config, run_dir: Path) -> None:
    """Optimise the policy against the reward model, evaluate it on held-out prompts, and export it."""
    stage = cast(PPOConfig, config.stage)
    session = open_session(config, run_dir, base=None if stage.actor_model else config.model)
    if stage.reward_model is None:
        raise ConfigError("stage.reward_model is not set: give the directory of a model trained with stage=rm")
    updates = stage.ppo_epochs * (stage.rollout_batch_size // stage.mini_batch_size)
    engine = DeepSpeedRLHFEngine(
        actor_model_name_or_path=stage.actor_model or session.base or "",
        critic_model_name_or_path=stage.reward_model,
        tokenizer=session.tokenizer,
        num_total_iters=stage.iterations * updates,
        args=config,
        reward_tokenizer=session.reward_tokenizer,
    )
    session.recorder.total_steps = stage.iterations
    trainer = DeepSpeedPPOTrainer(
        engine=engine, args=config, accumulator=session.accumulator, recorder=session.recorder
    )
    prompt_train_dataloader = GlobalLoader(
        session.data.part("ppo", held_out=False),
        batch_size=stage.rollout_batch_size,
        collate=partial(collate_prompts, pad_id=session.pad_id),
        seed=config.seed,
        rank=session.rank,
        ranks=session.ranks,
        epochs=None,
    )
    if config.rollout.top_p < 1.0 or config.rollout.top_k > 0:
        session.recorder.line("warning: rollout.top_p and rollout.top_k cut the distribution and bias PPO's ratio")
    if session.reward_tokenizer is not None:
        session.recorder.line(
            "the reward model has another tokenizer: answers are scored by their text, and the critic starts from "
            "the actor's model with a new head"
        )
    evaluator = Evaluator(session, trainer)
    seed_everything(config.seed + session.rank)

    before = latest = evaluator.evaluate(step=0)
    for iteration, prompt_batch in zip(range(1, stage.iterations + 1), prompt_train_dataloader, strict=False):
        experience = trainer.generate_experience(prompt_batch)
        trainer.train_rlhf(experience)
        record_iteration(session, trainer, step=iteration, sources=prompt_train_dataloader.source_counts)
        if iteration % stage.eval_every == 0 or iteration == stage.iterations:
            latest = evaluator.evaluate(step=iteration)

    with session.recorder.phase("export"):
        export_model(engine.actor, engine.actor_model, session.tokenizer, run_dir / "model")
    session.finish(before=before, after=latest)
