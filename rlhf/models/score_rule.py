"""Where a reward model's score is read and how it is normalised, as its config.json says. No torch.

The score is the scalar at the last token of the conversation as the chat template renders it. That is what the usual
way of the ecosystem reads: `apply_chat_template`, then `AutoModelForSequenceClassification`. A template may write
something after the EOS of the answer, as ChatML its newline: this tail is put behind the answers of pairs in training,
and behind those of rollouts that came to their end. An answer that did not is scored at its last token.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rlhf.config.errors import ConfigError
from rlhf.config.model_files import kind_of, read_object, stored_tensors
from rlhf.config.writing import write_json, write_text
from rlhf.models.tokenizer import encode_prompt, encode_response
from rlhf.models.turns import render, token_ids

MEAN, STD, DIGEST, TAIL, POSITION = "score_mean", "score_std", "score_weights", "score_tail", "score_position"
RULE = "the last token of the conversation as the chat template renders it, score_tail included"
_REMEDY = "set scorer.normalize=running, or off"
_ANSWER = "An answer."
_TURNS = ({"role": "user", "content": "A question?"}, {"role": "assistant", "content": _ANSWER})


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreRule:
    """`(raw - mean) / std` is the normalised score; `tail` are the token ids that follow EOS before it is read."""

    mean: float
    std: float
    tail: tuple[int, ...]


def end_id(tokenizer: Any) -> int:
    """The id of the EOS that training puts behind an answer."""
    return int(encode_response(tokenizer, _ANSWER)[-1])


def score_tail(tokenizer: Any) -> tuple[int, ...]:
    """The token ids that the chat template writes behind the EOS of a conversation's last answer.

    Empty where it writes none, or where it does not end an answer with the EOS that training appends: there the usual
    way reads another token than training, and `rlhf.score` has to be used.
    """
    written = _rendered(tokenizer)
    before, end, _ = written.rpartition(str(tokenizer.convert_ids_to_tokens(end_id(tokenizer))))
    if not end or not before.endswith(_ANSWER):
        return ()
    # Within the whole: by itself the tail may have other tokens, where a tokenizer strips or marks beginnings.
    ids, head = _ids(tokenizer, written), _ids(tokenizer, before + end)
    return tuple(ids[len(head) :]) if ids[: len(head)] == head else ()


def usual_way_agrees(tokenizer: Any) -> bool:
    """Whether a rendered conversation has the tokens that training gives it, so that its last one carries the score."""
    prompt = encode_prompt(tokenizer, [SimpleNamespace(**_TURNS[0])])
    ours = [*prompt, *encode_response(tokenizer, _ANSWER), *score_tail(tokenizer)]
    return _ids(tokenizer, _rendered(tokenizer)) == ours


def _ids(tokenizer: Any, text: str) -> list[int]:
    return token_ids(tokenizer, [text])[0]


def _rendered(tokenizer: Any) -> str:
    try:
        return render(tokenizer, ([*_TURNS], None), to_answer=False)
    except ConfigError:  # What a template cannot do is told where it is needed.
        return ""


def weights_digest(directory: Path) -> str:
    """BLAKE2 of the weights in a directory's safetensors files: names, shapes, formats and bytes.

    The same weights in one file or in several have the same digest. Raises ConfigError for damaged files.
    """
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors.update(stored_tensors(path))
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
        with tensor.file.open("rb") as file:
            file.seek(tensor.begin)
            left = tensor.end - tensor.begin
            while left:
                block = file.read(min(left, 2**20))
                if not block:
                    raise ConfigError(f"{tensor.file} was cut off while it was read")
                digest.update(block)
                left -= len(block)
    return digest.hexdigest()


def write_score_rule(directory: Path, tokenizer: Any, *, mean: float, std: float) -> None:
    """Add the rule to the config.json of a reward model whose weights are written, and a model card beside it."""
    path = directory / "config.json"
    entries = {POSITION: RULE, TAIL: list(score_tail(tokenizer)), MEAN: mean, STD: std}
    write_json(path, {**read_object(path), **entries, DIGEST: weights_digest(directory)})
    usual = "" if usual_way_agrees(tokenizer) else _UNUSUAL
    write_text(directory / "README.md", CARD.replace("@UNUSUAL@", usual))


def read_score_rule(directory: Path, tokenizer: Any, *, normalize: bool) -> ScoreRule:
    """What a reward model's config.json says; of one that was not trained here, its template's tail.

    Raises ConfigError where the scores are to be normalised and the two numbers are missing, make no sense, or were
    measured on other weights.
    """
    entries = read_object(directory / "config.json")
    if normalize:
        check_statistics(directory)
    tail = entries.get(TAIL)
    if not isinstance(tail, list) or not all(type(token) is int and 0 <= token < len(tokenizer) for token in tail):
        tail = score_tail(tokenizer)
    mean, std = (float(entries[MEAN]), float(entries[STD])) if normalize else (0.0, 1.0)
    return ScoreRule(mean=mean, std=std, tail=tuple(tail))


def check_statistics(directory: Path) -> None:
    """Raise ConfigError unless the two numbers are there and are those of the weights; reads all of the weights."""
    if problem := statistics_problem(directory):
        raise ConfigError(problem)
    if read_object(directory / "config.json")[DIGEST] != weights_digest(directory):
        raise ConfigError(
            f"{directory}: {MEAN} and {STD} in config.json were measured on other weights than those that are there, "
            f"which were trained further: {_REMEDY}"
        )


def statistics_problem(directory: Path) -> str | None:
    """What is wrong with the numbers that a reward model's scores are normalised by, without a look at its weights."""
    entries = read_object(directory / "config.json")
    missing = [name for name in (MEAN, STD, DIGEST) if name not in entries]
    if missing:
        return f"{directory}/config.json has no {', '.join(missing)}, which stage=rm writes: {_REMEDY}"
    mean, std = entries[MEAN], entries[STD]
    if not _finite(mean) or not _finite(std) or std <= 0 or not isinstance(entries[DIGEST], str):
        found = f"{MEAN} is {kind_of(mean)} and {STD} {kind_of(std)}"
        return f"{directory}/config.json: {found}; both must be numbers, the second above 0: {_REMEDY}"
    return None


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30 and math.isfinite(value)


def closed(ids: Sequence[int], *, eos_id: int, ends: frozenset[int], tail: Sequence[int]) -> list[int]:
    """A prompt with an answer that came to its end, as the reward model reads it: closed by EOS and the tail.

    Another special token that ended the answer (one of `ends`) gives way to EOS; behind a text that ended it
    comes EOS.
    """
    kept = list(ids[:-1]) if ids and ids[-1] in ends else list(ids)
    return [*kept, *(() if kept and kept[-1] == eos_id else (eos_id,)), *tail]


_UNUSUAL = """\
**The chat template does not end an answer with the EOS token that this model was trained with**: the snippet below
reads another token. Use `rlhf.score` instead.

"""
CARD = """\
# A reward model

It gives a conversation one number: the higher, the better its last answer. The number is read at the last token of the
conversation as the chat template renders it; what the template writes after EOS is in it (`score_tail` in config.json).

@UNUSUAL@```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

directory = "."  # this one
tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
messages = [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Red."}]
inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
with torch.no_grad():
    raw = model(**inputs).logits[0, 0].item()
score = (raw - model.config.score_mean) / model.config.score_std
```

`rlhf.score(directory, [messages])` does the same for many conversations, checks that the numbers are those of these
weights, and takes special tokens that are written out in a message as plain text, as training does.

`score_mean` and `score_std` are the mean and the standard deviation of the raw scores of the held-out answers, chosen
and rejected ones together. `score_weights` is a digest of the weights that they were measured on: after further
training they no longer hold.
"""
