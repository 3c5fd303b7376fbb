"""Greedy tokens of every family, in fp32, on two ranks under every ZeRO stage, with and without adapters."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from decoders import EOS, MODELS, PAD, SIZE, adapt, expected, model_of, prompts

from rlhf.batch import PromptBatch
from rlhf.config.roles import Role
from rlhf.config.schema import MemoryConfig, OptimizerConfig, Precision
from rlhf.engine.build import build_engine
from rlhf.engine.distributed import gather_objects, rank, world_size
from rlhf.rollout.generate import Generator
from rlhf.rollout.sampling import Sampling

LONGEST = 24
LENGTHS = ((3, 17, 9, 1), (30,))  # Each rank's prompts: ragged ones, and a single one.
TARGETS = ("q_proj", "v_proj", "down_proj", "fc2", "query_key_value", "dense_4h_to_h")


def prepared(name: str, *, adapted: bool) -> Any:
    """A miniature of a family, if adapted with adapters that change it."""
    model = model_of(name)
    if adapted:
        own = {part.rsplit(".", 1)[-1] for part, _ in model.named_modules()}
        adapt(model, sorted(own & set(TARGETS)))
    return model


def padded(rows: list[torch.Tensor]) -> PromptBatch:
    """Prompts of one width."""
    width = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=PAD) for row in rows])
    lengths = torch.tensor([len(row) for row in rows]).unsqueeze(1)
    return PromptBatch(prompt_ids=ids, prompt_mask=torch.arange(width) >= width - lengths)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.ranks(2)
def test_they_are_those_of_transformers_on_each_rank_alone_and_over_two(name: str, adapted: bool) -> None:
    rows = prompts(LENGTHS[rank()])
    wanted = expected(prepared(name, adapted=adapted), rows, max_new_tokens=LONGEST)
    everything = [row for each in gather_objects(wanted) for row in each]
    if adapted:
        without = expected(prepared(name, adapted=False), rows, max_new_tokens=LONGEST)
        assert any(gather_objects(wanted != without))  # Adapters change something.
    for stage in range(4):
        memory = MemoryConfig(zero_stage=stage, precision=Precision.fp32)
        role = Role(name="actor", optimizer=OptimizerConfig(), batch_size=2, micro_batch_size_per_gpu=1)
        engine = build_engine(prepared(name, adapted=adapted), role, memory=memory, ranks=world_size())
        for ranks in (1, 2):
            sampling = Sampling(
                temperature=0.0, stop_ids=(EOS,), max_new_tokens=LONGEST, tensor_parallel=ranks, gather=ranks == 1
            )
            tokenizer: Any = SimpleNamespace(pad_token_id=PAD)
            generator = Generator(engine=engine, tokenizer=tokenizer, sampling=sampling, vocab_limit=SIZE)
            assert generator.native, generator.backend.description
            rollout = generator.generate(padded(rows))
            found = [row[mask].tolist() for row, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]
            assert found == wanted, f"ZeRO-{stage}, {ranks} ranks each"
        engine.destroy()
    assert len(everything) == 5 and all(len(row) > 0 for row in everything)


def test_some_responses_end_early_and_some_are_as_long_as_they_may_be() -> None:
    lengths = [
        len(row)
        for name in MODELS
        for rows in LENGTHS
        for row in expected(model_of(name), prompts(rows), max_new_tokens=LONGEST)
    ]
    assert 5 < sum(length < LONGEST for length in lengths) < 45
