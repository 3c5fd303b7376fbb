"""A small tokenizer for the tests of data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.schema import ModelConfig, ScratchConfig, WeightSource
from rlhf.models.tokenizer import load_tokenizer, prepare_tokenizer


@pytest.fixture(scope="session")
def tokenizer_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """The scratch tokenizer, with another chat template if one is given."""
    model = ModelConfig(name="mini", source=WeightSource.scratch, scratch=ScratchConfig(vocab_size=300))
    cache_dir = tmp_path_factory.mktemp("turns")
    directory = prepare_tokenizer(model, texts=lambda: iter(["answer one two"]), fingerprint="x", cache_dir=cache_dir)

    def load(chat_template: str | None = None, directory: Path = directory) -> Any:
        tokenizer = load_tokenizer(directory)
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        return tokenizer

    return load
