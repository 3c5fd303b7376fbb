"""Schedules and parameter groups, without an engine."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from rlhf.config.schema import OptimizerConfig, Schedule
from rlhf.engine.build import learning_rate_factor, parameter_groups, scheduler_factory


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
