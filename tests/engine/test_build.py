"""Schedules and parameter groups, without an engine."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from rlhf.config.schema import OptimizerConfig, Schedule
from rlhf.engine.build import learning_rate_factor, parameter_groups, scheduler_factory
from rlhf.models.lora import add_adapters


@pytest.mark.parametrize("schedule", list(Schedule))
def test_the_rate_rises_linearly_and_ends_where_it_should(schedule: Schedule) -> None:
    options = OptimizerConfig(schedule=schedule, warmup_ratio=0.1, final_ratio=0.2)
    factors = [learning_rate_factor(step, optimizer=options, total_steps=100) for step in range(100)]
    assert factors[0] > 0  # no wasted step
    assert factors[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert factors[10] == pytest.approx(1.0)
    assert factors[99] == pytest.approx(1.0 if schedule is Schedule.constant else 0.2)
    assert all(later <= earlier for earlier, later in pairwise(factors[10:]))
    middle = {Schedule.constant: 1.0, Schedule.linear: 0.6, Schedule.cosine: 0.6}[schedule]
    assert factors[54] == pytest.approx(middle, abs=0.01)


def test_the_schedule_multiplies_the_peak_rate() -> None:
    wrapped = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = scheduler_factory(OptimizerConfig(schedule=Schedule.constant, warmup_ratio=0.25), total_steps=4)(
        wrapped
    )
    assert wrapped.param_groups[0]["lr"] == pytest.approx(0.25)
    wrapped.step()
    scheduler.step()
    assert wrapped.param_groups[0]["lr"] == pytest.approx(0.5)


def test_only_matrices_decay() -> None:
    module = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3))
    module[1].bias.requires_grad_(False)
    decayed, exempt = parameter_groups(module, weight_decay=0.1)
    assert decayed["weight_decay"] == 0.1
    assert exempt["weight_decay"] == 0.0
    assert [tuple(parameter.shape) for parameter in decayed["params"]] == [(5, 4), (3, 4)]
    assert [tuple(parameter.shape) for parameter in exempt["params"]] == [(3,), (3,)]


def test_adapters_may_have_a_rate_of_their_own_under_the_same_schedule() -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "ffn_dim": 8, "vocab_size": 16}
    model = OPTForCausalLM(OPTConfig(word_embed_proj_dim=8, max_position_embeddings=8, **sizes))
    add_adapters(model, rank=2, alpha=4.0, dropout=0.0, targets=["q_proj"], seed=0, only_lora=False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert len(parameter_groups(model, weight_decay=0.1)) == 2
    decayed, exempt, adapters = parameter_groups(model, weight_decay=0.1, adapter_rate=0.5)
    assert all("lora_" in names[id(parameter)] for parameter in adapters["params"])
    assert not any("lora_" in names[id(parameter)] for group in (decayed, exempt) for parameter in group["params"])
    assert (adapters["weight_decay"], adapters["lr"]) == (0.1, 0.5)
    wrapped = torch.optim.AdamW([decayed, exempt, adapters], lr=0.01)
    options = OptimizerConfig(schedule=Schedule.constant, warmup_ratio=0.75)
    scheduler = scheduler_factory(options, total_steps=4)(wrapped)
    rates = []
    for _ in range(4):
        rates.append([group["lr"] for group in wrapped.param_groups])
        wrapped.step()
        scheduler.step()
    assert rates == [pytest.approx([0.01 * part, 0.01 * part, 0.5 * part]) for part in (0.25, 0.5, 0.75, 1.0)]
    model.requires_grad_(False)
    adapters["params"][0].requires_grad_(True)
    (only,) = parameter_groups(model, weight_decay=0.1, adapter_rate=0.5)
    assert only["lr"] == 0.5
