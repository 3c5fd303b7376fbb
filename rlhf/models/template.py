"""Chat templates: what they write, where it ends an answer, and which of its tokens are control tokens. Without torch.

A control token is one that the template writes. The same text inside a message is plain text: whoever types
<|im_end|> must not end a turn.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rlhf.config.errors import ConfigError
from rlhf.models.turns import Turns, render, render_all, token_ids

_PROMPT, _ANSWER = "\ue001", "\ue000"  # Stand for contents: no template trims, capitalises or looks for them.


def special_tokens(tokenizer: Any) -> list[str]:
    """Every text that the tokenizer would turn into a control token, longest first."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return _longest_first({*tokenizer.all_special_tokens, *added, _text(tokenizer, end_of_turn(tokenizer))})


def special_ids(tokenizer: Any) -> frozenset[int]:
    """The ids of these texts."""
    return frozenset(tokenizer.convert_tokens_to_ids(special_tokens(tokenizer)))


def any_of(texts: Sequence[str]) -> re.Pattern[str]:
    """A pattern that finds the first of some texts, of several at one place the one that comes first in the list."""
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")


def finder(texts: Sequence[str]) -> Callable[[str], bool]:
    """What tells whether a text contains any of some texts; fast where it has not even the beginning of one."""
    pattern, beginnings = any_of(texts), {text[:2] for text in texts}
    return lambda text: any(beginning in text for beginning in beginnings) and bool(pattern.search(text))


def end_of_turn(tokenizer: Any) -> int:
    """The token that the template writes behind an answer, such as <|im_end|>; the tokenizer's EOS if it writes none.

    It is what training ends answers with. An answer that the template cannot stand alone tells nothing: EOS then.
    Raises ConfigError where there is no EOS.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of {tokenizer.name_or_path} has no EOS token: responses could never end")
    eos = int(tokenizer.eos_token_id)
    if not tokenizer.chat_template:
        return eos
    turns = [{"role": "user", "content": _PROMPT}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = render(tokenizer, (turns, None), to_answer=False)
    except ConfigError:
        return eos
    _, there, behind = text.rpartition(_ANSWER)
    # White space may be an added token, too (Gemma), and ends nothing.
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
    control = any_of(_longest_first({*tokenizer.all_special_tokens, *added}))
    found = control.search(behind) if there else None
    if found is None:
        return eos
    # What opens turns and stands behind an answer opens another one: the template wrote no end between them.
    opening = control.findall(text.partition(_PROMPT)[0])[-1:]
    token = int(tokenizer.convert_tokens_to_ids(found.group()))
    return eos if [found.group()] == opening and token != eos else token


def response_ends(tokenizer: Any, own: Any = None) -> tuple[int, ...]:
    """Every token that ends a response: the model's `own` list, in its order, then EOS and the template's.

    Args:
        tokenizer: with a chat template.
        own: eos_token_id as generation_config.json has it: an id, a list of them, or None.
    """
    given = own if isinstance(own, list | tuple) else [own]
    ids = [*given, tokenizer.eos_token_id, end_of_turn(tokenizer)]
    usable = (each for each in ids if isinstance(each, int) and not isinstance(each, bool) and each >= 0)
    return tuple(dict.fromkeys(usable))


def plain_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts in which control tokens that are written out are plain text."""
    ids = token_ids(tokenizer, texts, split_special_tokens=True)
    end = end_of_turn(tokenizer)
    for index, own in enumerate(ids):
        if end in own:
            ids[index] = _without(tokenizer, texts[index], written=_text(tokenizer, end))
    return ids


def _without(tokenizer: Any, text: str, *, written: str) -> list[int]:
    """The same for a token that is added without being called special: the tokenizer finds it wherever it is whole."""
    first, *others = text.split(written)
    pieces = [first, *(f"{written[1:]}{piece}" for piece in others)]
    halves = [*(f"{piece}{written[0]}" for piece in pieces[:-1]), pieces[-1]]
    return [token for ids in token_ids(tokenizer, halves, split_special_tokens=True) for token in ids]


def encoded(tokenizer: Any, conversations: Sequence[Turns], *, to_answer: bool) -> list[list[int]]:
    """Token ids of rendered conversations: control tokens that the template writes, and plain text in the messages.

    Raises:
        ConfigError: the template fails, or does something with a control token inside a message, so that it cannot be
            told which of those that it writes are its own.
    """
    texts = render_all(tokenizer, conversations, to_answer=to_answer)
    ids = token_ids(tokenizer, texts)
    special = special_tokens(tokenizer)
    control, holds_one = any_of(special), finder(special)
    for index, turns in enumerate(conversations):
        found = next(filter(holds_one, _written(turns)), None)
        if found is not None:
            hidden, show = _hidden(turns, special, control)
            masked = render(tokenizer, hidden, to_answer=to_answer)
            if show(masked) != texts[index]:
                token = control.findall(found)[0]
                raise ConfigError(
                    f"a message contains {token!r}, a control token, and the chat template changes the message: what "
                    "is the template's and what is the message's cannot be told"
                )
            ids[index] = _encode_masked(tokenizer, masked, control, show)
    return ids


def _written(turns: Turns) -> Iterator[str]:
    """The texts of a conversation, keys of tools and calls among them; roles are the template's."""
    messages, tools = turns
    for message in messages:
        for key, value in message.items():
            if key != "role":
                yield from _strings(value)
    yield from _strings(tools)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for key, entry in value.items() for text in (key, *_strings(entry)))
    elif isinstance(value, list):
        yield from (text for entry in value for text in _strings(entry))


def _replaced(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _replaced(entry, change) for key, entry in value.items()}
    return [_replaced(entry, change) for entry in value] if isinstance(value, list) else value


def _hidden(turns: Turns, special: list[str], control: re.Pattern[str]) -> tuple[Turns, Callable[[str], str]]:
    """The turns with numbers between marks for the control tokens in their texts, and what puts these back."""
    written = "".join(_written(turns))
    mark = next(sign for sign in map(chr, range(0xE000, 0xF900)) if sign not in written)

    def hide(text: str) -> str:
        return control.sub(lambda token: f"{mark}{special.index(token.group())}{mark}", text)

    def show(text: str) -> str:
        return re.sub(f"{mark}([0-9]+){mark}", lambda number: special[int(number.group(1))], text)

    messages, tools = turns
    hidden = [
        {key: value if key == "role" else _replaced(value, hide) for key, value in message.items()}
        for message in messages
    ]
    return (hidden, _replaced(tools, hide)), show


def _encode_masked(tokenizer: Any, masked: str, control: re.Pattern[str], show: Callable[[str], str]) -> list[int]:
    """Token ids of a rendered text in whose messages control tokens are hidden.

    A tokenizer cuts a text at control tokens first. So a stretch between two of the template's own can be made plain
    text by itself where something is hidden in it; all else is tokenised as ever.
    """
    flags = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    pieces = re.split(f"({control.pattern})", masked)
    ids: list[int] = []
    usual = ""
    for index, piece in enumerate(pieces):
        shown = show(piece)
        if shown == piece:
            usual += piece
            continue
        # Some control tokens take the white space beside them.
        if index and (before := flags.get(pieces[index - 1])) and before.rstrip:
            shown = shown.lstrip()
        if index + 1 < len(pieces) and (behind := flags.get(pieces[index + 1])) and behind.lstrip:
            shown = shown.rstrip()
        ids += [*token_ids(tokenizer, [usual])[0], *plain_ids(tokenizer, [shown])[0]]
        usual = ""
    return ids + token_ids(tokenizer, [usual])[0]


def _text(tokenizer: Any, token: int) -> str:
    return str(tokenizer.convert_ids_to_tokens(token))


def _longest_first(texts: set[str]) -> list[str]:
    return sorted(texts - {""}, key=lambda text: (-len(text), text))
