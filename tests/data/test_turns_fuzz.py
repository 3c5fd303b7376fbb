"""Damaged conversations in every format: a row is learnt whole, refused with a reason, or dropped and counted."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rlhf.config.schema import DataConfig, LossOn, SourceConfig, SplitConfig
from rlhf.data.collate import collate_sft
from rlhf.data.conversation import Conversation, Message, Refused
from rlhf.data.encode import Encoder
from rlhf.data.formats import conversations

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1, null]}'}}
TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b", "weight": 0},
    {"role": "user", "content": [{"type": "text", "text": "c"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "42", "tool_call_id": "c1"},
    {"role": "assistant", "content": "d", "reasoning_content": "r"},
]
OTHER = [*TURNS[:-1], {"role": "assistant", "content": "e"}]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "x"}] * 2
MARKED = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: "
GOOD: list[tuple[str, dict[str, Any]]] = [
    ("conversational", {"messages": TURNS, "tools": [{"type": "function", "function": {"name": "f"}}], "id": 7}),
    ("conversational", {"conversations": SHAREGPT, "system": "s"}),
    ("conversational", {"messages": json.dumps(TURNS)}),
    ("preference", {"prompt": "a", "chosen": TURNS, "rejected": OTHER}),
    ("preference", {"prompt": TURNS[:2], "chosen": TURNS[2:], "rejected": OTHER[2:]}),
    ("preference", {"chosen": TURNS, "rejected": OTHER}),
    ("completion", {"prompt": TURNS[:-1], "completion": TURNS[-1:], "label": "True"}),
    ("scored_pair", {"prompt": "a", "answer_0": TURNS, "answer_1": OTHER, "score_0": 1, "score_1": "2"}),
    ("instruction", {"instruction": "i", "input": "j", "output": "o", "history": [["a", "b"], ["c", "d"]]}),
    ("transcript", {"chosen": f"{MARKED}d", "rejected": f"{MARKED}e"}),
    ("transcript", {"prompt": MARKED, "chosen": " d", "rejected": f"{MARKED} e"}),
    ("prompt", {"prompt": TURNS[:-1], "system": "s"}),
]
ODD: list[Any] = [
    None,
    "",
    "  ",
    0,
    -1.5,
    True,
    [],
    {},
    [[]],
    [None],
    [{}],
    {"role": "user"},
    SHAREGPT,
    "\ud800",
    "</s>",
]
ODD += [float("nan"), 10**400, "\x00", "\n\nHuman:", [["a"]], "[{'role': 'user'", json.dumps(SHAREGPT), b"x", {"a": {}}]
ODD += [
    {"type": "image"},
    [{"type": "text"}],
    "user",
    "assistant",
    "tool",
    "developer",
    "{{ x }}",
    {"\ud800": 1},
    ("a", "b"),
]
DEEP: Any = "x"
for _ in range(600):
    DEEP = [DEEP]
TEMPLATES = {
    "scratch": None,
    "tools": (
        "{{ tools | tojson if tools else '' }}{% for m in messages %}<|user|>{{ m.role }}: {{ m.content }}"
        "{{ m.tool_calls | tojson if m.tool_calls else '' }}{{ m.reasoning_content or '' }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<|user|>assistant: {% endif %}"
    ),
    "strict": (
        "{% for m in messages %}{% if m.role == 'system' and not loop.first or m.role == 'tool' %}"
        "{{ raise_exception('no') }}{% endif %}<|user|>{{ m.content | trim if loop.last else m.content | upper }}"
        "{{ eos_token }}{% endfor %}<|assistant|>"
    ),
}


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a value with every key of it."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def mutated(row: dict[str, Any], luck: random.Random) -> dict[str, Any]:
    """A row with something in it removed, renamed, doubled or replaced, at any depth."""
    row = copy.deepcopy(row)
    for _ in range(luck.randint(1, 3)):
        found = list(places(row))
        if not found:
            break
        container, key = luck.choice(found)
        choice = luck.random()
        if choice < 0.2:
            del container[key]
        elif choice < 0.3 and isinstance(container, list):
            container.insert(luck.randrange(len(container) + 1), copy.deepcopy(container[key]))
        elif choice < 0.4 and isinstance(container, dict):
            container[f"{key}x"] = container.pop(key)
        elif choice < 0.5 and isinstance(container[key], list):
            container[key] = luck.choice([str, json.dumps])(container[key][:])
        elif choice < 0.98:
            container[key] = copy.deepcopy(luck.choice(ODD))
        else:
            container[key] = DEEP
            break
    return row


def encode(tokenizer: Any, row: Any, form: str, luck: random.Random, *, rm: float = 1.0) -> str:
    """What became of a row, having checked that something did."""
    source = SourceConfig(format=form)
    (entry,) = conversations([("here", row)], source, name="main")
    if isinstance(entry, Refused):
        assert entry.reason and len(entry.reason) < 1000
        return "refused"
    assert isinstance(entry, Conversation)
    split = SplitConfig(sft=1.0, rm=rm, ppo=0.0, held_out=luck.choice([0.0, 0.5]))
    data = DataConfig(sources={"main": source}, split=split, loss_on=luck.choice(list(LossOn)), max_prompt_length=5000)
    # One that any template takes stands beside it.
    beside = (Message("user", "plain"),)
    plain = Conversation(messages=beside, chosen="x", rejected="y", source="main", where="beside")
    found = Encoder(data, tokenizer).encode([entry, plain])
    rows = [one for own in found.rows.values() for one in own if one["where"] != "beside"]
    assert rows or sum(found.dropped.values()), row
    for one in found.rows.get("sft_train", []):
        batch = collate_sft([one], pad_id=tokenizer.pad_token_id)
        assert batch.loss_mask.any() and batch.loss_mask.shape == batch.sequence_ids.shape
    assert all("".join(key).encode() for key in (*found.unread, *found.notes))
    return "learnt" if rows else "dropped"


@pytest.mark.parametrize("template", TEMPLATES)
def test_damaged_conversations_never_end_in_a_traceback(template: str, tokenizer_of: Callable[..., Any]) -> None:
    luck = random.Random(template)
    tokenizer = tokenizer_of(TEMPLATES[template])
    outcomes = {"learnt": 0, "refused": 0, "dropped": 0}
    for number in range(2500):
        form, row = GOOD[number % len(GOOD)]
        outcomes[encode(tokenizer, mutated(row, luck), form, luck, rm=float(number % 2))] += 1
    assert outcomes["learnt"] > 50 and outcomes["refused"] > 200 and outcomes["dropped"] > 10


def test_the_rows_that_are_damaged_are_good_ones(tokenizer_of: Callable[..., Any]) -> None:
    tokenizer = tokenizer_of(TEMPLATES["tools"])
    for form, row in GOOD[:-1]:
        assert encode(tokenizer, row, form, random.Random(0), rm=0.0) == "learnt", (form, row)
