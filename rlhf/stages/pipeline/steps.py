"""The launches that a configuration stands for: one for a single stage, three for the pipeline. Imports no torch."""

from dataclasses import replace
from pathlib import Path

from rlhf.config.schema import Config, StageConfig
from rlhf.launcher.pipeline import StageRun
from rlhf.stages.pipeline.config import PipelineConfig


def stage_runs(config: Config, run_dir: Path) -> list[StageRun]:
    """Divide a resolved configuration into launches.

    In a pipeline each stage has its directory below `run_dir` and takes the former's model: the reward model starts
    from the SFT model if it is the same model as the policy, PPO from the SFT model and the trained reward model.
    """
    if not isinstance(config.stage, PipelineConfig):
        return [StageRun(config=config, directory=run_dir)]
    pipeline = config.stage
    sft_model, reward_model = str(run_dir / "sft" / "model"), str(run_dir / "rm" / "model")
    same = config.reward_model == config.model
    stages: list[StageConfig] = [
        pipeline.sft,
        replace(pipeline.rm, sft_model=sft_model if same else None),
        replace(pipeline.ppo, actor_model=sft_model, reward_model=reward_model),
    ]
    return [
        StageRun(config=replace(config, stage=stage, run_dir=str(run_dir / stage.name)), directory=run_dir / stage.name)
        for stage in stages
    ]
