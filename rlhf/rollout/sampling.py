"""How responses are drawn."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from rlhf.config.choices import RolloutBackend


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How tokens are drawn, and by what.

    Attributes:
        temperature: 0 means greedy decoding.
        top_p, top_k, min_p: what of the distribution is left; 1, 0 and 0 leave all of it.
        repetition_penalty: on tokens of the prompt and the response; 1 for none.
        stop_ids: tokens that end a response and belong to it: the model's own ends, EOS among them, and further ones.
        stop: texts that end a response; what completes them belongs to it.
        min_new_tokens: no stop token is drawn before.
        max_new_tokens: longest response.
        max_length: longest prompt and response together, where it is known before.
        batch_size: prompts that are answered together at most; None: as many as there is memory for.
        backend: what generates.
        gather: whether a copy of the policy is made where generation is faster with one, or needs one (ZeRO-3).
        tensor_parallel: ranks that share the weights while they answer the prompts of all of them together.
        release_cache: whether the cache of keys and values is given back after each rollout; None: if it is large.
    """

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_ids: tuple[int, ...]
    stop: tuple[str, ...] = ()
    min_new_tokens: int = 0
    max_new_tokens: int
    max_length: int | None = None
    batch_size: int | None = None
    backend: RolloutBackend = RolloutBackend.auto
    gather: bool = True
    tensor_parallel: int = 1
    release_cache: bool | None = None

    @property
    def whole(self) -> bool:
        """Whether the model fits whole on each rank."""
        return self.gather and self.tensor_parallel == 1

    @property
    def restricted(self) -> bool:
        """Whether a part of the distribution is left out."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    @property
    def unbiased(self) -> bool:
        """Whether tokens are drawn from the whole distribution as it is."""
        return not self.restricted and self.repetition_penalty == 1.0 and self.min_new_tokens == 0


def end_of_text(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], ids: list[int]) -> int | None:
    """How many of the tokens it takes until their text contains one of some texts; None if it never does."""

    def found(count: int) -> bool:
        text = tokenizer.decode(ids[:count], skip_special_tokens=False)
        return any(each in text for each in stop)

    if not stop or not found(len(ids)):
        return None
    low, high = 1, len(ids)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if found(middle) else (middle + 1, high)
    return low
