"""The switch to generation puts back what it changed."""

from types import SimpleNamespace

import pytest
from transformers import OPTConfig, OPTForCausalLM

from rlhf.engine.generation import generation_mode


def test_training_state_comes_back_after_an_exception() -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "ffn_dim": 8, "vocab_size": 16}
    model = OPTForCausalLM(OPTConfig(word_embed_proj_dim=8, max_position_embeddings=8, **sizes))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    before = [part for part in model.modules() if getattr(part, "gradient_checkpointing", False)]
    assert before
    engine = SimpleNamespace(module=model, optimizer=None)  # what ZeRO stages 0 to 2 look like from here
    with pytest.raises(KeyError), generation_mode(engine) as module:
        assert not module.training
        assert not any(getattr(part, "gradient_checkpointing", False) for part in module.modules())
        raise KeyError
    assert model.training
    assert [part for part in model.modules() if getattr(part, "gradient_checkpointing", False)] == before
