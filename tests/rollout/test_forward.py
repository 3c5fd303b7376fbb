"""Forward passes over compact sequences, against a plain one over padded ones."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, GPTNeoXConfig, LlamaConfig, OPTConfig

from rlhf.batch import Rollout, SFTBatch
from rlhf.functional.masking import position_ids
from rlhf.models.head import LogprobHead, make_answerable
from rlhf.rollout.forward import next_token_loss, response_logprobs_and_entropy, sequence_scores, target_logprobs

VOCABULARY, LIMIT = 64, 61
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIGS = {
    "opt, tied": OPTConfig(**SMALL, ffn_dim=16, word_embed_proj_dim=16, dropout=0.0),
    "llama": LlamaConfig(**SMALL, intermediate_size=16, tie_word_embeddings=False),
    "gpt-neox": GPTNeoXConfig(**SMALL, intermediate_size=16),
    # Its logits are capped behind the head, which therefore can't be asked.
    "gemma2": Gemma2Config(
        **SMALL, intermediate_size=16, num_key_value_heads=1, head_dim=8, final_logit_softcapping=2.0
    ),
}


def _model(name: str) -> Any:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    return model


def _rollout() -> Rollout:
    generator = torch.Generator().manual_seed(2)
    prompts, answers = torch.tensor([2, 5, 3, 1]), torch.tensor([4, 1, 2, 3])
    return Rollout(
        sequence_ids=torch.randint(3, LIMIT, (4, 5 + 6), generator=generator),
        prompt_mask=torch.arange(5) >= 5 - prompts.unsqueeze(1),
        response_mask=torch.arange(6) < answers.unsqueeze(1),
    )


def _plain(model: Any, rollout: Rollout, temperature: float) -> tuple[Tensor, Tensor]:
    mask = rollout.attention_mask
    logits = model(input_ids=rollout.sequence_ids, attention_mask=mask, position_ids=position_ids(mask)).logits
    logprobs = (logits[:, 4:-1, :LIMIT] / temperature).log_softmax(dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
    picked = logprobs.gather(2, rollout.response_ids.unsqueeze(2)).squeeze(2)
    return torch.where(rollout.response_mask, picked, 0.0), torch.where(rollout.response_mask, entropy, 0.0)


@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_gradients_are_those_of_padded_sequences_and_whole_logits(name: str) -> None:
    model, rollout = _model(name), _rollout()
    expected = _plain(model, rollout, 0.7)
    make_answerable(model)
    results = [response_logprobs_and_entropy(model, rollout, temperature=0.7, vocab_limit=LIMIT) for _ in range(2)]
    assert isinstance(model.get_output_embeddings(), LogprobHead)
    assert model.get_output_embeddings().direct == (name != "gemma2")
    weights = torch.linspace(-1, 1, expected[0].numel()).view(expected[0].shape)
    plain = torch.autograd.grad((expected[0] * weights).sum(), list(model.parameters()), allow_unused=True)
    for logprobs, entropy in results:  # What a model's head can't do is learned in the first call.
        torch.testing.assert_close(logprobs, expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(entropy, expected[1], rtol=1e-4, atol=1e-5)
        assert not entropy.requires_grad
        ours = torch.autograd.grad((logprobs * weights).sum(), list(model.parameters()), allow_unused=True)
        for one, other in zip(ours, plain, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_of_text_are_those_of_whole_logits_also_without_targets(name: str) -> None:
    model = _model(name)
    generator = torch.Generator().manual_seed(3)
    mask = torch.arange(7) < torch.tensor([7, 4, 2]).unsqueeze(1)
    batch = SFTBatch(
        sequence_ids=torch.randint(3, LIMIT, (3, 7), generator=generator),
        attention_mask=mask,
        loss_mask=mask & (torch.arange(7) >= 2),
    )
    logits = model(input_ids=batch.sequence_ids, attention_mask=mask).logits[:, :-1, :LIMIT]
    picked = logits.log_softmax(dim=-1).gather(2, batch.sequence_ids[:, 1:].unsqueeze(2)).squeeze(2)
    make_answerable(model)
    empty = next_token_loss(model, replace(batch, loss_mask=torch.zeros_like(mask)), vocab_limit=LIMIT)
    assert empty.item() == 0.0
    empty.backward()  # Ranks stay in step: every pass has its backward pass.
    assert model.get_output_embeddings().direct == (name != "gemma2")
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())
    loss = next_token_loss(model, batch, vocab_limit=LIMIT)
    torch.testing.assert_close(loss, -picked[batch.loss_mask[:, 1:]].sum(), rtol=1e-4, atol=1e-4)
    each = target_logprobs(model, batch.sequence_ids, mask, batch.loss_mask, vocab_limit=LIMIT)
    torch.testing.assert_close(each, torch.where(batch.loss_mask[:, 1:], picked, 0.0), rtol=1e-4, atol=1e-4)


def test_a_head_answers_only_when_asked_also_after_an_error() -> None:
    model = _model("llama")
    make_answerable(model)
    ids = torch.tensor([[5, 6, 7]])
    before = model(input_ids=ids).logits
    with pytest.raises(IndexError):
        response_logprobs_and_entropy(
            model,
            Rollout(
                sequence_ids=torch.full((1, 4), VOCABULARY + 5),
                prompt_mask=torch.ones(1, 2, dtype=torch.bool),
                response_mask=torch.ones(1, 2, dtype=torch.bool),
            ),
            temperature=1.0,
            vocab_limit=LIMIT,
        )
    assert torch.equal(model(input_ids=ids).logits, before)


def test_an_answer_of_another_kind_of_head_is_computed_whole() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model, rollout = _model("llama"), _rollout()
    model.get_output_embeddings().__class__ = Doubled
    make_answerable(model)
    expected = _plain(model, rollout, 1.0)
    logprobs, entropy = response_logprobs_and_entropy(model, rollout, temperature=1.0, vocab_limit=LIMIT)
    torch.testing.assert_close(logprobs, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropy, expected[1], rtol=1e-4, atol=1e-5)


def test_a_score_does_not_depend_on_the_side_of_the_padding() -> None:
    def scalars(*, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        return (input_ids * 100 + position_ids).float() * attention_mask

    left = torch.tensor([[0, 0, 5, 6], [1, 2, 3, 4]])
    right = torch.tensor([[5, 6, 0, 0], [1, 2, 3, 4]])
    mask = torch.tensor([[False, False, True, True], [True] * 4])
    assert sequence_scores(scalars, left, mask).tolist() == [601.0, 403.0]
    assert sequence_scores(scalars, right, mask.flip(1)).tolist()[0] == 601.0
