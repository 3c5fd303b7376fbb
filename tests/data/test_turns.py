"""Conversations of several turns: no turn is lost, the loss is on the answers that are meant, texts stay as is."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from shown import encoded, refusal, shown

from rlhf.config.schema import LossOn, SourceConfig
from rlhf.data.collate import collate_sft
from rlhf.data.conversation import Refused
from rlhf.data.encode import OPENING, REWRITTEN, SPACED
from rlhf.data.formats import conversations
from rlhf.data.readers import read_rows
from rlhf.models.tokenizer import DEFAULT_TEMPLATE, SCRATCH_TEMPLATE
from rlhf.rollout.prompts import prompt_batch

CHAT, PAIR, ANSWER = (SourceConfig(format=form) for form in ("conversational", "preference", "completion"))
CHATML = (
    "{% for m in messages %}<|user|>{{ m.role }}\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant\n{% endif %}"
)
# As Qwen3 has it: what an assistant thought is cut from earlier turns.
FORGETS = CHATML.replace(
    "m.content }}", "(m.content if loop.last or m.role != 'assistant' else m.content.split('|')[-1]) }}"
)
TRIMS = CHATML.replace("m.content }}", "m.content | trim }}")
UNMARKED = SCRATCH_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
TEMPLATES = {
    "scratch": SCRATCH_TEMPLATE,
    "default": DEFAULT_TEMPLATE,
    "unmarked": UNMARKED,
    "chatml": CHATML,
    "forgets": FORGETS,
    "trims": TRIMS,
}


def user(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def assistant(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


FOUR = [user("a"), assistant("b"), user("c"), assistant("d")]
FRUIT = [user("Name a colour."), assistant("Red."), user("And a fruit?")]
ASKED = "<s><|user|>Name a colour.<|assistant|>Red.</s><|user|>And a fruit?<|assistant|>"
APPLE = [f"{ASKED}«An apple.</s>»", f"{ASKED}«A stone.</s>»"]


@pytest.mark.parametrize(
    ("prompt", "before"),
    [
        ("Name a colour.", FRUIT),  # Repeated at the beginning,
        ("And a fruit?", FRUIT),  # at the end,
        ("Name a colour.", FRUIT[1:]),  # gone on from,
        (FRUIT, FRUIT),  # whole,
        (FRUIT, FRUIT[-1:]),  # in part,
        (FRUIT, []),  # or not at all.
        (FRUIT[:1], FRUIT[1:]),
        (json.dumps(FRUIT), FRUIT),
        (None, FRUIT),
    ],
)
def test_turns_before_an_answer_repeat_the_prompt_or_go_on_from_it(
    prompt: Any, before: list[Any], tokenizer_of: Callable[..., Any]
) -> None:
    row = {"prompt": prompt, "chosen": [*before, assistant("An apple.")], "rejected": [*before, assistant("A stone.")]}
    assert shown(tokenizer_of(), [row], PAIR, stage="rm") == APPLE
    assert shown(tokenizer_of(), [row], PAIR, stage="ppo") == [ASKED]
    assert shown(tokenizer_of(), [row], PAIR, stage="sft") == APPLE[:1]
    scored = {"prompt": prompt, "answer_0": row["rejected"], "answer_1": row["chosen"], "score_0": 1, "score_1": 2}
    assert shown(tokenizer_of(), [scored], SourceConfig(format="scored_pair"), stage="rm") == APPLE
    completion = {"prompt": prompt, "completion": row["chosen"]}
    assert shown(tokenizer_of(), [completion], ANSWER) == APPLE[:1]


def test_a_system_turn_is_kept_from_either_side(tokenizer_of: Callable[..., Any]) -> None:
    system = {"role": "system", "content": "Be brief."}
    expected = [f"<s><|system|>Be brief.<|user|>Hi<|assistant|>«{text}</s>»" for text in ("Yo", "Go")]
    for prompt, before, more in (
        ("Hi", [system, user("Hi")], {}),
        ([system, user("Hi")], [user("Hi")], {}),
        ([system], [user("Hi")], {}),
        ("Hi", [], {"system": "Be brief."}),
        ([system, user("Hi")], [system, user("Hi")], {"system": "Be brief."}),
    ):
        sides = {side: [*before, assistant(text)] for side, text in (("chosen", "Yo"), ("rejected", "Go"))}
        assert shown(tokenizer_of(), [{"prompt": prompt, **sides, **more}], PAIR, stage="rm") == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"prompt": "a", "chosen": FOUR, "rejected": [user("a"), assistant("z"), user("c"), assistant("x")]},
            "chosen and rejected must be the same conversation but for the last message",
        ),
        ({"prompt": "a", "chosen": FOUR, "rejected": "x"}, "must be the same conversation but for the last message"),
        ({"prompt": "other", "chosen": FOUR, "rejected": FOUR}, '"chosen" begins with other turns than "prompt"'),
        (
            {"prompt": [{"role": "system", "content": "s"}, user("a")], "system": "t", "chosen": "x", "rejected": "y"},
            '"system" is another system message',
        ),
        (
            {"prompt": [{"role": "system", "content": "s"}, user("a")], "rejected": "y"}
            | {"chosen": [{"role": "system", "content": "t"}, user("a"), assistant("x")]},
            "another system message",
        ),
        (
            {"prompt": "a", "chosen": [user("a"), assistant("x"), user("y")], "rejected": "z"},
            "must end with the assistant",
        ),
        ({"prompt": [user("a"), assistant("b")], "chosen": "x", "rejected": "y"}, "ends with the assistant's message"),
        ({"prompt": "a", "chosen": FOUR, "rejected": FOUR}, "chosen and rejected are equal"),
    ],
)
def test_sides_that_took_different_turns_are_refused(row: dict[str, Any], reason: str) -> None:
    assert reason in refusal(row, PAIR)


def test_loss_on_last_all_or_by_what_the_row_is(tokenizer_of: Callable[..., Any]) -> None:
    tokenizer = tokenizer_of()
    all_of, last = (f"<s><|user|>a<|assistant|>{b}<|user|>c<|assistant|>«d</s>»" for b in ("«b</s>»", "b</s>"))
    prompted = {"prompt": FOUR[:-1], "completion": "d"}
    pair = {"prompt": FOUR[:-1], "chosen": "d", "rejected": "e"}
    transcript = {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d"}
    both = {**transcript, "rejected": transcript["chosen"] + "e"}
    marks = SourceConfig(format="transcript")
    for row, source, auto in (
        ({"messages": FOUR}, CHAT, all_of),
        (transcript, marks, all_of),
        (both, marks, last),
        (prompted, ANSWER, last),
        (pair, PAIR, last),
    ):
        assert shown(tokenizer, [row], source) == [auto]
        assert shown(tokenizer, [row], source, loss_on=LossOn.last) == [last]
        assert shown(tokenizer, [row], source, loss_on=LossOn.all) == [all_of]
    # Earlier answers are learnt once, not with each side.
    rejected = shown(tokenizer, [pair], PAIR, loss_on=LossOn.all, sft_on_rejected=True)
    assert rejected == [all_of, last.replace("d</s>", "e</s>")]


def test_a_weight_of_0_takes_the_loss_off_a_turn(tokenizer_of: Callable[..., Any]) -> None:
    for template in (SCRATCH_TEMPLATE, UNMARKED):
        tokenizer = tokenizer_of(template)
        rows = [
            {"messages": [user("a", weight=1), assistant("b", weight=first), user("c"), assistant("d", weight=second)]}
            for first, second in ((0, 1), (1, 0), (0.0, None))
        ]
        assert shown(tokenizer, rows, CHAT) == [
            "<s><|user|>a<|assistant|>b</s><|user|>c<|assistant|>«d</s>»",
            "<s><|user|>a<|assistant|>«b</s>»<|user|>c<|assistant|>d</s>",
            "<s><|user|>a<|assistant|>b</s><|user|>c<|assistant|>«d</s>»",
        ]
    nothing = encoded(tokenizer_of(), [{"messages": [user("a"), assistant("b", weight=0)]}], CHAT)
    assert not nothing.rows and nothing.dropped == {("main", "sft: no answer that is to be learnt (weight 0)"): 1}
    assert "must be 0 (no loss on this turn) or 1" in refusal({"messages": [user("a"), assistant("b", weight=2)]}, CHAT)


def test_our_templates_mark_what_the_loss_is_on(tokenizer_of: Callable[..., Any]) -> None:
    """Which is what TRL's `assistant_only_loss` reads: transformers' mask of the assistant's tokens."""
    turns = [{"role": "system", "content": "s"}, *FOUR, user("  e\n"), assistant("\tf  ")]
    for template in (SCRATCH_TEMPLATE, DEFAULT_TEMPLATE):
        tokenizer = tokenizer_of(template)
        theirs = tokenizer.apply_chat_template(turns, return_assistant_tokens_mask=True, return_dict=True)
        (row,) = encoded(tokenizer, [{"messages": turns}], CHAT).rows["sft_train"]
        batch = collate_sft([row], pad_id=tokenizer.pad_token_id)
        assert batch.sequence_ids[0].tolist() == theirs["input_ids"]
        assert batch.loss_mask[0].int().tolist() == theirs["assistant_masks"]
        assert sum(theirs["assistant_masks"]) > 8


def test_a_template_that_rewrites_history_gets_a_row_for_each_answer(tokenizer_of: Callable[..., Any]) -> None:
    turns = [user("a"), assistant("t|b"), user("c"), assistant("u|d", weight=0), user("e"), assistant("v|f")]
    found = encoded(tokenizer_of(FORGETS), [{"messages": turns}], CHAT)
    assert found.notes == {("main", REWRITTEN): 1}
    assert [row["where"] for row in found.rows["sft_train"]] == ["row 1, message 2", "row 1"]
    head = "<|user|>user\na</s>\n<|user|>assistant\n"
    assert shown(tokenizer_of(FORGETS), [{"messages": turns}], CHAT) == [
        f"{head}«t|b</s>»",
        f"{head}b</s>\n<|user|>user\nc</s>\n<|user|>assistant\nd</s>\n<|user|>user\ne</s>\n<|user|>assistant\n«v|f</s>»",
    ]
    # Where it has nothing to rewrite the conversation is one row.
    assert len(shown(tokenizer_of(FORGETS), [{"messages": FOUR}], CHAT)) == 1
    # What the assistant says before anybody asks is only found by marks.
    opened = [assistant("t|hi"), *FOUR]
    assert encoded(tokenizer_of(FORGETS), [{"messages": opened}], CHAT).notes == {
        ("main", REWRITTEN): 1,
        ("main", OPENING): 1,
    }
    assert shown(tokenizer_of(), [{"messages": opened}], CHAT)[0].startswith("<s><|assistant|>«t|hi</s>»<|user|>a")


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_answer_of_any_conversation_is_learnt_once_and_whole(name: str, tokenizer_of: Callable[..., Any]) -> None:
    luck = random.Random(name)
    tokenizer = tokenizer_of(TEMPLATES[name])
    pieces = ["a", " b", "\n", "  ", "|x", "é", "映画", "</s>", "<|user|>", "word two", "\tc", "{{ x }}", "\u0000"]
    if name == "forgets":
        pieces.remove("<|user|>")  # It would cut the token apart, so that such a row is refused.
    for number in range(150):
        turns, wanted = [], []
        if luck.random() < 0.3:
            turns.append({"role": "system", "content": "sys"})
        for _ in range(luck.randint(1, 4)):
            # Unlike every other answer, so that it can be told from them.
            said = [f"{kind}{number}" + "".join(luck.choices(pieces, k=luck.randint(0, 4))) for kind in "qa"]
            said = [luck.choice(["", " ", "\n    "]) + text for text in said]
            weight = luck.choice([None, 1, 0])
            turns += [user(said[0]), assistant(said[1], weight=weight)]
            wanted += [said[1] + "</s>"] if weight != 0 else []
        learnt: list[str] = []
        for text in shown(tokenizer, [{"messages": turns}], CHAT, max_prompt_length=2000):
            learnt += [piece.partition("»")[0] for piece in text.split("«")[1:]]
        assert sorted(learnt) == sorted(wanted), turns


def test_texts_are_kept_as_they_are(tokenizer_of: Callable[..., Any]) -> None:
    code = {"prompt": "def f(x):\n", "completion": "    y = x + 1\n    return y\n"}
    for template in (SCRATCH_TEMPLATE, DEFAULT_TEMPLATE, CHATML, TRIMS):
        (text,) = shown(tokenizer_of(template), [code], ANSWER)
        assert text.endswith("«    y = x + 1\n    return y\n</s>»")
    trimmed = encoded(tokenizer_of(TRIMS), [code], ANSWER)
    assert trimmed.notes == {("main", SPACED): 1} and not encoded(tokenizer_of(CHATML), [code], ANSWER).notes
    # Pairs that differ in nothing else are pairs.
    pair = {"prompt": "p", "chosen": "    x", "rejected": "  x"}
    start = "<s><|user|>p<|assistant|>"
    assert shown(tokenizer_of(), [pair], PAIR, stage="rm") == [f"{start}«    x</s>»", f"{start}«  x</s>»"]
    alpaca = {"instruction": "a \n", "input": " b ", "output": " c\n", "system": " s "}
    assert shown(tokenizer_of(), [alpaca], SourceConfig(format="instruction")) == [
        "<s><|system|> s <|user|>a \n\n\n b <|assistant|>« c\n</s>»"
    ]


TRANSCRIPTS = [
    ({"chosen": "\n\nHuman: a\n\nAssistant:     b\n"}, "a", "    b\n"),
    ({"chosen": "Human: a\r\n\r\nAssistant: b\r\nc"}, "a", "b\r\nc"),
    ({"prompt": "\n\nHuman: a\n\nAssistant:", "chosen": "     b"}, "a", "    b"),
    ({"prompt": "\n\nHuman: a\n\nAssistant: ", "chosen": "    b"}, "a", "    b"),
    ({"prompt": "Human: a\n\n", "chosen": "Assistant: b "}, "a", "b "),
    ({"prompt": "Human: a\r\n\r\n", "chosen": "    b"}, "a", "    b"),
    ({"chosen": "\n\nHuman: a\n \n\nAssistant:\nb"}, "a\n ", "b"),
]


@pytest.mark.parametrize(("row", "asked", "answer"), TRANSCRIPTS)
def test_white_space_of_marks_and_of_texts(
    row: dict[str, Any], asked: str, answer: str, tokenizer_of: Callable[..., Any]
) -> None:
    expected = f"<s><|user|>{asked}<|assistant|>«{answer}</s>»"
    assert shown(tokenizer_of(), [row], SourceConfig(format="transcript")) == [expected]


def test_turns_behind_the_prompt_of_a_transcript_are_turns(tokenizer_of: Callable[..., Any]) -> None:
    source = SourceConfig(format="transcript", markers=["USER:", "ASSISTANT:"])
    rows = [
        {"prompt": "USER: a ASSISTANT:", "chosen": " b USER: c ASSISTANT: d"},
        {"prompt": "USER: a", "chosen": "USER: a ASSISTANT: b USER: c ASSISTANT: d"},
    ]
    expected = "<s><|user|>a<|assistant|>b</s><|user|>c<|assistant|>«d</s>»"
    assert shown(tokenizer_of(), rows, source) == [expected, expected]
    assert "must end with the assistant's turn" in refusal({"prompt": "USER: a", "chosen": "b USER: c"}, source)


@pytest.mark.parametrize(
    "turns",
    [
        json.dumps(FOUR),
        str(FOUR),
        [{"role": None, "content": None, "from": one["role"], "value": one["content"]} for one in FOUR],
        [{**one, "from": None, "value": None, "tool_calls": None, "weight": None, "name": ""} for one in FOUR],
        [{"from": {"user": "human", "assistant": "GPT"}[one["role"]], "value": one["content"]} for one in FOUR],
        [{**one, "content": [{"type": "text", "text": one["content"], "image_url": None}]} for one in FOUR],
        [{"role": {"user": "user", "assistant": "model"}[one["role"]], "content": [one["content"]]} for one in FOUR],
    ],
)
def test_messages_in_every_spelling(turns: Any, tokenizer_of: Callable[..., Any]) -> None:
    found = encoded(tokenizer_of(), [{"messages": turns}], CHAT)
    assert not found.unread
    assert shown(tokenizer_of(), [{"messages": turns}], CHAT) == shown(tokenizer_of(), [{"messages": FOUR}], CHAT)


def test_text_that_is_messages_is_read_as_messages_or_refused(tokenizer_of: Callable[..., Any]) -> None:
    chosen, rejected = json.dumps([user("a"), assistant("b")]), str([user("a"), assistant("c")])
    start = "<s><|user|>a<|assistant|>"
    for row in ({"prompt": "a", "chosen": chosen, "rejected": rejected}, {"chosen": chosen, "rejected": rejected}):
        assert shown(tokenizer_of(), [row], PAIR, stage="rm") == [f"{start}«b</s>»", f"{start}«c</s>»"]
    one = json.dumps(assistant("b"))
    assert shown(tokenizer_of(), [{"prompt": "a", "completion": one}], ANSWER) == [f"{start}«b</s>»"]
    # An answer may be JSON of another kind.
    for text in ('{"a": 1}', "[1, 2]", '[{"name": "x"}]', '{"role": "admin", "value": 3}', "[{'a'", "{role: user}"):
        assert shown(tokenizer_of(), [{"prompt": "a", "completion": text}], ANSWER) == [f"{start}«{text}</s>»"]
    for text in (chosen[:-2], chosen.replace("}, {", "}\n {"), str([user("a"), assistant("b")])[:-1]):
        assert "looks like messages written out as text" in refusal({"prompt": "a", "completion": text}, ANSWER)
    assert "message 2 must be a mapping" in refusal({"messages": json.dumps([user("a"), "b"])}, CHAT)


@pytest.mark.parametrize("label", [True, 1, 1.0, "True", "true", "1", " TRUE ", "yes"])
def test_labels_as_tables_write_them(label: Any, tokenizer_of: Callable[..., Any]) -> None:
    assert len(shown(tokenizer_of(), [{"prompt": "a", "completion": "b", "label": label}], ANSWER)) == 1


@pytest.mark.parametrize("label", [False, 0, "False", "0", "no", 0.0])
def test_labels_of_bad_answers(label: Any) -> None:
    assert refusal({"prompt": "a", "completion": "b", "label": label}, ANSWER) == "labelled as a bad answer"
    for wrong in ("good", 2, "2", [True]):
        assert "must be true or false" in refusal({"prompt": "a", "completion": "b", "label": wrong}, ANSWER)
    assert refusal({"messages": FOUR, "label": label}, CHAT) == "labelled as a bad answer"


@pytest.mark.parametrize("label", [None, "", []])
def test_a_label_that_says_nothing_is_dropped_and_counted(label: Any, tokenizer_of: Callable[..., Any]) -> None:
    rows = [{"prompt": "a", "completion": "b", "label": label}, {"messages": FOUR, "label": label}]
    for row, source in zip(rows, (ANSWER, CHAT), strict=True):
        (found,) = conversations([("here", row)], source, name="main")
        assert isinstance(found, Refused) and not found.bad
        assert found.reason == '"label" is null or empty, so nobody says that the answer is a good one'
        # A column of that name that means something else.
        assert len(shown(tokenizer_of(), [row], replace(source, columns={"label": "none"}))) == 1
    assert len(shown(tokenizer_of(), [{"prompt": "a", "completion": "b"}], ANSWER)) == 1


@pytest.mark.parametrize("column", ["image", "images", "videos", "audio"])
def test_rows_with_pictures_or_sound_are_refused(column: str, tokenizer_of: Callable[..., Any]) -> None:
    for given in ("cat.png", ["cat.png"], {"bytes": b"x", "path": None}):
        for row, source in (({"messages": FOUR}, CHAT), ({"prompt": "p", "chosen": "c", "rejected": "r"}, PAIR)):
            assert refusal({**row, column: given}, source).startswith(
                f'"{column}" is not empty: only text can be learnt'
            )
    for empty in (None, [], ""):
        assert len(shown(tokenizer_of(), [{"messages": FOUR, column: empty}], CHAT)) == 1
    assert (
        len(shown(tokenizer_of(), [{column: "p", "completion": "c"}], replace(ANSWER, columns={"prompt": column}))) == 1
    )


def test_nulls_of_calls_and_tools_are_kept_and_those_of_tables_are_not(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"unit": {"type": "string", "default": None}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    arguments = {"city": "Rome", "unit": None, "days": [1, None, {"x": None}]}

    def fields(row: dict[str, Any]) -> tuple[Any, Any]:
        (found,) = conversations([("here", row)], CHAT, name="main")
        assert not isinstance(found, Refused), found.reason
        (call,) = json.loads(found.chosen_fields)["tool_calls"]
        return json.loads(found.messages[0].fields)["tools"], call["function"].get("arguments")

    for given in (arguments, json.dumps(arguments)):
        calls = [{"type": "function", "function": {"name": "f", "arguments": given}}]
        for written in (calls, json.dumps(calls), calls[0]["function"]):
            turns = [user("a"), assistant(None, tool_calls=written)]
            assert fields({"messages": turns, "tools": tools}) == (tools, arguments)
            assert fields({"messages": json.dumps(turns), "tools": json.dumps(tools)}) == (tools, arguments)
    # A struct of a table has the keys of all rows: null are those that its own row lacks.
    calls = [
        {"function": {"name": "f", "arguments": {"city": "Rome"}}},
        {"function": {"name": "f", "arguments": {"x": 1}}},
    ]
    rows = [{"messages": [user("a"), assistant("b", tool_calls=[call])], "tools": tools} for call in calls]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    read = [row for _, row in read_rows(tmp_path / "rows.parquet", source="main", limit=10**6)]
    assert read[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome", "x": None}
    told = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    told[0]["function"]["parameters"]["properties"] = {"unit": {"type": "string"}}
    assert [fields(row) for row in read] == [(told, {"city": "Rome"}), (told, {"x": 1})]
    # As text they stand as they were written.
    texts = [{"messages": json.dumps([user("a"), assistant("b", tool_calls=[{"name": "f", "arguments": arguments}])])}]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{**texts[0], "tools": json.dumps(tools)}]), tmp_path / "t.parquet"
    )
    ((_, row),) = read_rows(tmp_path / "t.parquet", source="main", limit=10**6)
    assert fields(row) == (tools, arguments)


def test_what_nobody_reads_is_counted(tokenizer_of: Callable[..., Any]) -> None:
    rows = [
        {
            "messages": [user("a", id=1), assistant("b", reasoning_content="r")],
            "tags": ["x"],
            "empty": [],
            "null": None,
        },
        {"messages": [user("a"), assistant("b")], "meta": {"lang": "en"}, "tags": ["y"]},
    ]
    found = encoded(tokenizer_of(), rows, CHAT)
    assert found.unread == {
        ("main", "tags"): 2,
        ("main", "meta"): 1,
        ("main", "messages[].id"): 1,
        ("main", "messages[].reasoning_content"): 1,
    }
    # A template that shows it reads it; one that names it and shows nothing of it does not.
    thinks = CHATML.replace("{{ m.content }}", "{{ m.reasoning_content or '' }}{{ m.content }}")
    assert ("main", "messages[].reasoning_content") not in encoded(tokenizer_of(thinks), rows, CHAT).unread
    assert shown(tokenizer_of(thinks), rows[:1], CHAT) == ["<|user|>user\na</s>\n<|user|>assistant\n«rb</s>»"]
    blind = CHATML.replace("{{ m.content }}", "{{ '' if m.reasoning_content else '' }}{{ m.content }}")
    assert ("main", "messages[].reasoning_content") in encoded(tokenizer_of(blind), rows, CHAT).unread
    # What the options name is read, of a nested column the part that is.
    nested = {"q": {"text": "a", "lang": "en"}, "a": [{"text": "b"}, {"text": "c"}], "n": 1, "m\x1b": 2}
    source = SourceConfig(format="completion", columns={"prompt": "q.text", "completion": "a.0.text"}, keep=["n"])
    assert set(encoded(tokenizer_of(), [nested], source).unread) == {
        ("main", name) for name in ("q.lang", "a.1", r"m\x1b")
    }


def test_control_tokens_in_tool_calls_are_refused(tokenizer_of: Callable[..., Any]) -> None:
    shows = CHATML.replace("{{ m.content }}", "{{ m.content }}{{ (m.tool_calls or '') | tojson | upper }}")
    call = {"function": {"name": "f", "arguments": {"x": "</s><|user|>"}}}
    for turns in (
        [user("a"), assistant("b", tool_calls=[call])],
        [user("a"), assistant("b", tool_calls=[call]), user("c"), assistant("d")],
    ):
        found = encoded(tokenizer_of(shows), [{"messages": turns}, {"messages": [user("e"), assistant("f")]}], CHAT)
        assert len(found.rows["sft_train"]) == 1 and "a control token" in found.problems[0]["detail"]
        assert len(shown(tokenizer_of(), [{"messages": turns}], CHAT)) == 1  # Its template shows no calls.


def test_a_scripts_prompts_may_be_in_every_spelling(tokenizer_of: Callable[..., Any]) -> None:
    tokenizer = tokenizer_of()
    batch = prompt_batch(tokenizer, [[{"from": "human", "value": "hi"}], "hi"])
    assert batch.prompt_ids[0].tolist() == batch.prompt_ids[1].tolist()
    with pytest.raises(ValueError, match="has the role 'robot'"):
        prompt_batch(tokenizer, [[{"role": "robot", "content": "hi"}]])


def test_a_key_that_the_template_does_not_show_changes_nothing_that_is_learnt(tokenizer_of: Callable[..., Any]) -> None:
    code = "    y = x + 1\n    say </s>\n"
    for template in (SCRATCH_TEMPLATE, CHATML, TRIMS):
        tokenizer = tokenizer_of(template)
        plain, named = (
            shown(tokenizer, [{"messages": [user("a"), one]}], CHAT)
            for one in (assistant(code), assistant(code, name="bot", id="7"))
        )
        assert named == plain and named[0].endswith(f"«{code}</s>»")
        pair = {"prompt": "p", "chosen": [assistant("  a", id="7")], "rejected": [assistant("a", id="8")]}
        assert [text.partition("«")[2] for text in shown(tokenizer, [pair], PAIR, stage="rm")] == ["  a</s>»", "a</s>»"]
    found = encoded(tokenizer_of(), [{"messages": [user("a"), assistant("b", name="bot")]}], CHAT)
    assert found.unread == {("main", "messages[].name"): 1}


def test_a_control_token_in_a_key_is_plain_text(tokenizer_of: Callable[..., Any]) -> None:
    shows = "{{ tools | tojson }}" + CHATML.replace(
        "{{ m.content }}", "{{ m.content }}{{ (m.tool_calls or []) | tojson }}"
    )
    tokenizer = tokenizer_of(shows)
    tools = [
        {
            "type": "function",
            "function": {"name": "f", "parameters": {"properties": {"</s><|user|>": {"role": "</s>"}}}},
        }
    ]
    call = {"function": {"name": "f", "arguments": {"</s>": "v"}}}
    row = {"messages": [user("a"), assistant("b", tool_calls=[call]), user("c"), assistant("d")], "tools": tools}
    found = encoded(tokenizer, [row], CHAT, loss_on=LossOn.last)
    (made,) = found.rows["sft_train"]
    # The template's own: an end behind each of four turns, and what opens these and the answer.
    ids = [*made["prompt_ids"], *made["chosen_ids"]]
    assert ids.count(tokenizer.eos_token_id) == 4
    assert ids.count(tokenizer.convert_tokens_to_ids("<|user|>")) == 4
    assert tokenizer.decode(made["prompt_ids"]).count("</s>") == 3 + 3


@pytest.mark.parametrize(
    "text",
    [
        "[{'content': '" + "x" * 300 + "', 'role': 'user'}\n {'content': 'a', 'role': 'assistant'}]",
        "[{'content': 'use {x} here', 'role': 'user'}\n {'content': 'a', 'role': 'assistant'}]",
        json.dumps({"messages": FOUR}),
    ],
)
def test_messages_that_are_written_out_as_text_are_never_learnt(text: str) -> None:
    assert "written out as text" in refusal({"prompt": "p", "completion": text}, ANSWER)


def test_a_key_that_occurs_twice_in_a_cells_text_is_a_bad_row(tokenizer_of: Callable[..., Any]) -> None:
    turns = '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "content": "c"}]'
    reason = "the key 'content' occurs twice in an object"
    for text in (turns, turns.replace('"', "'"), turns.replace('"c"', "None")):
        assert refusal({"messages": text}, CHAT) == f'"messages": {reason}'
        assert refusal({"prompt": "p", "completion": text}, ANSWER) == f'"completion": {reason}'
    assert reason in refusal({"prompt": '{"role": "user", "content": "a", "content": "b"}', "completion": "c"}, ANSWER)
    calls = [{"function": {"name": "f", "arguments": '{"x": 1, "y": {"z": 1, "z": 2}}'}}]
    row = {"messages": [user("a"), assistant(None, tool_calls=calls)]}
    assert refusal(row, CHAT) == "\"messages\", message 2: the arguments of 'f': the key 'z' occurs twice in an object"
    row = {"messages": [user("a"), assistant(None, tool_calls='[{"name": "f", "name": "g"}]')]}
    assert "the key 'name' occurs twice" in refusal(row, CHAT)
    row = {"messages": [user("a"), assistant("b")], "tools": '[{"name": "f", "name": "g"}]'}
    assert refusal(row, CHAT) == "\"tools\": the key 'name' occurs twice in an object"
    pairs = {"instruction": "i", "output": "o", "history": '[["a", {"b": 1, "b": 2}]]'}
    assert "the key 'b' occurs twice" in refusal(pairs, SourceConfig(format="instruction"))
    # What only looks like that is an answer.
    answer = '{"x": 1, "x": 2}'
    assert shown(tokenizer_of(), [{"prompt": "p", "completion": answer}], ANSWER)[0].endswith(f"«{answer}</s>»")


def test_messages_that_were_written_as_json_twice_are_read(tokenizer_of: Callable[..., Any]) -> None:
    row = {"prompt": "p", "completion": json.dumps(json.dumps([assistant("a")]))}
    assert shown(tokenizer_of(), [row], ANSWER) == ["<s><|user|>p<|assistant|>«a</s>»"]
    quoted = {"prompt": "p", "completion": '"[1, 2]"'}
    assert shown(tokenizer_of(), [quoted], ANSWER) == ['<s><|user|>p<|assistant|>«"[1, 2]"</s>»']


def test_prompts_that_contradict_each_other_in_their_calls_are_refused(tokenizer_of: Callable[..., Any]) -> None:
    def called(value: int) -> list[dict[str, Any]]:
        call = {"function": {"name": "f", "arguments": {"x": value}}}
        return [user("a"), assistant("b", tool_calls=[call]), user("c")]

    sides = {side: [*called(2), assistant(text)] for side, text in (("chosen", "d"), ("rejected", "e"))}
    assert "other turns" in refusal({"prompt": called(1), **sides}, PAIR)
    (text,) = shown(tokenizer_of(), [{"prompt": FOUR[:2], "completion": FOUR[2:]}], ANSWER)
    assert text == "<s><|user|>a<|assistant|>b</s><|user|>c<|assistant|>«d</s>»"


def test_a_second_list_of_messages_counts_as_unread() -> None:
    row = {"messages": FOUR, "conversations": [user("x"), assistant("y")]}
    (found,) = conversations([("here", row)], CHAT, name="main")
    assert not isinstance(found, Refused) and found.unread == ("conversations",)


def test_an_earlier_answer_with_a_long_prompt_is_dropped_and_counted(tokenizer_of: Callable[..., Any]) -> None:
    # The template shows of former answers their end alone, so that the whole is shorter than what stands before.
    turns = [user("a"), assistant("x" * 80 + "|b"), user("c"), assistant("y" * 80 + "|d"), user("e"), assistant("f")]
    keeps_two = FORGETS.replace("loop.last", "loop.revindex <= 3")
    found = encoded(tokenizer_of(keeps_two), [{"messages": turns}], CHAT, max_prompt_length=100)
    assert all(len(row["prompt_ids"]) <= 100 for row in found.rows.get("sft_train", []))


def test_a_pair_of_weight_0_is_counted_and_not_learnt(tokenizer_of: Callable[..., Any]) -> None:
    pair = {"prompt": "p", "chosen": [assistant("a", weight=0)], "rejected": [assistant("b")]}
    found = encoded(tokenizer_of(), [pair], PAIR, stage="rm")
    assert not found.rows and found.dropped == {("main", "rm: an answer of weight 0"): 1}
    assert not encoded(tokenizer_of(), [pair], PAIR).rows
    # Of either side, and in whatever column the worse answer stands.
    other = {"prompt": "p", "chosen": [assistant("a")], "rejected": [assistant("b", weight=0)]}
    scored = {"prompt": "p", "answer_0": other["rejected"], "answer_1": "a", "score_0": 1, "score_1": 2}
    for row, source in ((other, PAIR), (scored, SourceConfig(format="scored_pair"))):
        found = encoded(tokenizer_of(), [row], source, stage="rm")
        assert not found.rows and found.dropped == {("main", "rm: an answer of weight 0"): 1}
    # SFT learns each answer by its own weight.
    start = "<s><|user|>p<|assistant|>"
    assert shown(tokenizer_of(), [pair], PAIR, sft_on_rejected=True) == [f"{start}«b</s>»"]
    assert shown(tokenizer_of(), [other], PAIR, sft_on_rejected=True) == [f"{start}«a</s>»"]
    neither = {**pair, "rejected": [assistant("b", weight=0)]}
    found = encoded(tokenizer_of(), [neither], PAIR, sft_on_rejected=True)
    assert not found.rows and found.dropped == {("main", "sft: no answer that is to be learnt (weight 0)"): 1}
