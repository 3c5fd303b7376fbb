"""Further facts that `worker.py` collects on each rank: weight averages, mixed objectives, and PPO's variants."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf import DeepSpeedPPOTrainer, DeepSpeedRLHFEngine
from rlhf.batch import PromptBatch, Rollout, SFTBatch
from rlhf.config.errors import ConfigError
from rlhf.config.policy import EmaConfig, PtxConfig, PtxMode
from rlhf.config.roles import Role
from rlhf.config.schema import Config, MemoryConfig, Precision, ScorerConfig
from rlhf.engine.build import DTYPES, build_engine, partitioned_loading
from rlhf.engine.distributed import all_reduce_max, all_reduce_sum, rank, seed_everything, world_size
from rlhf.engine.ema import WeightAverage
from rlhf.engine.export import export_model
from rlhf.engine.update import Objective, optimizer_step
from rlhf.models.load import load_causal_lm
from rlhf.models.tokenizer import load_tokenizer
from rlhf.rollout.advantages import Signals
from rlhf.rollout.forward import next_token_loss
from rlhf.stages.grpo.config import GRPOConfig
from rlhf.stages.ppo.config import PPOConfig
from rlhf.stages.reinforce_pp.config import ReinforcePPConfig
from rlhf.stages.rloo.config import RLOOConfig

DECAY, START = 0.7, 1


def share_of(batch: SFTBatch) -> SFTBatch:
    """This rank's rows."""
    size = len(batch) // world_size()
    return batch.rows(slice(rank() * size, (rank() + 1) * size))


def policy_engine(folder: Path, role: Role, memory: MemoryConfig) -> tuple[Any, Any]:
    """The miniature policy and its engine."""
    tokenizer = load_tokenizer(folder / "policy")
    with partitioned_loading(role, memory=memory, ranks=world_size()):
        model = load_causal_lm(folder / "policy", tokenizer, dtype=DTYPES[memory.precision], attention="eager")
    return model, build_engine(model, role, memory=memory, ranks=world_size(), total_steps=10)


def masters(engine: Any) -> dict[str, Tensor]:
    """The whole fp32 weights, by DeepSpeed's own reading of them where it has one."""
    copied_groups = getattr(engine.optimizer, "fp32_groups", [])
    groups = zip(engine.optimizer.fp16_groups if copied_groups else [], copied_groups, strict=True)
    copies = {id(own): copy for group, copied in groups for own, copy in zip(group, copied, strict=True)}
    found = {}
    for name, parameter in engine.module.named_parameters():
        whole = copies.get(id(parameter), safe_get_full_fp32_param(parameter))
        found[name] = (parameter if whole is None else whole).detach().clone()
    return found


def ema_facts(folder: Path, memory: MemoryConfig, role: Role, batch: SFTBatch) -> dict[str, float]:
    """The sharded average against one of the whole weights, computed in the plainest way after every step."""
    tokenizer = load_tokenizer(folder / "policy")
    model, engine = policy_engine(folder, role, memory)
    average = WeightAverage(engine, decay=DECAY, start_step=START)
    plain = masters(engine)

    def loss_sum(part: SFTBatch) -> Tensor:
        return next_token_loss(engine, part, vocab_limit=len(tokenizer))

    for step in range(1, 5):
        parts = share_of(batch).split(role.micro_batch_size_per_gpu)
        optimizer_step(engine, Objective(micro_batches=parts, loss_sum=loss_sum, num_targets=100.0))
        average.update()
        now = masters(engine)
        plain = now if step <= START else {name: DECAY * old + (1 - DECAY) * now[name] for name, old in plain.items()}

    def logits() -> Tensor:
        with torch.no_grad():
            mine = share_of(batch)
            result: Tensor = engine(input_ids=mine.sequence_ids, attention_mask=mine.attention_mask).logits
            return result.float().clone()

    export_model(engine, model, tokenizer, folder / "own")
    before = logits()
    with average.in_place():
        inside = logits()
        export_model(engine, model, tokenizer, folder / "average")
    after = logits()
    try:
        with average.in_place():
            raise KeyError
    except KeyError:
        after_error = logits()
    written = AutoModelForCausalLM.from_pretrained(folder / "average", dtype=torch.float32).state_dict()
    dtype = DTYPES[memory.precision]
    errors = [float((written[name] - value.to(dtype).float()).abs().max()) for name, value in plain.items()]
    trained = AutoModelForCausalLM.from_pretrained(folder / "own", dtype=torch.float32).state_dict()
    numel = sum(value.numel() for value in plain.values())
    resumed = WeightAverage(engine, decay=DECAY)
    resumed.load_state_dict(average.state_dict())
    return {
        "error": max(errors),
        "lag": max(float((trained[name] - value).abs().max()) for name, value in plain.items()),
        "inside_moved": float((inside - before).abs().max()),
        "restored": float(torch.equal(before, after) and torch.equal(before, after_error)),
        "bytes_per_parameter": float(all_reduce_sum(torch.tensor(float(average.num_bytes)))) / numel,
        "own_share": average.num_bytes / (4 * numel),
        "resumed": float(resumed.steps == 4 and resumed.num_bytes == average.num_bytes),
    }


def plain_norms(folder: Path, batch: SFTBatch, num_targets: tuple[float, float]) -> list[float]:
    """Norms of the gradients of the first and the second half of all ranks' rows, computed in one process."""
    tokenizer = load_tokenizer(folder / "policy")
    share = len(batch) // world_size()
    norms = []
    for half, targets in enumerate(num_targets):
        model = load_causal_lm(folder / "policy", tokenizer, dtype=torch.float32, attention="eager")
        for start in range(half * share // 2, len(batch), share):
            rows = batch.rows(slice(start, start + share // 2))
            (next_token_loss(model, rows, vocab_limit=len(tokenizer)) / targets).backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))
    return norms


def mixed_facts(folder: Path, memory: MemoryConfig, role: Role, batch: SFTBatch) -> dict[str, float]:
    """One objective over eight rows against two over four rows each, one of half the targets and half the weight."""
    tokenizer = load_tokenizer(folder / "policy")
    mine = share_of(batch)
    targets = float(batch.loss_mask[:, 1:].sum())
    results = []
    for mixed in (False, True):
        model, engine = policy_engine(folder, role, memory)

        def loss_sum(part: SFTBatch, engine: Any = engine) -> Tensor:
            return next_token_loss(engine, part, vocab_limit=len(tokenizer))

        parts = mine.split(role.micro_batch_size_per_gpu)
        half = len(parts) // 2
        whole = [Objective(micro_batches=parts, loss_sum=loss_sum, num_targets=targets)]
        halves = [
            Objective(micro_batches=parts[:half], loss_sum=loss_sum, num_targets=targets),
            Objective(micro_batches=parts[half:], loss_sum=loss_sum, num_targets=targets / 2, weight=0.5),
        ]
        steps = [optimizer_step(engine, *(halves if mixed else whole)) for _ in range(2)]
        # Afterwards the engine accumulates as ever.
        optimizer_step(engine, *whole)
        export_model(engine, model, tokenizer, folder / f"mixed-{mixed}")
        results.append(
            AutoModelForCausalLM.from_pretrained(folder / f"mixed-{mixed}", dtype=torch.float32).state_dict()
        )
    plain = plain_norms(folder, batch, (targets, targets / 2))
    return {
        "difference": max(float((value - results[1][name]).abs().max()) for name, value in results[0].items()),
        "norm_error": max(abs(own / norm - 1) for own, norm in zip(steps[0].own_norms, plain, strict=True)),
        "norms_apart": abs(plain[0] / plain[1] - 1),
    }


def high_ids(prompts: PromptBatch, rollout: Rollout) -> Tensor:
    """A scorer of a user's own: high ids are good."""
    return (rollout.response_ids * rollout.response_mask).sum(dim=1).float() / 100


def discounted(signals: Signals) -> tuple[Tensor, Tensor]:
    """An estimator of a user's own: the score less the group's, at every token."""
    groups = signals.scores.view(-1, signals.group_size)
    advantages = (groups - groups.mean(dim=1, keepdim=True)).reshape(-1, 1).expand(signals.mask.shape)
    return torch.where(signals.mask, advantages, 0.0), torch.zeros_like(signals.rewards)


def variant_facts(
    folder: Path, config: Config, prompts: PromptBatch, batch: SFTBatch, *, stage: PPOConfig, own: bool = False
) -> dict[str, float]:
    """One iteration of a variant, with an average and a pretraining mix, and with a user's own functions."""
    tokenizer = load_tokenizer(folder / "policy")
    config = replace(config, stage=stage, scorer=replace(config.scorer, kind="function") if own else config.scorer)
    engine = DeepSpeedRLHFEngine(
        actor_model_name_or_path=str(folder / "policy"),
        critic_model_name_or_path=None if own else str(folder / "reward"),
        tokenizer=tokenizer,
        num_total_iters=stage.num_steps,
        args=config,
    )
    given: dict[str, Callable[..., Any]] = {"scorer": high_ids, "advantage": discounted} if own else {}
    texts = iter(lambda: share_of(batch).rows(slice(0, stage.ptx_batch_size // world_size())), None)
    trainer = DeepSpeedPPOTrainer(engine=engine, args=config, pretraining=texts, **given)
    seed_everything(11 + rank())
    experience = trainer.generate_experience(prompts.rows(slice(0, len(prompts) // stage.group_size)))
    trainer.train_rlhf(experience)
    metrics = trainer.metrics.flush(all_reduce_sum, all_reduce_max)
    groups = experience.advantages[:, 0].view(-1, stage.group_size)
    prompt_ids = experience.sequence_ids[:, : experience.prompt_mask.shape[1]]
    return {
        "rows": float(len(experience)),
        "same_prompt": float(torch.equal(prompt_ids[0], prompt_ids[stage.group_size - 1])),
        "critic": float(engine.critic is not None),
        "rewards": float(len(engine.rewards)),
        "group_mean": float(groups.mean(dim=1).abs().max()),
        "spread": float(experience.advantages.std()),
        "first_ratio_error": metrics["actor/first_ratio_error"],
        "ptx_loss": metrics.get("ptx/loss", -1.0),
        "ptx_weight": trainer.ptx_ratio.weight if trainer.ptx_ratio is not None else 0.0,
        "norms": metrics.get("ptx/policy_grad_norm", 0.0) / metrics.get("ptx/grad_norm", 1.0),
        "direct": float(engine.actor.module.get_output_embeddings().direct),
        "averaged": float(engine.average.steps) if engine.average is not None else 0.0,
        "score_error": float((experience.scores - high_ids(prompts, experience.rollout)).abs().max()) if own else 0.0,
    }


def collect(folder: Path, config: Config, prompts: PromptBatch, batch: SFTBatch, role: Role) -> dict[str, Any]:
    """All facts; `config` is that of a small PPO run."""
    facts: dict[str, Any] = {}
    single = replace(role, micro_batch_size_per_gpu=1)
    for stage in (0, 1, 2, 3):
        memory = replace(config.memory, zero_stage=stage)
        facts[f"ema_zero{stage}_fp32"] = ema_facts(folder, memory, role, batch)
        facts[f"mixed_zero{stage}"] = mixed_facts(folder, memory, single, batch)
    for stage in (0, 3):
        memory = replace(config.memory, zero_stage=stage, precision=Precision.bf16)
        facts[f"ema_zero{stage}_bf16"] = ema_facts(folder, memory, role, batch)
    facts["fp16"] = float(get_accelerator().is_fp16_supported())
    for stage in (1, 2, 3) if facts["fp16"] else ():
        memory = replace(config.memory, zero_stage=stage, precision=Precision.fp16)
        facts[f"ema_zero{stage}_fp16"] = ema_facts(folder, memory, role, batch)
        facts[f"mixed_zero{stage}_fp16"] = mixed_facts(folder, memory, single, batch)
    try:
        policy_engine(folder, role, replace(config.memory, zero_stage=0, precision=Precision.fp16))
    except ConfigError as error:
        facts["fp16_refused"] = str(error)
    options: dict[str, Any] = {
        name: getattr(config.stage, name)
        for name in ("rollout_batch_size", "mini_batch_size", "micro_batch_size_per_gpu", "optimizer")
    }
    facts["mixed_offload"] = mixed_facts(
        folder, replace(config.memory, zero_stage=3, offload_optimizer=True), single, batch
    )
    extras = {"ema": EmaConfig(decay=0.9), "ptx": PtxConfig(coef=0.5, mode=PtxMode.grad_ratio)}
    stages = {
        "grpo": GRPOConfig(**options | extras, group_size=2),
        "rloo": RLOOConfig(**options, group_size=4),
        "reinforce_pp": ReinforcePPConfig(**options),
    }
    for name, variant in stages.items():
        zero = replace(config, memory=replace(config.memory, zero_stage=3 if name == "grpo" else 1))
        facts[name] = variant_facts(folder, zero, prompts, batch, stage=variant)
    unscored = replace(config, scorer=ScorerConfig(clip=None, missing_eos_penalty=0.0))
    facts["own"] = variant_facts(folder, unscored, prompts, batch, stage=GRPOConfig(**options, group_size=2), own=True)
    return facts
