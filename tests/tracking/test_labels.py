"""How metrics are shown to people."""

import pytest

from rlhf.tracking.labels import format_change, format_value, full_label, verdict


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("eval/perplexity", 4447.1, "4,447"),
        ("eval/perplexity", 60.64, "60.6"),
        ("eval/score", -0.05, "\N{MINUS SIGN}0.05"),
        ("eval/score", 0.0, "0.00"),
        ("eval/margin", -0.00312, "\N{MINUS SIGN}0.00312"),
        ("eval/accuracy", 0.7123, "71.2 %"),
        ("eval/accuracy", None, "\N{EN DASH}"),
    ],
)
def test_values(name: str, value: float | None, text: str) -> None:
    assert format_value(name, value) == text


@pytest.mark.parametrize(
    ("name", "before", "after", "text"),
    [
        ("eval/accuracy", 0.497, 0.712, "+21.5 points"),
        ("eval/eos_rate", 0.95, 0.9, "\N{MINUS SIGN}5.0 points"),
        ("eval/perplexity", 4000.0, 50.0, "80 times lower"),
        ("train/grad_norm", 1.0, 20.0, "20 times higher"),
        ("eval/loss", 8.4, 4.1, "\N{MINUS SIGN}4.30"),
        ("eval/kl_per_sequence", 0.0, 8.1, "+8.10"),
        ("eval/loss", None, 4.1, ""),
    ],
)
def test_changes(name: str, before: float | None, after: float | None, text: str) -> None:
    assert format_change(name, before, after) == text


def test_verdicts_follow_the_direction_of_the_metric() -> None:
    assert verdict("eval/loss", 2.0, 1.0) == "better"
    assert verdict("eval/accuracy", 0.7, 0.6) == "worse"
    assert verdict("eval/response_length", 19.0, 30.0) == ""
    assert verdict("eval/loss", 1.0, 1.0) == ""
    assert verdict("eval/loss", None, 1.0) == ""


def test_labels_name_group_and_unit_and_unknown_names_stand_for_themselves() -> None:
    assert full_label("eval/kl_per_sequence") == "held-out KL to the reference (nats per response)"
    assert full_label("train/some_new_thing") == "training some new thing"
    assert full_label("plain") == "plain"
