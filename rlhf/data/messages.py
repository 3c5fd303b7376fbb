"""Messages as rows have them: lists of mappings in several spellings, or such a list written out as text."""

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from rlhf.data import json_rows
from rlhf.data.conversation import Message, Struct
from rlhf.data.json_rows import RepeatedKeyError

ROLES = ("system", "user", "assistant", "tool")
# What others call the roles: ShareGPT, OpenAssistant, OpenAI (developer), Gemma (model), LLaMA-Factory (observation).
_NAMES = {
    **{"human": "user", "prompter": "user", "developer": "system"},
    **{"gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant"},
    **{"observation": "tool", "function": "tool", "function_response": "tool"},
}
_CALL = "function_call"  # ShareGPT's role of a call: its value is the call as JSON.
_TEXT_PARTS = (None, "text", "input_text", "output_text")
_LIKE_MAPPINGS = re.compile(r"""\s*\[?\s*\{\s*(['"])\w+\1\s*:""")
_LIKE_MESSAGE = re.compile(
    r"""\s*\[\s*\{(?:\s*(['"])(?:role|from|content|value)\1\s*:|[^{}]{0,200}?(['"])(?:role|from)\2\s*:)"""
)
_LIKE_ONE = re.compile(r"""\s*\{[^{}]{0,200}?(['"])(?:role|from)\1\s*:""")
_TWICE = re.compile(r'\s*"\s*[\[{]')
# Python text costs a hundred times its length to parse.
_LONGEST_PYTHON = 4 * 1024**2


class BadRow(ValueError):
    """A row that is not what its format says; the message gives the reason."""


def shown(value: Any) -> str:
    """A value in an error message: texts and numbers in short, of others the type."""
    return f"{value!r:.40}" if isinstance(value, int | float | str) else type(value).__name__


def checked_text(value: Any, what: str, *, may_be_empty: bool = False) -> str:
    """A text with something in it, as it is; raises BadRow."""
    if not isinstance(value, str):
        raise BadRow(f"{what} must be text, not {type(value).__name__}")
    if not may_be_empty and not value.strip():
        raise BadRow(f"{what} is empty")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise BadRow(f"{what} is not valid UTF-8: it holds half of a surrogate pair")
    return value


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: null, or a text, list or mapping without anything in it."""
    return value is None or (isinstance(value, str | list | Mapping) and not value)


def message_list(value: Any, what: str) -> list[Any] | None:
    """The messages that a cell holds or is the text of, in JSON or Python; None where it is something else.

    A single message is a list of one. Raises BadRow for a text that begins as messages do and cannot be read.
    """
    if isinstance(value, str):
        value = _decoded_once(value)
        if not _LIKE_MAPPINGS.match(value):
            return None
        try:
            value = parsed(value)
        except RepeatedKeyError as error:
            if _LIKE_MESSAGE.match(value) or _LIKE_ONE.match(value):
                raise BadRow(f"{what}: {error}") from None
            return None
        except ValueError as error:
            if _LIKE_MESSAGE.match(value):
                raise BadRow(f"{what} looks like messages written out as text, which cannot be read: {error}") from None
            return None
        # What is written out as text may be an answer that happens to be JSON.
        if isinstance(value, Mapping) and _role(value) not in ROLES:
            inner = value.get("messages") or value.get("conversations")
            if isinstance(inner, list) and any(_is_message(entry) for entry in inner):
                raise BadRow(f"{what} is a whole row written out as text: give its list of messages")
            return None
        if isinstance(value, list) and not any(_is_message(entry) for entry in value):
            return None
    if isinstance(value, list):
        return value
    return [value] if _is_message(value) else None


def _decoded_once(text: str) -> str:
    """What a text that was written as JSON twice was before the second time; every other text as it is."""
    if not _TWICE.match(text):
        return text
    try:
        inner = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return inner if isinstance(inner, str) else text


def parsed(text: str) -> Any:
    """What a text is in JSON or else in Python's notation; raises ValueError with the reason.

    That is RepeatedKeyError where nothing but a key that occurs twice speaks against it.
    """
    try:
        return json_rows.parsed(text)
    except RepeatedKeyError:
        raise
    except ValueError as error:
        reason = str(error)
    if reason == json_rows.TOO_DEEP:
        raise ValueError(reason)
    if len(text) > _LONGEST_PYTHON:
        raise ValueError(f"{reason}, and too long to be read as Python")
    try:
        tree = ast.parse(text.strip(), mode="eval")
        for node in ast.walk(tree):
            if isinstance(node, ast.Dict):
                json_rows.check_keys([key.value for key in node.keys if isinstance(key, ast.Constant)])
        return ast.literal_eval(tree)
    except RepeatedKeyError:
        raise
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise ValueError(f"{reason}, and no Python list either") from None


def _is_message(value: Any) -> bool:
    if not isinstance(value, Mapping) or not isinstance(_first(value, "role", "from")[1], str):
        return False
    return any(key in value for key in ("content", "value", "tool_calls"))


def _first(entry: Mapping[str, Any], *names: str) -> tuple[str, Any]:
    """The first of these keys that is not null, and what it is."""
    return next(((name, entry[name]) for name in names if entry.get(name) is not None), (names[0], None))


def _role(entry: Mapping[str, Any]) -> str:
    role = str(_first(entry, "role", "from")[1]).lower()
    return _NAMES.get(role, role)


def message(entry: Any, what: str) -> Message:
    """A message of a row: {"role", "content"} or {"from", "value"}, and what else the chat template may read.

    Values that are null count as missing: tables fill up messages that lack a key which others have. Raises BadRow.
    """
    if not isinstance(entry, Mapping):
        raise BadRow(f"{what} must be a mapping with role and content, not {type(entry).__name__}")
    (role_key, role), (content_key, content) = _first(entry, "role", "from"), _first(entry, "content", "value")
    if not isinstance(role, str):
        raise BadRow(f"{what} has no role")
    rest = {
        str(key): value
        for key, value in entry.items()
        if key not in (role_key, content_key, "weight") and not is_empty(value)
    }
    name = _role(entry)
    if name == _CALL:
        name, content, rest["tool_calls"] = "assistant", None, content
    if name not in ROLES:
        raise BadRow(f"{what} has the role {name!r}: must be {', '.join(ROLES[:-1])} or {ROLES[-1]}")
    if "tool_calls" in rest:
        rest["tool_calls"] = _calls(rest["tool_calls"], what)
    if "tools" in rest:
        rest["tools"] = tool_list(rest["tools"], f"{what}: tools")
        if rest["tools"] is None:
            raise BadRow(f"{what}: tools must be a list of objects")
    may_be_empty = name == "tool" or (name == "assistant" and "tool_calls" in rest)
    if may_be_empty and content is None:
        content = ""
    text = _content(content, f"{what}: its content", may_be_empty=may_be_empty)
    return Message(name, text, _fields(rest, what), _weight(entry.get("weight"), what))


def _content(content: Any, what: str, *, may_be_empty: bool) -> str:
    """A text, or the texts of a list of parts behind each other."""
    if not isinstance(content, list):
        return checked_text(content, what, may_be_empty=may_be_empty)
    texts = []
    for part in content:
        kind, text = (part.get("type"), part.get("text")) if isinstance(part, Mapping) else (None, part)
        if kind not in _TEXT_PARTS:
            raise BadRow(f"{what} has a part of the type {shown(kind)}: only text can be learnt")
        texts.append(checked_text(text, f"{what}, in one of its parts,", may_be_empty=True))
    return checked_text("".join(texts), what, may_be_empty=may_be_empty)


def _weight(value: Any, what: str) -> bool:
    """OpenAI's weight: 0 for a turn without loss."""
    if value is None:
        return True
    if value not in (0, 1):
        raise BadRow(f"{what} has the weight {shown(value)}: must be 0 (no loss on this turn) or 1")
    return bool(value)


def _calls(value: Any, what: str) -> list[Any]:
    """Calls of functions in OpenAI's form, their arguments as objects: templates write them as JSON themselves."""
    try:
        calls = parsed(value) if isinstance(value, str) else value
    except ValueError as error:
        raise BadRow(f"{what}: its call of a function cannot be read: {error}") from None
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise BadRow(f"{what}: tool_calls must be a list of objects, not {shown(value)}")
    found = []
    for call in calls:
        function = call.get("function", None if "name" not in call else call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRow(f"{what}: a call in tool_calls has no function with a name")
        given = function.get("arguments")
        if isinstance(given, str):
            try:
                given = json_rows.parsed(given) if given.strip() else {}
            except ValueError as error:
                raise BadRow(f"{what}: the arguments of {function['name']!r:.40}: {error}") from None
        own = {"arguments": given} if given is not None else {}
        function = _like(function, {**{key: entry for key, entry in function.items() if key != "arguments"}, **own})
        outer = call if "function" in call else {}
        found.append(_like(call, {"type": "function", **outer, "function": function}))
    return found


def _like(one: Mapping[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    return Struct(other) if isinstance(one, Struct) else other


def tool_list(value: Any, what: str) -> list[Any] | None:
    """The functions that a cell lists, as objects or as their JSON; None where it is something else. Raises BadRow."""
    if isinstance(value, str):
        try:
            value = parsed(value)
        except RepeatedKeyError as error:
            raise BadRow(f"{what}: {error}") from None
        except ValueError:
            return None
    if not isinstance(value, list) or not value or not all(isinstance(entry, Mapping) for entry in value):
        return None
    return value


def _fields(rest: Mapping[str, Any], what: str) -> str:
    """JSON of further keys of a message; empty if there are none."""
    if not rest:
        return ""
    try:
        text = json.dumps(_without_filling(rest), ensure_ascii=False, default=str)
    except (RecursionError, ValueError, TypeError):
        raise BadRow(f"{what}: {', '.join(rest):.60} cannot be written as JSON") from None
    return checked_text(text, what)


def _without_filling(value: Any) -> Any:
    """A value without the nulls with which a table fills up structs; every other null was written by somebody."""
    if isinstance(value, Mapping):
        filled = isinstance(value, Struct)
        return {str(key): _without_filling(entry) for key, entry in value.items() if not (filled and entry is None)}
    return [_without_filling(entry) for entry in value] if isinstance(value, list) else value


def with_tools(messages: tuple[Message, ...], tools: list[Any], what: str) -> tuple[Message, ...]:
    """Messages whose first one says which functions may be called."""
    first = messages[0]
    fields = {**json.loads(first.fields or "{}"), "tools": tools}
    return (Message(first.role, first.content, _fields(fields, what), first.learn), *messages[1:])
