"""The output layer of a causal language model, which gives log-probabilities instead of logits when asked."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from rlhf.functional.head import head_logprobs
from rlhf.functional.logprobs import entropy, token_logprobs


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """N places of a batch's hidden states, and the token whose probability is wanted at each."""

    rows: Int[Tensor, " N"]
    columns: Int[Tensor, " N"]
    ids: Int[Tensor, " N"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What `LogprobHead` is asked: the log-probabilities at some places, under a temperature, of the first ids."""

    places: Places
    temperature: float
    vocab_limit: int


class LogprobHead(nn.Linear):
    """A linear layer with the same parameters and hooks as before, which also answers `Question`s.

    The answer takes the way of the logits through the model's forward pass, so that ZeRO-3 gathers the weight for it,
    tied to the embedding or not. A model that changes what its head returns (a cap or a scale on the logits) can't be
    asked: `direct` is then false.
    """

    question: Question | None = None
    direct: bool = True
    answer: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Logits [B, T, V]; if there is a question, log-probabilities and entropies [N, 2] in fp32."""
        if self.question is None:
            return super().forward(input)
        places = self.question.places
        answer = head_logprobs(
            input[places.rows, places.columns],
            self.weight,
            self.bias,
            places.ids,
            limit=self.question.vocab_limit,
            temperature=self.question.temperature,
        )
        self.answer = answer.detach()
        return answer

    @contextmanager
    def asked(self, question: Question) -> Iterator[None]:
        """Within this context the layer answers the question."""
        self.question = question
        try:
            yield
        finally:
            self.question = self.answer = None

    def gave(self, logits: Tensor) -> bool:
        """Whether the model's output is the answer, unchanged."""
        # The answer is kept until here, so that nothing else lies where it did.
        assert self.answer is not None, "the model did not use its output layer"
        return logits.data_ptr() == self.answer.data_ptr()


def make_answerable(model: nn.Module) -> None:
    """Turn a model's output layer into a `LogprobHead`, in place; anything but a plain linear layer stays."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if type(head) is nn.Linear:
        head.__class__ = LogprobHead


def logprobs_at(
    engine: Any, inputs: Mapping[str, Tensor], places: Places, *, temperature: float = 1.0, vocab_limit: int
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Log-probabilities, with gradient, and entropies, without, of the distributions at some places, in fp32.

    Args:
        engine: a causal language model or its engine.
        inputs: what the model's forward pass takes, of a batch [B, T].
        places: the hidden state at [row, column] predicts the token that follows that column.
        temperature: logits are divided by it.
        vocab_limit: logits from here on are padding and have no probability.

    Returns:
        Two vectors [N]. A model whose head can't be asked computes its logits whole, from the first place on.
    """
    head = getattr(engine, "module", engine).get_output_embeddings()
    # An empty batch asks for one place, which it leaves out: every pass shows whether the model gives the answer.
    asked = places if len(places.ids) else _one_place(places)
    ids = asked.ids.clamp(max=vocab_limit - 1)
    asked = Places(rows=asked.rows, columns=asked.columns, ids=ids)
    if isinstance(head, LogprobHead) and head.direct:
        with head.asked(Question(places=asked, temperature=temperature, vocab_limit=vocab_limit)):
            answer: Tensor = engine(**inputs, use_cache=False).logits
            head.direct = head.gave(answer)
        if head.direct:
            answer = answer[: len(places.ids)]
            return answer[:, 0], answer[:, 1].detach()
    kept = inputs["input_ids"].shape[1] - int(asked.columns.min())
    logits = engine(**inputs, use_cache=False, logits_to_keep=kept).logits[
        asked.rows, asked.columns - asked.columns.min()
    ]
    logits = logits[: len(places.ids), :vocab_limit]
    ids = ids[: len(places.ids)]
    return token_logprobs(logits, ids, temperature=temperature), entropy(logits.detach(), temperature=temperature)


def _one_place(places: Places) -> Places:
    first = places.ids.new_zeros(1)
    return Places(rows=first, columns=first, ids=first)
