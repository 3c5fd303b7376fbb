"""One iteration of PPO and its variants by real engines: ratios, whitening, exports, adapters, and users' functions."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import (
    STAGES,
    TOLERANCE,
    fixed_batch,
    iterated,
    logprobs_of,
    ppo_config,
    ppo_engine,
    prompts_for,
    share_of,
    whole_inputs,
    zero,
)
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf import DeepSpeedPPOTrainer, DeepSpeedRLHFEngine
from rlhf.batch import Experience, PromptBatch, Rollout
from rlhf.config.choices import Mismatch
from rlhf.config.errors import StoppedError
from rlhf.config.policy import EmaConfig, PtxConfig, PtxMode
from rlhf.config.schema import LoraConfig, Normalize, Precision, ScorerConfig
from rlhf.engine.build import DTYPES
from rlhf.engine.distributed import all_reduce_max, all_reduce_sum, world_size
from rlhf.engine.export import export_model
from rlhf.models.load import ScalarModel, load_scalar_model
from rlhf.models.lora import AdaptersOff
from rlhf.models.tokenizer import load_tokenizer
from rlhf.rollout.advantages import Signals
from rlhf.rollout.forward import sequence_scores
from rlhf.stages.grpo.config import GRPOConfig
from rlhf.stages.ppo.config import PPOConfig
from rlhf.stages.reinforce_pp.config import ReinforcePPConfig
from rlhf.stages.rloo.config import RLOOConfig

ADAPTERS = LoraConfig(rank=4, alpha=8.0, targets=["q_proj", "v_proj", "fc1"])


def export_both(engine: DeepSpeedRLHFEngine, folder: Path, to: Path) -> None:
    """Write actor and critic as the stage does."""
    tokenizer = load_tokenizer(folder / "policy")
    export_model(engine.actor, engine.actor_model, tokenizer, to / "actor" / "model")
    classifier = engine.critic_model.classifier
    export_model(engine.critic, classifier, tokenizer, to / "critic" / "model", prefix=ScalarModel.prefix)


def differ(one: Tensor, other: Tensor) -> float:
    """The largest difference."""
    return float((one.float() - other.float()).abs().max())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.ranks(2)
def test_the_first_ratio_is_one_and_exports_compute_what_was_trained(
    folder: Path, tmp_path: Path, stage: int, precision: str
) -> None:
    kind = Precision[precision]
    engine = ppo_engine(folder, config := ppo_config(memory=zero(stage, kind)))
    prompts = prompts_for(load_tokenizer(folder / "policy"))
    experience, metrics = iterated(DeepSpeedPPOTrainer(engine=engine, args=config), prompts)
    # Exactly, in bf16, too: the pass before it had the same micro-batches.
    assert metrics["actor/first_ratio_error"] == 0.0
    check_whitened(experience)
    export_both(engine, folder, tmp_path)
    trained = logprobs_of(engine.actor, experience, engine.vocab_limit)
    assert differ(trained, experience.old_logprobs) > 1e-3  # Or the ratio would always be one.
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "actor" / "model", dtype=DTYPES[kind]).eval()
    assert differ(trained, logprobs_of(plain, experience, engine.vocab_limit)) <= TOLERANCE[kind]
    error = critic_error(engine, experience, tmp_path / "critic" / "model", DTYPES[kind])
    assert error <= 2 * TOLERANCE[kind]
    with torch.no_grad():
        mask = experience.rollout.attention_mask
        trained, start = (
            sequence_scores(each, experience.sequence_ids, mask) for each in (engine.critic, engine.rewards[0].engine)
        )
    assert differ(trained, start) > 5 * error  # Or exporting what it started from would pass.


def check_whitened(experience: Experience) -> None:
    """The mean of the advantages over both ranks is zero."""
    total = all_reduce_sum(experience.advantages[experience.response_mask].sum())
    assert abs(float(total / all_reduce_sum(experience.response_mask.sum().float()))) < 1e-5


def critic_error(engine: DeepSpeedRLHFEngine, experience: Experience, directory: Path, dtype: torch.dtype) -> float:
    """How far scores are from an exported classifier's, one by one and without padding, as a user would call it."""
    classifier = AutoModelForSequenceClassification.from_pretrained(directory, dtype=dtype).eval()
    mask = experience.rollout.attention_mask
    with torch.no_grad():
        scores = sequence_scores(engine.critic, experience.sequence_ids, mask)
        rows = zip(experience.sequence_ids, mask, scores, strict=True)
        return max(differ(classifier(ids[real].unsqueeze(0)).logits[0, 0], score) for ids, real, score in rows)


@pytest.mark.ranks(2)
def test_a_reward_model_with_another_tokenizer_scores_the_text(folder: Path) -> None:
    tokenizer, other = load_tokenizer(folder / "policy"), load_tokenizer(folder / "other_reward")
    config = ppo_config(memory=zero(3))
    config.scorer.normalize = Normalize.off  # That reward model was not trained here: no statistics are stored with it.
    given = {"critic_model_name_or_path": str(folder / "other_reward"), "reward_tokenizer": other}
    trainer = DeepSpeedPPOTrainer(engine=ppo_engine(folder, config, **given), args=config)
    prompts = prompts_for(tokenizer)
    texts = [tokenizer.decode(ids[mask]) for ids, mask in zip(prompts.prompt_ids, prompts.prompt_mask, strict=True)]
    records = tuple({"messages": [{"role": "user", "content": text}], "source": "test"} for text in texts)
    prompts = replace(prompts, records=records)
    experience, metrics = iterated(trainer, prompts)
    assert metrics["actor/first_ratio_error"] <= 1e-5
    scores = trainer.scorer(prompts, experience.rollout)
    assert float(scores.std()) > 1e-3  # Or a constant would pass.
    classifier = AutoModelForSequenceClassification.from_pretrained(folder / "other_reward", dtype=torch.float32).eval()
    responses = zip(texts, experience.rollout.response_ids, experience.response_mask, scores, strict=True)
    for text, ids, mask, score in responses:
        real = ids[mask]
        ended = bool(real[-1] == tokenizer.eos_token_id)
        answer = tokenizer.decode(real, skip_special_tokens=True).strip()
        whole = f"<|user|> {text} <|assistant|> {answer}{' </s>' if ended else ''}"
        with torch.no_grad():
            plain = classifier(torch.tensor([other(whole)["input_ids"]])).logits[0, 0]
        assert differ(plain, score) < 1e-5


def trained_names(module: Any) -> set[str]:
    """The modules whose parameters an optimizer moves: of an adapter `default`, as in lora_A.default.weight."""
    return {name.split(".")[-2] for name, parameter in module.named_parameters() if parameter.requires_grad}


ADAPTED = [*((stage, "fp32", True) for stage in STAGES), (3, "bf16", True), (3, "fp32", False)]


@pytest.mark.parametrize(("stage", "precision", "alone"), ADAPTED)
@pytest.mark.ranks(2)
def test_adapters_are_trained_and_merged_and_the_reference_is_the_actor_without_them(
    folder: Path, tmp_path: Path, stage: int, precision: str, alone: bool
) -> None:
    kind = Precision[precision]
    dtype, tolerance = DTYPES[kind], TOLERANCE[kind]
    config = ppo_config(memory=zero(stage, kind), lora=replace(ADAPTERS, only_lora=alone))
    engine, tokenizer = ppo_engine(folder, config), load_tokenizer(folder / "policy")
    # Norms and embeddings can be trained beside adapters; the reference is then a copy.
    beside = set() if alone else {"final_layer_norm", "self_attn_layer_norm", "embed_positions", "embed_tokens"}
    assert trained_names(engine.actor.module) == {"default", *beside}
    assert trained_names(engine.critic.module) == {"default", "score", *beside}
    assert isinstance(engine.reference, AdaptersOff) == alone
    experience, metrics = iterated(DeepSpeedPPOTrainer(engine=engine, args=config), prompts_for(tokenizer))
    assert metrics["actor/first_ratio_error"] <= tolerance

    def logprobs(model: Any) -> Tensor:
        return logprobs_of(model, experience, engine.vocab_limit)

    base = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=dtype).eval()
    trained = logprobs(engine.actor)
    assert differ(logprobs(engine.reference), logprobs(base)) <= tolerance
    assert differ(trained, experience.old_logprobs) > 5 * tolerance
    export_both(engine, folder, tmp_path)
    # In bf16 the sum of a weight and its adapter is rounded once more.
    rounded = 5e-2 if kind is Precision.bf16 else 1e-5
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "actor" / "model", dtype=dtype).eval()
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "actor" / "adapter")).eval()
    assert differ(trained, logprobs(merged)) <= rounded
    assert differ(trained, logprobs(adapted)) <= rounded
    check_critic(engine, experience, folder, tmp_path / "critic" / "model", kind, tolerance=2 * rounded)


def check_critic(
    engine: DeepSpeedRLHFEngine, experience: Experience, folder: Path, to: Path, kind: Precision, *, tolerance: float
) -> None:
    """The merged critic computes what the trained one does, and not what it started from."""
    tokenizer, mask = load_tokenizer(folder / "policy"), experience.rollout.attention_mask
    start, merged = (
        load_scalar_model(path, tokenizer, dtype=DTYPES[kind], attention="sdpa").eval()
        for path in (folder / "reward", to)
    )
    with torch.no_grad():
        values = engine.critic(**whole_inputs(experience))
        error = differ(values[mask], merged(**whole_inputs(experience))[mask])
        assert error <= tolerance
        assert differ(values[mask], start(**whole_inputs(experience))[mask]) > 5 * error


def high_ids(prompts: PromptBatch, rollout: Rollout) -> Tensor:
    """A scorer of a user's own: high ids are good."""
    return (rollout.response_ids * rollout.response_mask).sum(dim=1).float() / 100


def discounted(signals: Signals) -> tuple[Tensor, Tensor]:
    """An estimator of a user's own: the score less the group's, at every token."""
    groups = signals.scores.view(-1, signals.group_size)
    advantages = (groups - groups.mean(dim=1, keepdim=True)).reshape(-1, 1).expand(signals.mask.shape)
    return torch.where(signals.mask, advantages, 0.0), torch.zeros_like(signals.rewards)


def sizes() -> dict[str, Any]:
    """What the variants have in common with PPO."""
    stage = ppo_config(memory=zero(0)).stage
    names = ("rollout_batch_size", "mini_batch_size", "micro_batch_size_per_gpu", "optimizer")
    return {name: getattr(stage, name) for name in names}


def varied(
    folder: Path, stage: PPOConfig, *, zero_stage: int, own: bool = False
) -> tuple[DeepSpeedPPOTrainer, PromptBatch, Experience, dict[str, float]]:
    """One iteration of a variant, with a user's own functions or not."""
    tokenizer = load_tokenizer(folder / "policy")
    config = replace(ppo_config(memory=zero(zero_stage)), stage=stage)
    if own:
        config = replace(config, scorer=ScorerConfig(kind="function", clip=None, missing_eos_penalty=0.0))
    options: dict[str, Any] = {"num_total_iters": stage.num_steps}
    if own:
        options["critic_model_name_or_path"] = None
    engine = ppo_engine(folder, config, **options)
    given: dict[str, Callable[..., Any]] = {"scorer": high_ids, "advantage": discounted} if own else {}
    texts = share_of(fixed_batch(tokenizer)).rows(slice(0, stage.ptx_batch_size // world_size()))
    trainer = DeepSpeedPPOTrainer(engine=engine, args=config, pretraining=iter(lambda: texts, None), **given)
    prompts = prompts_for(tokenizer)
    prompts = prompts.rows(slice(0, len(prompts) // stage.group_size))
    return trainer, prompts, *iterated(trainer, prompts)


def group_means(experience: Experience, size: int) -> Tensor:
    """The mean advantage of each prompt's responses."""
    return experience.advantages[:, 0].view(-1, size).mean(dim=1)


VARIANTS: dict[str, tuple[Callable[[], PPOConfig], int, int]] = {
    "grpo": (
        lambda: GRPOConfig(
            **sizes(), group_size=2, ema=EmaConfig(decay=0.9), ptx=PtxConfig(coef=0.5, mode=PtxMode.grad_ratio)
        ),
        2,
        3,
    ),
    "rloo": (lambda: RLOOConfig(**sizes(), group_size=4), 4, 1),
    "reinforce_pp": (lambda: ReinforcePPConfig(**sizes()), 1, 1),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.ranks(2)
def test_variants_share_the_loop_and_need_no_critic(folder: Path, name: str) -> None:
    stage, size, zero_stage = VARIANTS[name]
    trainer, _, experience, metrics = varied(folder, stage(), zero_stage=zero_stage)
    assert len(experience) == 4
    assert trainer.engine.critic is None and len(trainer.engine.rewards) == 1
    prompt_ids = experience.sequence_ids[:, : experience.prompt_mask.shape[1]]
    assert torch.equal(prompt_ids[0], prompt_ids[size - 1])
    assert float(experience.advantages.std()) > 1e-2
    assert metrics["actor/first_ratio_error"] == 0.0
    assert trainer.engine.actor.module.get_output_embeddings().direct  # It answered itself, also under ZeRO-3.
    if size > 1:
        assert float(group_means(experience, size).abs().max()) < 1e-5
    if name == "grpo":
        assert metrics["ptx/loss"] > 1.0
        assert trainer.engine.average is not None and trainer.engine.average.steps == 2
        # Two steps: the weight follows the running means of the norms, which the metrics are close to.
        ratio = metrics["ptx/policy_grad_norm"] / metrics["ptx/grad_norm"]
        assert trainer.ptx_ratio is not None
        assert trainer.ptx_ratio.weight == pytest.approx(0.5 * ratio, rel=0.5)


@pytest.mark.ranks(2)
def test_a_users_scorer_and_estimator_replace_ours(folder: Path) -> None:
    stage = GRPOConfig(**sizes(), group_size=2)
    trainer, prompts, experience, _ = varied(folder, stage, zero_stage=0, own=True)
    assert trainer.engine.rewards == []
    assert torch.equal(experience.scores, high_ids(prompts, experience.rollout))
    assert float(group_means(experience, 2).abs().max()) < 1e-5
    assert float(experience.advantages.std()) > 1e-2


@pytest.mark.parametrize("action", list(Mismatch))
@pytest.mark.ranks(2)
def test_generation_that_disagrees_with_training_is_reported_replaced_or_ends_the_run(
    folder: Path, action: Mismatch
) -> None:
    config = ppo_config(memory=zero(0))
    # A tolerance that nothing could meet.
    rollout = replace(config.rollout, mismatch=action, mismatch_tolerance=1e-12, importance_cap=2.0)
    trainer = DeepSpeedPPOTrainer(engine=ppo_engine(folder, config), args=replace(config, rollout=rollout))
    prompts = prompts_for(load_tokenizer(folder / "policy"))
    if action is Mismatch.stop:
        with pytest.raises(StoppedError, match=r"rollout\.mismatch_tolerance"):
            trainer.generate_experience(prompts)
        return
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        trainer.generate_experience(prompts)
    (said,) = [str(each.message) for each in warned if "mismatch_tolerance" in str(each.message)]
    replaced = action is Mismatch.hf
    assert ("so that rollout.importance_cap does nothing" in said) == replaced
    assert trainer.generator.native == trainer.generator.gives_logprobs == (not replaced)
    metrics = trainer.metrics.flush(all_reduce_sum, all_reduce_max)
    assert metrics["rollout/importance_weight"] == pytest.approx(1.0, abs=1e-5)
