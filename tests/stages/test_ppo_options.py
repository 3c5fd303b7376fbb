"""What is wrong with PPO's options, before anything starts."""

from pathlib import Path

import pytest

from rlhf.config.policy import EmaConfig, PtxConfig, PtxMode
from rlhf.config.schema import Config, MemoryConfig, OptimizerConfig
from rlhf.planner.memory import mix_problems
from rlhf.rollout.advantages import estimator
from rlhf.stages.grpo.config import GRPOConfig
from rlhf.stages.pipeline.config import PipelineConfig
from rlhf.stages.ppo.config import ESTIMATORS, NEED_CRITIC, NEED_GROUPS, PPOConfig
from rlhf.stages.start import reference_problems


def problems(**options: object) -> list[str]:
    given: dict[str, object] = {"micro_batch_size_per_gpu": 8} | options
    return PPOConfig(**given).problems("stage", 2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"advantage": "rloo", "critic": False}, "stage.group_size=1: stage.advantage=rloo compares the answers"),
        ({"advantage": "gea"}, "there is no such estimator; there are gae, grpo, reinforce_pp, rloo"),
        ({"critic": False}, "stage.critic=false: stage.advantage=gae needs a critic's values"),
        ({"group_size": 3}, "is not a multiple of stage.group_size × ranks = 3 × 2"),
        ({"ema": EmaConfig(start_step=200)}, "stage.ema.decay=null: nothing is averaged"),
        ({"ema": EmaConfig(decay=0.9, start_step=200)}, "the actor has 200 optimizer steps"),
        ({"ptx": PtxConfig(batch_size=8)}, "stage.ptx.coef=0.0: no pretraining text is mixed in"),
        ({"ptx": PtxConfig(mode=PtxMode.grad_ratio)}, "stage.ptx.coef=0.0: no pretraining text is mixed in"),
        ({"ptx": PtxConfig(coef=0.5, batch_size=3)}, "stage.ptx.batch_size=3 is not a multiple of the 2 ranks"),
        ({"critic_warmup_iterations": 100}, "the actor would never be trained"),
        ({"kl_target": 6.0, "kl_coef": 0.0}, "stage.kl_coef=0.0: an adaptive coefficient"),
    ],
)
def test_what_cannot_be_is_said(options: dict[str, object], said: str) -> None:
    (problem,) = problems(**options)
    assert said in problem


def test_every_estimator_that_may_be_named_exists() -> None:
    assert [callable(estimator(name, key="stage.advantage")) for name in ESTIMATORS] == [True] * 4
    assert {*NEED_CRITIC, *NEED_GROUPS} < set(ESTIMATORS)


def test_what_can_be_is_accepted() -> None:
    assert problems() == []
    assert GRPOConfig(micro_batch_size_per_gpu=8, ptx=PtxConfig(coef=0.5)).problems("stage", 2) == []
    warm = PPOConfig(critic_warmup_iterations=20, optimizer=OptimizerConfig())
    assert (warm.num_steps, warm.actor_steps) == (200, 160)


def test_functions_of_a_users_own_are_looked_for_in_every_stage(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def advantages(signals): ...\n")
    good = PPOConfig(advantage=f"{tmp_path}/mine.py:advantages")
    assert list(reference_problems(good, "stage")) == []
    bad = PipelineConfig(ppo=PPOConfig(advantage=f"{tmp_path}/mine.py:advantage"))
    (problem,) = reference_problems(bad, "stage")
    assert problem.startswith("stage.ppo.advantage=") and "defines no advantage" in problem


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_that_cannot_be_told_apart_are_refused(stage: int) -> None:
    ptx = PtxConfig(coef=0.5, mode=PtxMode.grad_ratio)
    config = Config(stage=PPOConfig(ptx=ptx), memory=MemoryConfig(zero_stage=stage, offload_optimizer=True))
    found = list(mix_problems(config))
    assert bool(found) == (stage in (1, 2))
    assert all(problem.startswith("stage.ptx.mode=grad_ratio: ZeRO-") for problem in found)
    assert not list(mix_problems(Config(stage=PPOConfig(ptx=ptx), memory=MemoryConfig(zero_stage=stage))))
