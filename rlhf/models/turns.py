"""Messages as chat templates take them, and what a template reads of them. Imports no torch."""

import json
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rlhf.config.errors import ConfigError, DataError
from rlhf.models.door import reason

# CPU seconds for one conversation, and more for each further one of a batch: a template takes milliseconds.
RENDER_SECONDS, MORE_SECONDS = 30.0, 0.5
# What a template is given: its messages, and the functions that may be called (None: none).
_HINT = "Mend it, or set model.chat_template"
Turns = tuple[list[dict[str, Any]], list[Any] | None]


def as_turns(messages: Sequence[Any]) -> Turns:
    """Messages, objects with `role`, `content` and perhaps `fields`, as a chat template takes them."""
    turns = [
        {"role": one.role, "content": one.content, **json.loads(getattr(one, "fields", "") or "{}")} for one in messages
    ]
    return turns, turns[0].pop("tools", None) if turns else None


def render(tokenizer: Any, turns: Turns, *, to_answer: bool) -> str:
    """The text of a conversation, up to where the assistant begins to answer if `to_answer`; raises ConfigError."""
    return render_all(tokenizer, [turns], to_answer=to_answer)[0]


def render_all(tokenizer: Any, conversations: Sequence[Turns], *, to_answer: bool) -> list[str]:
    """The texts of conversations.

    Raises:
        ConfigError: the template fails or makes nothing of one.
        DataError: it does not come to an end on one. That is no bad row, which would be tried for each row again.
    """
    texts: list[str] = []
    try:
        with time_limit(RENDER_SECONDS + MORE_SECONDS * len(conversations)):
            if all(tools is None for _, tools in conversations):
                plain = [messages for messages, _ in conversations]
                texts = tokenizer.apply_chat_template(plain, add_generation_prompt=to_answer, tokenize=False)
            else:
                texts = [
                    tokenizer.apply_chat_template(turns, tools=tools, add_generation_prompt=to_answer, tokenize=False)
                    for turns, tools in conversations
                ]
    except Expired:
        if len(conversations) > 1:  # Which one it is, is to be told.
            return [render(tokenizer, one, to_answer=to_answer) for one in conversations]
        turns, _ = conversations[0]
        raise DataError(
            f"the chat template does not come to an end on a conversation that begins with "
            f"{str(turns[0]['content'])[:60]!r} (messages: {len(turns)}). {_HINT}"
        ) from None
    except MemoryError as error:
        raise ConfigError(f"the chat template takes too much memory. {_HINT}") from error
    except Exception as error:  # A template is a program, which may divide by zero.
        raise ConfigError(f"the chat template fails: {reason(error).rstrip('.')}. {_HINT}") from error
    if not all(texts):
        raise ConfigError(f"the chat template makes nothing of a prompt. {_HINT}")
    return texts


class Expired(BaseException):
    """A `time_limit` is over. No Exception: code within the limit may catch those."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise Expired in what takes more CPU seconds than that; what runs in native code is let finish.

    Only in a process's main thread, the one that signals come to: every other one is without a limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    running = True

    def expire(number: int, frame: object) -> None:
        if running:  # A signal may still be on its way when the work is done.
            raise Expired

    before = signal.signal(signal.SIGVTALRM, expire)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        running = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def token_ids(tokenizer: Any, texts: Sequence[str], **how: bool) -> list[list[int]]:
    """Token ids of texts, without what the tokenizer would put around them; raises ConfigError where it fails.

    Args:
        tokenizer: of transformers.
        texts: any number of them.
        how: further arguments of the tokenizer, or others than these.
    """
    if not texts:
        return []
    try:
        return [list(ids) for ids in tokenizer(list(texts), **{"add_special_tokens": False, **how})["input_ids"]]
    except (KeyboardInterrupt, SystemExit, MemoryError, Expired):
        raise
    except BaseException as error:  # What native code raises is no Exception.
        raise ConfigError(f"the tokenizer fails on a text: {reason(error).rstrip('.')}. Mend its files") from error


def named_fields(tokenizer: Any, conversation: Turns) -> str:
    """JSON of what a template may show of messages beside their contents: the keys that it names, and the tools."""
    turns, tools = conversation
    template = str(tokenizer.chat_template)
    named = [
        value for turn in turns for key, value in turn.items() if key not in ("role", "content") and key in template
    ]
    return json.dumps([named, tools], ensure_ascii=False) if named or tools else ""


def unread_keys(tokenizer: Any, messages: Sequence[Any]) -> list[str]:
    """The further keys of messages, and `tools`, of which the chat template shows nothing.

    A key that the template does not name is not read; for one that it names, the text without it is compared.
    """
    turns, tools = as_turns(messages)
    named = sorted({key for turn in turns for key in turn} - {"role", "content"}) + (["tools"] if tools else [])
    if not named:
        return []
    template = str(tokenizer.chat_template)
    whole = None
    found = []
    for key in named:
        if key in template:
            whole = render(tokenizer, (turns, tools), to_answer=False) if whole is None else whole
            if render(tokenizer, _without(turns, tools, key), to_answer=False) != whole:
                continue
        found.append(key)
    return found


def _without(turns: Sequence[Mapping[str, Any]], tools: list[Any] | None, key: str) -> Turns:
    """The same without a key."""
    kept = [{name: value for name, value in turn.items() if name != key} for turn in turns]
    return kept, None if key == "tools" else tools
