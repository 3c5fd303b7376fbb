"""Public row formats, as docs/data.md lists them: token ids and loss masks, decoded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from shown import encoded, refusal, shown

from rlhf.config.schema import LossOn, SourceConfig

DOCS = Path(__file__).parents[2] / "docs" / "data.md"
SKY = [{"role": "user", "content": "What color is the sky?"}]
BLUE, GREEN = ([{"role": "assistant", "content": f"It is {color}."}] for color in ("blue", "green"))
ASKED = "<s><|user|>What color is the sky?<|assistant|>"
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
# ChatML with tools, as Qwen and Hermes write them.
TOOLS_TEMPLATE = (
    "{% if tools %}<|system|>{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{% generation %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}{{ eos_token }}"
    "{% endgeneration %}{% else %}<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FUNCTION = json.dumps([WEATHER])
CALLED = '<call>{"name": "weather", "arguments": {"city": "Rome"}}</call>'
# Name in docs/data.md -> format, options of the source, row, stage, what is trained.
FORMATS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str, list[str]]] = {
    "TRL language modeling, conversational": (
        "conversational",
        {},
        {"messages": [*SKY, *BLUE, {"role": "user", "content": "And grass?"}, *GREEN]},
        "sft",
        [f"{ASKED}«It is blue.</s>»<|user|>And grass?<|assistant|>«It is green.</s>»"],
    ),
    "TRL language modeling, standard": (
        "text",
        {},
        {"text": "The sky is blue."},
        "ptx",
        ["The sky is blue.</s>"],
    ),
    "TRL prompt-only": ("prompt", {}, {"prompt": SKY}, "ppo", [ASKED]),
    "TRL prompt-completion": (
        "completion",
        {},
        {"prompt": SKY, "completion": BLUE},
        "sft",
        [f"{ASKED}«It is blue.</s>»"],
    ),
    "TRL preference, explicit prompt": (
        "preference",
        {},
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        "rm",
        ["<s><|user|>The sky is<|assistant|>« blue.</s>»", "<s><|user|>The sky is<|assistant|>« green.</s>»"],
    ),
    "TRL preference, implicit prompt": (
        "preference",
        {},
        {"chosen": [*SKY, *BLUE], "rejected": [*SKY, *GREEN]},
        "rm",
        [f"{ASKED}«It is blue.</s>»", f"{ASKED}«It is green.</s>»"],
    ),
    "TRL unpaired preference": (
        "completion",
        {},
        {"prompt": SKY, "completion": BLUE, "label": True},
        "sft",
        [f"{ASKED}«It is blue.</s>»"],
    ),
    "ShareGPT": (
        "conversational",
        {},
        {
            "id": "x1",
            "system": "Be brief.",
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello."},
                {"from": "human", "value": "Bye"},
                {"from": "gpt", "value": "See you."},
            ],
        },
        "sft",
        ["<s><|system|>Be brief.<|user|>Hi<|assistant|>«Hello.</s>»<|user|>Bye<|assistant|>«See you.</s>»"],
    ),
    "Alpaca": (
        "instruction",
        {},
        {"instruction": "Translate.", "input": "rot", "output": "red", "system": "", "history": []},
        "sft",
        ["<s><|user|>Translate.\n\nrot<|assistant|>«red</s>»"],
    ),
    "Alpaca with history": (
        "instruction",
        {},
        {
            "instruction": "And blau?",
            "input": "",
            "output": "blue",
            "system": "You translate.",
            "history": [["What is rot?", "red"]],
        },
        "sft",
        [
            "<s><|system|>You translate.<|user|>What is rot?<|assistant|>«red</s>»"
            "<|user|>And blau?<|assistant|>«blue</s>»"
        ],
    ),
    "OpenAI fine-tuning": (
        "conversational",
        {},
        {
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                {"role": "assistant", "content": "Hm.", "weight": 0},
                {"role": "user", "content": "Hi?"},
                {"role": "assistant", "content": "Hello.", "weight": 1},
            ]
        },
        "sft",
        ["<s><|system|>Be brief.<|user|>Hi<|assistant|>Hm.</s><|user|>Hi?<|assistant|>«Hello.</s>»"],
    ),
    "OpenAI preference fine-tuning": (
        "preference",
        {
            "columns": {
                "prompt": "input.messages",
                "tools": "input.tools",
                "chosen": "preferred_output",
                "rejected": "non_preferred_output",
            }
        },
        {"input": {"messages": SKY, "tools": []}, "preferred_output": BLUE, "non_preferred_output": GREEN},
        "rm",
        [f"{ASKED}«It is blue.</s>»", f"{ASKED}«It is green.</s>»"],
    ),
    "UltraFeedback (binarized)": (
        "preference",
        {},
        {
            "prompt": "What color is the sky?",
            "prompt_id": "ab",
            "chosen": [*SKY, *BLUE],
            "rejected": [*SKY, *GREEN],
            "messages": [*SKY, *BLUE],
            "score_chosen": 8.5,
        },
        "rm",
        [f"{ASKED}«It is blue.</s>»", f"{ASKED}«It is green.</s>»"],
    ),
    "Anthropic HH": (
        "transcript",
        {},
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Who?\n\nAssistant: Me.",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Who?\n\nAssistant: You.",
        },
        "rm",
        [f"<s><|user|>Hi<|assistant|>Hello.</s><|user|>Who?<|assistant|>«{answer}.</s>»" for answer in ("Me", "You")],
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_ids_and_masks_of_public_formats(name: str, tokenizer_of: Callable[..., Any]) -> None:
    form, options, row, stage, expected = FORMATS[name]
    tokenizer, source = tokenizer_of(), SourceConfig(format=form, **options)
    if stage == "ptx":
        (found,) = encoded(tokenizer, [row], source).rows["ptx_train"]
        assert [tokenizer.decode(found["chosen_ids"])] == expected
    else:
        assert shown(tokenizer, [row], source, stage=stage) == expected
    assert f"| {name} |" in DOCS.read_text(encoding="utf-8")


def test_openai_tools_are_trained_as_the_template_writes_them(tokenizer_of: Callable[..., Any]) -> None:
    row = {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
            {"role": "assistant", "content": "It is sunny."},
        ],
        "tools": [WEATHER],
        "parallel_tool_calls": False,
    }
    source, tokenizer = SourceConfig(format="conversational"), tokenizer_of(TOOLS_TEMPLATE)
    before = f"<|system|>{FUNCTION}\n<|user|>Weather?<|assistant|>"
    expected = f"{before}«{CALLED}</s>»<|tool|>sunny<|assistant|>«It is sunny.</s>»"
    assert shown(tokenizer, [row], source) == [expected]
    last = shown(tokenizer, [row], source, loss_on=LossOn.last)
    assert last == [f"{before}{CALLED}</s><|tool|>sunny<|assistant|>«It is sunny.</s>»"]
    found = encoded(tokenizer, [row], source)
    assert {name for _, name in found.unread} == {"parallel_tool_calls", "messages[].tool_call_id"}
    # The call itself as the answer, and without marks, by each answer's own prompt.
    plain = TOOLS_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert shown(tokenizer_of(plain), [row], source) == [expected]
    call = {**row, "messages": row["messages"][:2]}
    assert shown(tokenizer, [call], source) == shown(tokenizer_of(plain), [call], source) == [f"{before}«{CALLED}</s>»"]
    as_text = {**row, "tools": json.dumps([WEATHER]), "messages": json.dumps(row["messages"])}
    assert shown(tokenizer, [as_text], source) == [expected]


def test_sharegpt_calls_of_functions(tokenizer_of: Callable[..., Any]) -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
            {"from": "observation", "value": "sunny"},
            {"from": "gpt", "value": "It is sunny."},
        ],
        "tools": json.dumps([WEATHER]),
    }
    expected = (
        f"<|system|>{FUNCTION}\n<|user|>Weather?<|assistant|>«{CALLED}</s>»<|tool|>sunny<|assistant|>«It is sunny.</s>»"
    )
    assert shown(tokenizer_of(TOOLS_TEMPLATE), [row], SourceConfig(format="conversational")) == [expected]


def test_a_template_without_tools_refuses_what_would_be_nothing(tokenizer_of: Callable[..., Any]) -> None:
    turns = [{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    source = SourceConfig(format="conversational")
    found = encoded(tokenizer_of(), [{"messages": turns, "tools": [WEATHER]}], source)
    assert not found.rows and found.dropped == {("main", "bad row"): 1}
    assert "nothing but tool_calls" in found.problems[0]["detail"]
    # Beside text they are counted among what nobody reads.
    turns[1]["content"] = "I will look."
    found = encoded(tokenizer_of(), [{"messages": turns, "tools": [WEATHER]}], source)
    assert found.unread == {("main", "messages[].tool_calls"): 1, ("main", "tools"): 1}


def test_what_is_no_format_of_ours_is_refused() -> None:
    stepwise = {"prompt": "2+2?", "completions": ["It is", "4."], "labels": [True, True]}
    assert 'the column "completion" is missing' in refusal(stepwise, SourceConfig(format="completion"))
    picture = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}, *BLUE]
    assert "only text can be learnt" in refusal({"messages": picture}, SourceConfig(format="conversational"))
