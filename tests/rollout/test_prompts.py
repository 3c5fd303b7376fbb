"""Prompts of a user's own script."""

import pytest
import torch
from test_scorers import answered

from rlhf.rollout.prompts import prompt_batch


def test_texts_and_turns_become_left_padded_prompts_with_their_records() -> None:
    tokenizer, _, _ = answered(1)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    turns = [{"role": "system", "content": "no"}, {"role": "user", "content": "yes yes"}]
    batch = prompt_batch(tokenizer, ["yes", turns], answer=[1, None])
    assert batch.prompt_mask.tolist() == [[False, False, True], [True, True, True]]
    assert torch.equal(batch.prompt_ids, torch.tensor([[0, 0, 2], [3, 2, 2]]))
    assert batch.records[1] == {"messages": turns, "source": "", "answer": None}
    with pytest.raises(ValueError, match="answer has 1 values for 2 prompts"):
        prompt_batch(tokenizer, ["yes", "no"], answer=[1])
