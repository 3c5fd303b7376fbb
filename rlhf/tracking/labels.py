"""What the metrics are called in front of people: label, unit, and which direction is an improvement."""

from dataclasses import dataclass
from enum import Enum


class Better(Enum):
    """The direction in which a metric improves."""

    up = "up"
    down = "down"
    neither = "neither"


@dataclass(frozen=True, kw_only=True, slots=True)
class Label:
    """How a metric is shown. A percentage is recorded as a share between 0 and 1."""

    text: str
    unit: str = ""
    better: Better = Better.neither
    percent: bool = False


_GROUPS = {"eval": "held-out", "rollout": "rollout", "train": "training", "actor": "actor", "critic": "critic"}
_LABELS = {
    "loss": Label(text="loss", unit="nats", better=Better.down),
    "perplexity": Label(text="perplexity", better=Better.down),
    "accuracy": Label(text="accuracy", better=Better.up, percent=True),
    "margin": Label(text="margin, chosen \N{MINUS SIGN} rejected", better=Better.up),
    "score": Label(text="mean score", better=Better.up),
    "score_mean": Label(text="mean of the scores"),
    "score_std": Label(text="spread of the scores", unit="standard deviation"),
    "reward": Label(text="reward after KL", better=Better.up),
    "kl_per_sequence": Label(text="KL to the reference", unit="nats per response"),
    "kl_per_token": Label(text="KL to the reference", unit="nats per token"),
    "text_loss": Label(text="loss on text", unit="nats per token", better=Better.down),
    "reference_perplexity": Label(text="perplexity under the reference"),
    "response_length": Label(text="response length", unit="tokens"),
    "eos_rate": Label(text="responses ended by EOS", percent=True),
    "judge_positive": Label(text="called positive by the judge", better=Better.up, percent=True),
    "clip_fraction": Label(text="clipped", percent=True),
    "padding_share": Label(text="padding", percent=True),
    "entropy": Label(text="entropy", unit="nats per token"),
    "approx_kl": Label(text="KL of one update", unit="nats per token"),
    "grad_norm": Label(text="gradient norm"),
}


def label(name: str) -> Label:
    """The label of a metric, whose group prefix counts for nothing; an unknown name is its own label."""
    bare = name.split("/")[-1]
    return _LABELS.get(bare) or Label(text=bare.replace("_", " "))


def full_label(name: str) -> str:
    """The label with its group and unit, as "held-out loss (nats)"."""
    known = label(name)
    group = _GROUPS.get(name.split("/")[0], "") if "/" in name else ""
    unit = f" ({known.unit})" if known.unit else ""
    return f"{group} {known.text}{unit}".strip()


def format_value(name: str, value: float | None) -> str:
    """The value as people read it, with about three significant digits; a dash if there is none."""
    if value is None:
        return "\N{EN DASH}"
    if label(name).percent:
        return f"{100 * value:.1f} %"
    return format_number(value)


def format_number(value: float) -> str:
    """A number with about three significant digits and a real minus sign."""
    magnitude = abs(value)
    if magnitude >= 1000:
        text = f"{value:,.0f}"
    elif magnitude >= 100:
        text = f"{value:.0f}"
    elif magnitude >= 10:
        text = f"{value:.1f}"
    elif magnitude >= 0.1 or value == 0:
        text = f"{value:.2f}"
    else:
        text = f"{value:.3g}"
    return text.replace("-", "\N{MINUS SIGN}", 1) if value < 0 else text


def format_change(name: str, before: float | None, after: float | None) -> str:
    """The difference with its sign; for a percentage in points; a factor where a value falls or grows tenfold."""
    if before is None or after is None:
        return ""
    if label(name).percent:
        return _signed(f"{100 * (after - before):+.1f} points")
    if before > 0 and after > 0 and not 0.1 < after / before < 10:
        factor = max(after / before, before / after)
        return f"{factor:,.0f} times {'higher' if after > before else 'lower'}"
    difference = after - before
    return f"+{format_number(difference)}" if difference > 0 else format_number(difference)


def verdict(name: str, before: float | None, after: float | None) -> str:
    """ "better", "worse", or "" where the metric has no direction or did not move."""
    better = label(name).better
    if before is None or after is None or before == after or better is Better.neither:
        return ""
    return "better" if (after > before) == (better is Better.up) else "worse"


def _signed(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}", 1)
