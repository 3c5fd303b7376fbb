"""Messages as chat templates take them, and what a template reads of them. Imports no torch."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.config.errors import ConfigError
from rlhf.models.door import reason

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
    """The texts of conversations. Raises ConfigError where the template fails or makes nothing of one."""
    texts: list[str] = []
    try:
        if all(tools is None for _, tools in conversations):
            plain = [messages for messages, _ in conversations]
            texts = tokenizer.apply_chat_template(plain, add_generation_prompt=to_answer, tokenize=False)
        else:
            texts = [
                tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=to_answer, tokenize=False)
                for messages, tools in conversations
            ]
    except Exception as error:  # A template is a program, which may divide by zero.
        raise ConfigError(f"the chat template fails: {reason(error)}. {_HINT}") from error
    if not all(texts):
        raise ConfigError(f"the chat template makes nothing of a prompt. {_HINT}")
    return texts


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
