"""Where the chat template and training differ, the true cause is said, on rows of every shape."""

import pytest
from published import CHATML, tokenizer_of

from rlhf.data.conversation import Conversation, Message
from rlhf.data.template_check import TemplateCheck, disagreement


def conversation(*contents: str, chosen: str = "yes", system: bool = False, where: str = "row 1") -> Conversation:
    roles = ["system"] * system + ["user", "assistant"] * len(contents)
    turns = tuple(Message(role, content) for role, content in zip(roles, contents, strict=False))
    return Conversation(messages=turns, chosen=chosen, rejected=None, source="main", where=where)


@pytest.mark.parametrize(
    ("template", "cause"),
    [
        (CHATML, None),
        (
            CHATML.replace("{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}", ""),
            "the template writes no generation prompt, but '<|im_start|>assistant\\n' before an answer",
        ),
        (CHATML.replace("+ '<|im_end|>' + '\\n'", ""), "behind an answer the template writes nothing, where training"),
        (
            CHATML.replace("{{ '<|im_start|>assistant\\n' }}", "{{ 'Bot:' }}"),
            "generation prompt is 'Bot:', but an answer",
        ),
        (
            "{% for m in messages %}{{ m['content'] | upper + '<|im_end|>' }}{% endfor %}",
            "the template changes the text of an answer",
        ),
    ],
)
def test_the_true_cause_is_said(template: str, cause: str | None) -> None:
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = template
    found = disagreement(tokenizer, conversation("HI"))
    assert found is None if cause is None else cause in (found or "")


def test_rows_of_every_shape_are_looked_at() -> None:
    """The first row agrees; of others those with a system turn do not."""
    tokenizer = tokenizer_of("qwen3")
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' and messages[-1]['role'] == 'assistant' %}{{ 'x' }}{% endif %}" + CHATML
    )
    check = TemplateCheck(tokenizer)
    for row in (conversation("a"), conversation("b"), conversation("s", "u", system=True, where="row 3")):
        check.add(row)
    assert len(check.seen) == 2
    (found,) = check.findings()
    assert found.startswith("the template writes former turns otherwise once an answer follows them")
    assert found.endswith("(in 1 of 2 kinds of rows, first in row 3)")
    shapes = [conversation("a <|im_end|>"), conversation(" a"), conversation("a", "b", "c"), conversation("")]
    for row in [*shapes, conversation("a", chosen="x <|im_end|>")]:
        check.add(row)
    assert len(check.seen) == 7


def test_qwen3_writes_an_empty_thought() -> None:
    found = disagreement(tokenizer_of("qwen3"), conversation("a"))
    assert found is not None and found.endswith("an answer the template writes '<think>\\n\\n</think>\\n\\n'")
