"""`kind: gsm8k`: 1 if the number that a response ends with is that of the known answer, else 0 (Cobbe et al. 2021).

The known answer is the column `answer` of the source, as in the data set: it ends with `#### 42`.
"""

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

from rlhf.config.errors import DataError
from rlhf.config.schema import ScorerConfig

_NUMBER = re.compile(r"[-+]?\$?\d[\d,]*(?:\.\d+)?|[-+]?\$?\.\d+")


def problems(config: ScorerConfig) -> list[str]:
    """Nothing can be wrong."""
    return []


def score_function(config: ScorerConfig) -> Callable[..., list[float]]:
    """The function."""
    return score


def score(
    prompts: list[str], responses: list[str], *, answer: list[str] | None = None, **columns: object
) -> list[float]:
    """Compare the final numbers; raises DataError if a known answer is missing or has no number after ####."""
    if answer is None or any(known is None for known in answer):
        raise DataError("scorer.kind=gsm8k needs each prompt's column answer: set data.sources.NAME.keep=[answer]")
    scores = []
    for prompt, response, known in zip(prompts, responses, answer, strict=True):
        wanted = final_number(known) if "####" in known else None
        if wanted is None:
            raise DataError(
                f"scorer.kind=gsm8k: the answer to “{prompt[:80]}” has no number after ####: “{known[-80:]}”"
            )
        scores.append(float(final_number(response) == wanted))
    return scores


def final_number(text: str) -> Decimal | None:
    """The number after the last ####, or else the last number of a text; without separators, dollar signs and units."""
    found = _NUMBER.findall(text.rpartition("####")[2]) or _NUMBER.findall(text)
    if not found:
        return None
    number = found[0] if "####" in text and _NUMBER.findall(text.rpartition("####")[2]) else found[-1]
    try:
        return Decimal(number.replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None
