"""Model states against formulas written by hand (Rajbhandari et al. 2020, section 3), and what is chosen by them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from built import SMALL, transformers_config

from rlhf.config.choices import RolloutBackend
from rlhf.config.schema import (
    Accelerator,
    Config,
    DataConfig,
    HardwareConfig,
    LoraConfig,
    MemoryConfig,
    ModelConfig,
    Precision,
    RoleMemoryConfig,
    RolloutConfig,
)
from rlhf.planner.memory import (
    GIB,
    RoleStates,
    cache_problems,
    choose_zero_stage,
    decodes_in_place,
    memory_problems,
    precision_problems,
    rollout_problems,
    rollout_ranks,
    stage_memory,
)
from rlhf.planner.parameters import Head, lora_parameter_count, norm_and_embedding_parameters, parameter_count
from rlhf.stages.pipeline.config import PipelineConfig
from rlhf.stages.ppo.config import PPOConfig
from rlhf.stages.rm.config import RMConfig
from rlhf.stages.sft.config import SFTConfig

RANKS = 4
TARGETS = ["q_proj", "v_proj"]
POLICY = ModelConfig(name="policy", architecture=SMALL["llama"], lora_targets=TARGETS)
REWARD = ModelConfig(name="reward", architecture=SMALL["opt"], lora_targets=TARGETS)
LM, SCALAR = parameter_count(SMALL["llama"]), parameter_count(SMALL["opt"], head=Head.scalar)


def config(
    zero_stage: int | None, *, ranks: int = RANKS, precision: Precision = Precision.bf16, gib: float = 80.0
) -> Config:
    """A policy and a reward model of two families on one machine with so many GPUs."""
    hardware = HardwareConfig(
        name="some", accelerator=Accelerator.cuda, gpus_per_node=ranks, gpu_memory_gib=gib, host_memory_gib=100.0
    )
    memory = MemoryConfig(zero_stage=zero_stage, precision=precision)
    return Config(stage=SFTConfig(), model=POLICY, reward_model=REWARD, hardware=hardware, memory=memory)


def states(config: Config) -> dict[str, RoleStates]:
    """The states of the configuration's stage by role."""
    estimate = stage_memory(config, config.stage)
    assert estimate is not None
    return {role.role: role for role in estimate.roles}


def parts(role: RoleStates) -> tuple[float, float, float]:
    """Bytes of weights, gradients and optimizer."""
    return role.weights, role.gradients, role.optimizer


@pytest.mark.parametrize(
    ("zero_stage", "expected"),
    [
        (0, (2 * LM, 2 * LM, 12 * LM)),
        (1, (2 * LM, 2 * LM, 12 * LM / 4)),
        (2, (2 * LM, 2 * LM / 4, 12 * LM / 4)),
        (3, (2 * LM / 4, 2 * LM / 4, 12 * LM / 4)),
    ],
)
@pytest.mark.parametrize("precision", [Precision.bf16, Precision.fp16])
def test_mixed_precision_takes_sixteen_bytes_that_zero_divides(
    zero_stage: int, expected: tuple[float, float, float], precision: Precision
) -> None:
    (role,) = states(config(zero_stage, precision=precision)).values()
    assert parts(role) == expected
    assert (role.parameters, role.trainable, role.device, role.host) == (LM, LM, sum(expected), 0.0)


@pytest.mark.parametrize(
    ("zero_stage", "expected"),
    [
        (0, (4 * LM, 4 * LM, 8 * LM)),
        (1, (4 * LM, 4 * LM, 12 * LM / 4)),
        (2, (4 * LM, 4 * LM / 4, 12 * LM / 4)),
        (3, (4 * LM / 4, 4 * LM / 4, 12 * LM / 4)),
    ],
)
def test_fp32_needs_no_master_weights_but_zero_makes_them(
    zero_stage: int, expected: tuple[float, float, float]
) -> None:
    (role,) = states(config(zero_stage, precision=Precision.fp32)).values()
    assert parts(role) == expected


def test_ppo_keeps_two_trained_and_two_frozen_models() -> None:
    for zero_stage, shared in ((0, 1), (1, 1), (2, 1), (3, RANKS)):
        found = states(replace(config(zero_stage), stage=PPOConfig()))
        assert list(found) == ["actor", "critic", "reference", "reward_model"]
        assert parts(found["reference"]) == (2 * LM / shared, 0.0, 0.0)
        assert parts(found["reward_model"]) == (2 * SCALAR / shared, 0.0, 0.0)
        assert found["actor"].weights == 2 * LM / shared
        assert found["critic"].optimizer == 12 * SCALAR / (RANKS if zero_stage else 1)
    whole = stage_memory(replace(config(3), stage=PPOConfig()), PPOConfig())
    assert whole is not None and whole.gathered == 2 * LM
    kept = stage_memory(replace(config(2), stage=PPOConfig()), PPOConfig())
    assert kept is not None and kept.gathered == 0.0


def test_roles_may_be_placed_apart() -> None:
    ppo = replace(config(1), stage=PPOConfig())
    memory = replace(ppo.memory, actor=RoleMemoryConfig(zero_stage=3), reference=RoleMemoryConfig(zero_stage=3))
    found = states(replace(ppo, memory=memory))
    assert parts(found["actor"]) == (2 * LM / 4, 2 * LM / 4, 12 * LM / 4)
    assert parts(found["critic"]) == (2 * SCALAR, 2 * SCALAR, 12 * SCALAR / 4)
    assert parts(found["reference"]) == (2 * LM / 4, 0.0, 0.0)


def test_adapters_leave_little_to_train() -> None:
    rank = 8
    adapters = lora_parameter_count(SMALL["llama"], rank=rank, targets=TARGETS)
    own = lora_parameter_count(SMALL["opt"], rank=rank, targets=TARGETS)
    head = 24  # OPT's embedding_size here, which its head reads.
    ppo = replace(config(1), stage=PPOConfig(), lora=LoraConfig(rank=rank))
    found = states(ppo)
    assert list(found) == ["actor", "critic", "reward_model"]  # The actor without adapters is the reference.
    assert parts(found["actor"]) == (2 * (LM + adapters), 2 * adapters, 12 * adapters / 4)
    assert parts(found["critic"]) == (2 * (SCALAR + own), 2 * (own + head), 12 * (own + head) / 4)
    only_actor = states(replace(ppo, lora=LoraConfig(rank=rank, roles=["actor"])))
    assert (only_actor["critic"].trainable, only_actor["actor"].trainable) == (SCALAR, adapters)
    (model,) = states(replace(ppo, stage=RMConfig())).values()
    assert model.trainable == own + head
    with_norms = states(replace(ppo, lora=LoraConfig(rank=rank, only_lora=False)))
    assert list(with_norms) == ["actor", "critic", "reference", "reward_model"]
    others = norm_and_embedding_parameters(SMALL["llama"])
    assert with_norms["actor"].trainable == adapters + others


def test_critic_and_reward_model_may_have_adapters_of_another_rank() -> None:
    actor, wide, narrow = (
        lora_parameter_count(SMALL[family], rank=rank, targets=TARGETS)
        for family, rank in (("llama", 8), ("opt", 8), ("opt", 2))
    )
    head = 24
    ppo = replace(config(1), stage=PPOConfig())
    for lora, trainable, whole in (
        (LoraConfig(rank=8), wide + head, SCALAR + wide),
        (LoraConfig(rank=8, critic_rank=2), narrow + head, SCALAR + narrow),
        (LoraConfig(rank=8, critic_rank=0), SCALAR, SCALAR),
        (LoraConfig(rank=8, rm_rank=2), wide + head, SCALAR + wide),
        (LoraConfig(critic_rank=2), narrow + head, SCALAR + narrow),
    ):
        found = states(replace(ppo, lora=lora))
        critic = found["critic"]
        assert (critic.trainable, critic.parameters) == (trainable, whole)
        assert parts(critic) == (2 * whole, 2 * trainable, 12 * trainable / 4)
        assert found["actor"].trainable == (actor if lora.rank else LM)
        assert ("reference" in found) == (lora.rank is None)
    for lora, trainable in (
        (LoraConfig(rank=8), wide + head),
        (LoraConfig(rank=8, rm_rank=2), narrow + head),
        (LoraConfig(rank=8, rm_rank=0), SCALAR),
        (LoraConfig(rm_rank=2), narrow + head),
        (LoraConfig(rank=8, critic_rank=2), wide + head),
    ):
        (model,) = states(replace(config(1), stage=RMConfig(), lora=lora)).values()
        assert model.trainable == trainable


def test_a_directory_has_its_own_sizes_and_the_chosen_model_s_adapters(tmp_path: Path) -> None:
    sizes = replace(SMALL["llama"], num_layers=5)
    transformers_config(sizes).save_pretrained(tmp_path)
    ppo = replace(config(0), stage=PPOConfig(actor_model=str(tmp_path)), lora=LoraConfig(rank=8))
    actor = states(ppo)["actor"]
    assert actor.trainable == lora_parameter_count(sizes, rank=8, targets=TARGETS) > 0
    assert actor.parameters == parameter_count(sizes) + actor.trainable
    missing = replace(ppo, stage=PPOConfig(actor_model=str(tmp_path / "nowhere")))
    assert states(missing)["actor"].parameters == LM + states(missing)["actor"].trainable


def test_offloaded_states_are_the_host_s() -> None:
    memory = MemoryConfig(zero_stage=3, precision=Precision.bf16, offload_optimizer=True, offload_parameters=True)
    found = states(replace(config(3), stage=PPOConfig(), memory=memory))
    assert parts(found["actor"]) == (0.0, 0.0, 0.0)
    assert found["actor"].host == 2 * LM / 4 + 2 * LM / 4 + 4 * LM / 4 + 12 * LM / 4  # fp32 gradients are extra.
    assert (found["reference"].device, found["reference"].host) == (0.0, 2 * LM / 4)
    memory = MemoryConfig(zero_stage=1, precision=Precision.bf16, offload_optimizer=True)
    (model,) = states(replace(config(1), memory=memory)).values()
    assert (parts(model), model.host) == ((2 * LM, 2 * LM, 0.0), 4 * LM / 4 + 12 * LM / 4)


def test_what_there_is_room_for() -> None:
    estimate = stage_memory(config(2, gib=80.0), SFTConfig())
    assert estimate is not None
    assert (estimate.capacity, estimate.reserve, estimate.host_capacity) == (80 * GIB, 4.7 * GIB, 25 * GIB)
    exact = replace(estimate, capacity=estimate.states + estimate.reserve, cache=0.0)
    assert exact.fits() and exact.fits(ranks=1) and not exact.fits(activations=0.01)
    copied = replace(exact, gathered=9.0, outer=1.0)
    assert copied.fits() and not copied.fits(ranks=8)
    assert copied.shared(8) == 2.0  # What stands outside the blocks is on every rank.
    assert replace(copied, capacity=(exact.capacity or 0.0) + 2.0).fits(ranks=8)
    assert not replace(copied, capacity=(exact.capacity or 0.0) + 2.0).fits(ranks=7)
    assert not replace(exact, capacity=(exact.capacity or 0.0) - 1).fits()
    # Keys and values may take half of what is left.
    decoding = replace(copied, capacity=(exact.capacity or 0.0) + 5.0, cache=12.0)
    assert decoding.fits(ranks=8) and not decoding.fits(ranks=7)
    assert replace(copied, capacity=None).fits(ranks=1)
    on_cpu = config(1)
    on_cpu = replace(on_cpu, hardware=replace(on_cpu.hardware, accelerator=Accelerator.cpu, gpu_memory_gib=None))
    on_host = stage_memory(on_cpu, SFTConfig())
    assert on_host is not None and (on_host.capacity, on_host.host_capacity) == (25 * GIB, None)


def holding(ranks: int, share: float) -> Config:
    """GPUs that hold 4.7 GiB, activations, and so many bytes for each parameter of an 8-billion-parameter model."""
    sizes = replace(SMALL["llama"], num_layers=32, hidden_size=4096, num_heads=32, num_kv_heads=8)
    sizes = replace(sizes, intermediate_size=14336, vocab_size=128256, tied_embeddings=False)
    gib = (4.7 + share * parameter_count(sizes) / GIB) / 0.85 + 0.01
    hardware = HardwareConfig(accelerator=Accelerator.cuda, gpus_per_node=ranks, gpu_memory_gib=gib)
    memory = MemoryConfig(precision=Precision.bf16)
    model = ModelConfig(name="8b", architecture=sizes)
    return Config(stage=SFTConfig(), model=model, reward_model=model, hardware=hardware, memory=memory)


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (16.0, 1),
        (2 + 2 + 12 / 8, 1),
        (2 + 2 + 12 / 8 - 0.1, 2),
        (2 + 2 / 8 + 12 / 8, 2),
        (2 + 2 / 8 + 12 / 8 - 0.1, 3),
        (16 / 8, 3),
        (1.0, 3),
    ],
)
def test_the_first_zero_stage_that_fits_is_chosen(share: float, expected: int) -> None:
    assert choose_zero_stage(holding(8, share)) == expected
    assert choose_zero_stage(holding(1, share)) == 0
    two_machines = holding(4, share)
    assert choose_zero_stage(replace(two_machines, hardware=replace(two_machines.hardware, nodes=2))) == expected


def test_fp16_is_trained_under_zero_which_scales_its_loss() -> None:
    half = holding(1, 16.0)
    half = replace(half, memory=replace(half.memory, precision=Precision.fp16))
    assert choose_zero_stage(half) == 1
    plain = replace(half, memory=replace(half.memory, zero_stage=0))
    (problem,) = precision_problems(plain)
    assert problem.endswith("does not scale the loss of fp16 (model): use memory.zero_stage=1 or more")
    assert list(precision_problems(replace(plain, memory=replace(plain.memory, zero_stage=1)))) == []
    assert list(precision_problems(replace(plain, memory=replace(plain.memory, precision=Precision.bf16)))) == []
    (problem,) = precision_problems(
        replace(
            plain, stage=PPOConfig(), memory=replace(plain.memory, zero_stage=2, critic=RoleMemoryConfig(zero_stage=0))
        )
    )
    assert "(critic)" in problem


def test_adapters_and_packing_need_a_copy_of_the_policy_to_generate() -> None:
    plain = config(1, gib=80.0)
    adapted = replace(plain, lora=LoraConfig(rank=8))

    def copied(config: Config) -> float:
        estimate = stage_memory(config, PPOConfig())
        assert estimate is not None
        return estimate.gathered

    assert copied(plain) == 0.0  # It generates from the weights as they are.
    assert copied(replace(plain, memory=replace(plain.memory, zero_stage=3))) == 2 * LM
    assert copied(adapted) > 2 * LM
    assert copied(replace(adapted, rollout=RolloutConfig(backend=RolloutBackend.hf))) == 0.0
    on_cpu = replace(plain.hardware, accelerator=Accelerator.cpu, gpu_memory_gib=None)
    assert copied(replace(plain, hardware=on_cpu)) == 2 * LM


def test_keys_and_values_of_one_sequence_have_to_fit_beside_the_states() -> None:
    roomy = replace(config(1, gib=80.0), stage=PPOConfig(), data=DataConfig(max_prompt_length=256))
    assert list(cache_problems(roomy)) == []
    estimate = stage_memory(roomy, roomy.stage)
    assert estimate is not None
    sizes = SMALL["llama"]
    width = (sizes.num_kv_heads or 0) * (sizes.head_dim or sizes.hidden_size // sizes.num_heads)
    each = 2 * 2 * sizes.num_layers * width
    most = int(0.5 * (80 * GIB - estimate.states - estimate.reserve) / each)

    def long(length: int, **options: Any) -> list[str]:
        data = replace(roomy.data, max_response_length=length - 256)
        return list(cache_problems(replace(roomy, data=data, rollout=RolloutConfig(**options))))

    assert long(most) == []
    (problem,) = long(most + 1)
    assert problem.startswith(f"memory.zero_stage=1: the keys and values of one sequence of {most + 1} tokens take")
    assert "in stage ppo, but at most 50% of the" in problem and "lower data.max_response_length" in problem
    # Each rank has half of the heads, a copy was asked for, or it is not decoded natively.
    for options in ({"tensor_parallel": 2}, {"gather": True}, {"backend": RolloutBackend.hf}):
        assert long(most + 1, **options) == []
    # States that do not fit are told by themselves.
    small = replace(roomy.hardware, gpu_memory_gib=estimate.states / GIB)
    assert list(cache_problems(replace(roomy, hardware=small))) == []
    # Where the policy's copy is decided by itself, it is made only if keys and values fit, too.
    data = replace(roomy.data, max_response_length=most - 256)
    assert rollout_ranks(replace(roomy, data=data)) == 1
    assert rollout_ranks(replace(roomy, data=replace(data, max_response_length=most - 255))) is None


def test_every_stage_of_a_pipeline_has_to_fit() -> None:
    sft = holding(8, 2 + 2 + 12 / 8)
    assert choose_zero_stage(replace(sft, stage=PipelineConfig())) == 3  # PPO holds four such models.
    unknown = replace(sft, model=ModelConfig(name="hf"), reward_model=ModelConfig(name="hf"))
    assert choose_zero_stage(unknown) == 1
    assert stage_memory(unknown, SFTConfig()) is None
    assert list(memory_problems(replace(unknown, memory=replace(unknown.memory, zero_stage=0)))) == []


def test_what_does_not_fit_is_said_and_the_policy_is_gathered_only_if_it_does() -> None:
    tight = holding(8, 16 / 8)
    tight = replace(tight, memory=replace(tight.memory, zero_stage=3))
    assert list(memory_problems(tight)) == []
    # The whole policy takes 2 bytes more for each parameter; a part of it on each of several ranks takes less.
    slow = replace(tight, rollout=RolloutConfig(backend=RolloutBackend.hf))
    assert rollout_ranks(slow) is None
    assert rollout_ranks(replace(slow, hardware=replace(tight.hardware, gpu_memory_gib=80.0))) == 1
    assert rollout_ranks(tight) is None
    for more, ranks in ((1.0, 8), (2.0, 4)):
        roomier = replace(tight.hardware, gpu_memory_gib=(tight.hardware.gpu_memory_gib or 0.0) + more)
        assert rollout_ranks(replace(tight, hardware=roomier)) == ranks
    assert rollout_ranks(replace(tight, hardware=replace(tight.hardware, gpu_memory_gib=80.0))) == 1
    # What is whole on each rank is decoded as it is where no copy fits, rather than shared.
    adapted = replace(holding(8, 5.6), stage=PPOConfig(), lora=LoraConfig(rank=8, targets=TARGETS))
    adapted = replace(adapted, memory=replace(adapted.memory, zero_stage=1))
    assert list(memory_problems(adapted)) == []
    assert rollout_ranks(adapted) is None
    with_vllm = replace(adapted, rollout=RolloutConfig(backend=RolloutBackend.vllm))
    assert rollout_ranks(with_vllm) == 4  # vLLM has to share a copy.
    assert decodes_in_place(adapted)
    assert not decodes_in_place(tight)
    assert not decodes_in_place(replace(adapted, rollout=RolloutConfig(tensor_parallel=2)))
    first, second = rollout_problems(replace(tight, rollout=RolloutConfig(tensor_parallel=3)))
    assert first == "rollout.tensor_parallel=3: does not divide the 8 ranks of a machine"
    assert second.endswith("does not divide the model's 32 heads and 8 heads of keys and values")
    (problem,) = memory_problems(replace(tight, memory=replace(tight.memory, zero_stage=2)))
    assert problem.startswith("memory.zero_stage=2: the model states of stage sft take")
    assert problem.endswith(
        "memory=zero3 or lora=r128 or memory=zero3-offload or hardware with more or larger GPUs would help"
    )
    offloaded = replace(tight.memory, offload_optimizer=True)
    little = replace(tight, memory=offloaded, hardware=replace(tight.hardware, host_memory_gib=16.0))
    (problem,) = memory_problems(little)
    assert problem.startswith("memory.offload_optimizer=true: stage sft keeps")
    assert "but there are 2.0 GiB for each" in problem
