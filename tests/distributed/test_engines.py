"""What real DeepSpeed engines compute, on one and two CPU ranks, under every ZeRO stage."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

STAGES = (0, 1, 2, 3)
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}


def test_padding_does_not_change_logits(two_ranks: dict[str, Any]) -> None:
    assert two_ranks["padding_error"] < 1e-5


def test_micro_batches_and_accumulation_give_the_same_update(two_ranks: dict[str, Any]) -> None:
    assert two_ranks["moved"] > 1e-2  # three steps of 1e-2
    assert two_ranks["micro_1_difference"] < 2e-5
    assert two_ranks["micro_2_difference"] < 2e-5


def test_one_rank_gives_the_same_update_as_two(
    folder: Path, one_rank: dict[str, Any], two_ranks: dict[str, Any]
) -> None:
    assert one_rank["micro_1_difference"] < 2e-5
    alone, first, second = (
        torch.load(folder / f"weights-{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1")
    )
    for name, value in alone.items():
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
        torch.testing.assert_close(value, first[name], rtol=0, atol=2e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_zero_stage_gives_the_same_update(two_ranks: dict[str, Any], stage: int) -> None:
    assert two_ranks[f"zero_{stage}_difference"] < 2e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_ratio_is_one_on_the_first_mini_batch(two_ranks: dict[str, Any], stage: int, precision: str) -> None:
    facts = two_ranks[f"ppo_zero{stage}_{precision}"]
    # Exactly, in bf16, too: the pass before it had the same micro-batches.
    assert facts["first_ratio_error"] == 0.0
    assert facts["actor_moved"] > 1e-3  # or the ratio would always be one


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_exported_models_equal_the_trained_ones(two_ranks: dict[str, Any], stage: int, precision: str) -> None:
    facts = two_ranks[f"ppo_zero{stage}_{precision}"]
    assert facts["actor_export_error"] <= TOLERANCE[precision]
    assert facts["critic_export_error"] <= 2 * TOLERANCE[precision]
    assert facts["critic_moved"] > 5 * facts["critic_export_error"]  # or exporting what it started from would pass
    assert abs(facts["advantage_mean"]) < 1e-5  # whitened over both ranks


def test_a_reward_model_with_another_tokenizer_scores_the_text(two_ranks: dict[str, Any]) -> None:
    facts = two_ranks["retokenised"]
    assert facts["score_error"] < 1e-5
    assert facts["spread"] > 1e-3  # or a constant would pass
    assert facts["ratio_error"] <= 1e-5


@pytest.mark.parametrize("name", ["lora_zero0", "lora_zero1", "lora_zero2", "lora_zero3", "lora_zero3_bf16"])
def test_adapters_are_trained_and_the_reference_is_the_actor_without_them(two_ranks: dict[str, Any], name: str) -> None:
    facts = two_ranks[name]
    tolerance = TOLERANCE["bf16" if name.endswith("bf16") else "fp32"]
    assert facts["trained"] == ["default"]  # …lora_A.default.weight
    assert facts["critic_trained"] == ["default", "score"]
    assert facts["engines"] == 1.0
    assert facts["first_ratio_error"] <= tolerance
    assert facts["reference_error"] <= tolerance
    assert facts["actor_moved"] > 5 * tolerance


def test_norms_and_embeddings_can_be_trained_beside_adapters_and_the_reference_is_then_a_copy(
    two_ranks: dict[str, Any],
) -> None:
    facts = two_ranks["lora_whole"]
    norms = {"final_layer_norm", "self_attn_layer_norm"}
    assert set(facts["trained"]) == {"default", "embed_positions", "embed_tokens", *norms}
    assert set(facts["critic_trained"]) == {*facts["trained"], "score"}
    assert facts["engines"] == 0.0
    assert facts["reference_error"] <= TOLERANCE["fp32"]
    assert facts["actor_moved"] > 5 * TOLERANCE["fp32"]


@pytest.mark.parametrize(
    "name", ["lora_zero0", "lora_zero1", "lora_zero2", "lora_zero3", "lora_zero3_bf16", "lora_whole"]
)
def test_merged_models_and_adapters_compute_what_training_did(two_ranks: dict[str, Any], name: str) -> None:
    facts = two_ranks[name]
    # In bf16 the sum of a weight and its adapter is rounded once more.
    tolerance = 5e-2 if name.endswith("bf16") else 1e-5
    assert facts["merged_error"] <= tolerance
    assert facts["adapter_error"] <= tolerance
    assert facts["critic_merged_error"] <= 2 * tolerance
    assert facts["critic_moved"] > 5 * facts["critic_merged_error"]


def test_layer_by_layer_generation_gives_the_same_answers(two_ranks: dict[str, Any]) -> None:
    assert two_ranks["layerwise"]["tokens"] > 10
    assert two_ranks["layerwise"]["same"] == 1.0
    assert two_ranks["layerwise"]["falls_back"] == 1.0
    assert two_ranks["layerwise"]["refused"] == 1.0


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_native_decoding_gives_the_tokens_of_transformers(two_ranks: dict[str, Any], stage: int, adapted: bool) -> None:
    facts = two_ranks[f"native_zero{stage}{'_lora' if adapted else ''}"]
    assert facts["tokens"] > 10
    assert facts["same"] == 1.0
    assert facts["logprob_error"] < 1e-4  # Training computes what was sampled from.
    assert facts["further_bytes_native"] == facts["further_bytes_hf"] == 0.0
    assert facts["restored"] == 1.0  # Adapters are merged into a copy.
    if stage < 3:
        assert facts["in_place"] == 1.0  # Or not, where none fits.
        assert facts["by_torch"] == 1.0  # Or there is no compiler.
    else:
        assert facts["alike_by_1"] == facts["alike_by_20000"] == 1.0
        assert facts["shared_alike"] == facts["shared_same"] == facts["shared_partitioned"] == 1.0
        assert facts["shared_nested"] == 1.0
        assert facts["shared_mapped"] == 1.0
        # What adapters are merged into replaces what they share, and so does a copy for torch's operations.
        assert (facts["shared_kept"] > 0) == (shutil.which("g++") is not None and not adapted)
        assert facts["shared_left"] == 0.0
    if adapted:
        assert facts["reference_same"] == 1.0
        assert facts["reference_differs"] == 1.0


def test_weights_are_whole_whatever_deepspeed_has_made_of_them(two_ranks: dict[str, Any]) -> None:
    facts = two_ranks["prefetched"]
    assert facts["sent_states"] == facts["shared_states"] == 3.0  # Partitioned, on their way, and whole.
    assert facts["sent_alike"] == facts["shared_alike"] == facts["interrupted"] == 1.0
    assert two_ranks["padded"] == {"alike": 1.0, "left": 0.0, "partitioned": 1.0}


@pytest.mark.parametrize("name", ["zero0", "zero3", "zero3_lora"])
def test_ranks_that_share_the_weights_give_the_same_tokens(two_ranks: dict[str, Any], name: str) -> None:
    facts = two_ranks[f"parallel_{name}"]
    assert facts["tokens"] > 10
    assert facts["same"] == 1.0
    assert facts["logprob_error"] < 1e-5


def test_generation_that_disagrees_with_training_is_reported_replaced_or_ends_the_run(
    two_ranks: dict[str, Any],
) -> None:
    facts = dict(two_ranks["gate"])
    assert facts.pop("weight_error") < 1e-5
    assert (facts.pop("warn_logprobs"), facts.pop("hf_logprobs")) == (1.0, 0.0)
    assert facts == {"warn_said": 1.0, "warn_native": 1.0, "hf_said": 1.0, "hf_native": 0.0, "stopped": 1.0}


def test_a_family_that_is_not_known_is_answered_by_transformers(two_ranks: dict[str, Any]) -> None:
    assert two_ranks["fallback"] == {"said": 1.0, "same": 1.0}


def test_a_cache_that_does_not_fit_is_refused_by_all_ranks_that_decode_together(two_ranks: dict[str, Any]) -> None:
    assert two_ranks["room"] == {"refused_1": 1.0, "refused_2": 2.0}


def test_texts_end_responses_and_the_cache_is_given_back(two_ranks: dict[str, Any]) -> None:
    expected = {"same": 1.0, "cut": 1.0, "shorter": 1.0, "kept": 1.0, "left": 0.0, "again": 1.0}
    assert two_ranks["stops"] == expected


@pytest.mark.parametrize("stage", [1, 3])
def test_a_response_depends_on_its_own_stream_alone(two_ranks: dict[str, Any], stage: int) -> None:
    assert two_ranks[f"neighbours_zero{stage}"] == {"same": 1.0, "seed_differs": 1.0, "rows_differ": 1.0}


def test_states_in_the_hosts_memory_change_nothing(two_ranks: dict[str, Any]) -> None:
    assert two_ranks["offload_difference"] < 2e-5


@pytest.mark.parametrize("name", [f"ema_zero{stage}_fp32" for stage in STAGES] + [f"ema_zero{n}_bf16" for n in (0, 3)])
def test_a_sharded_average_equals_one_of_the_whole_weights(two_ranks: dict[str, Any], name: str) -> None:
    facts = two_ranks[name]
    # The model is written in its own format: in bf16 two averages that differ in fp32's last bit may round apart.
    assert facts["error"] <= (1e-6 if name.endswith("fp32") else 4e-3)
    assert facts["lag"] > 1e-2  # or the weights themselves would pass
    assert facts["inside_moved"] > 1e-3 and facts["restored"] == 1.0
    assert facts["bytes_per_parameter"] == pytest.approx(4.0)
    assert 0.3 < facts["own_share"] < 0.7
    assert facts["resumed"] == 1.0


@pytest.mark.parametrize("name", [*(f"mixed_zero{stage}" for stage in STAGES), "mixed_offload"])
def test_objectives_are_added_by_their_weights_and_measured_apart(two_ranks: dict[str, Any], name: str) -> None:
    facts = two_ranks[name]
    assert facts["difference"] < 2e-5
    assert facts["norm_error"] < 1e-4
    assert facts["norms_apart"] > 0.1  # or they could be mistaken for one another


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_scales_its_loss_and_gives_nearly_the_same(two_ranks: dict[str, Any], stage: int) -> None:
    if not two_ranks["fp16"]:
        pytest.skip("this processor does not compute in fp16")
    mixed, average = two_ranks[f"mixed_zero{stage}_fp16"], two_ranks[f"ema_zero{stage}_fp16"]
    assert mixed["norm_error"] < 2e-3  # Without the scale, as in fp32.
    assert mixed["difference"] < 2e-2
    assert average["error"] <= 1e-3 and average["lag"] > 1e-2 and average["resumed"] == 1.0


def test_fp16_without_zero_is_refused(two_ranks: dict[str, Any]) -> None:
    assert "does not scale the loss of fp16: use memory.zero_stage=1 or more" in two_ranks["fp16_refused"]


@pytest.mark.parametrize(("name", "size"), [("grpo", 2), ("rloo", 4), ("reinforce_pp", 1)])
def test_variants_share_the_loop_and_need_no_critic(two_ranks: dict[str, Any], name: str, size: int) -> None:
    facts = two_ranks[name]
    assert (facts["rows"], facts["critic"], facts["rewards"]) == (4.0, 0.0, 1.0)
    assert facts["same_prompt"] == 1.0 and facts["spread"] > 1e-2
    assert facts["first_ratio_error"] == 0.0
    assert facts["direct"] == 1.0  # The output layer answered itself, also under ZeRO-3.
    if size > 1:
        assert facts["group_mean"] < 1e-5
    if name == "grpo":
        assert facts["ptx_loss"] > 1.0 and facts["averaged"] == 2.0
        # Two steps: the weight follows the running means of the norms, which the metrics are close to.
        assert facts["ptx_weight"] == pytest.approx(0.5 * facts["norms"], rel=0.5)


def test_a_users_scorer_and_estimator_replace_ours(two_ranks: dict[str, Any]) -> None:
    facts = two_ranks["own"]
    assert (facts["rewards"], facts["score_error"]) == (0.0, 0.0)
    assert facts["group_mean"] < 1e-5 and facts["spread"] > 1e-2


@pytest.mark.parametrize("stage", [0, 1])
def test_a_gradient_that_is_not_finite_moves_no_weight(two_ranks: dict[str, Any], stage: int) -> None:
    assert two_ranks[f"unbounded_zero{stage}"] == {"applied": 0.0, "finite": 1.0}
