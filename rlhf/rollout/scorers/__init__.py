"""One module per kind of scorer that reads text. A module has this function and needs no registration:

    score_function(config: ScorerConfig) -> Callable[..., list[float]]

What it returns is called on each rank as `score(prompts, responses, **columns)`: lists of that rank's texts, and the
columns that the data's sources keep (`data.sources.NAME.keep`), also as lists. Importing a module needs no torch, nor
does its `problems(config) -> list[str]`, which says before anything starts what is wrong with the options.

`kind: reward_model` is not among them: a reward model reads tokens, and is an engine of the stage.
"""

import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import ModuleType
from typing import Any

from rlhf.config.errors import DataError
from rlhf.config.schema import REWARD_MODEL, ScorerConfig

ScoreFunction = Callable[..., Sequence[float]]


@cache
def scorer_kinds() -> list[str]:
    """The kinds of scorers."""
    return sorted([REWARD_MODEL, *(module.name for module in pkgutil.iter_modules(__path__))])


def scorer_problems(config: ScorerConfig) -> list[str]:
    """What is wrong with a scorer's options."""
    if config.kind not in scorer_kinds():
        return [f"scorer.kind={config.kind}: no such kind of scorer; there are {', '.join(scorer_kinds())}"]
    return [] if config.kind == REWARD_MODEL else list(_module(config.kind).problems(config))


def score_function(config: ScorerConfig) -> ScoreFunction:
    """The function of a scorer that reads text."""
    function: ScoreFunction = _module(config.kind).score_function(config)
    return function


def _module(kind: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{kind}")


def checked_scores(
    function: ScoreFunction, prompts: list[str], responses: list[str], columns: Mapping[str, list[Any]], *, name: str
) -> list[float]:
    """Call a score function and make sure of what it returns; raises DataError if that is not a finite number each."""
    try:
        scores = [float(score) for score in function(prompts, responses, **columns)]
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"{name} failed on {len(responses)} responses: {type(error).__name__}: {error}; the first was to "
            f"the prompt {_short(prompts[0])}"
        ) from error
    if len(scores) != len(responses):
        raise DataError(f"{name} returned {len(scores)} scores for {len(responses)} responses: return one for each")
    for prompt, response, score in zip(prompts, responses, scores, strict=True):
        if not math.isfinite(score):
            raise DataError(
                f"{name} returned {score} for the response {_short(response)} to the prompt {_short(prompt)}: "
                "return a finite number"
            )
    return scores


def _short(text: str) -> str:
    return f"“{text[:80]}{'…' if len(text) > 80 else ''}”"
