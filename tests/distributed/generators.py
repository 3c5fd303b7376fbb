"""What the tests of generation have in common on each rank: an engine to generate with, and its answers."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from engines import SINGLE
from torch import Tensor

from rlhf.batch import PromptBatch, Rollout
from rlhf.config.choices import RolloutBackend
from rlhf.config.schema import MemoryConfig
from rlhf.engine.build import build_engine, partitioned_loading
from rlhf.engine.distributed import world_size
from rlhf.engine.generation import whole_parameters
from rlhf.models.load import load_causal_lm
from rlhf.models.lora import add_adapters
from rlhf.models.tokenizer import load_tokenizer
from rlhf.rollout.generate import Generator
from rlhf.rollout.sampling import Sampling

GREEDY = Sampling(temperature=0.0, stop_ids=(1,), max_new_tokens=12, batch_size=3)
DRAWN = replace(GREEDY, temperature=1.0)
BY_HF = replace(GREEDY, backend=RolloutBackend.hf)


def plain_engine(folder: Path, memory: MemoryConfig, *, adapted: bool = False) -> Any:
    """The miniature policy's engine, if adapted with adapters that change it."""
    tokenizer = load_tokenizer(folder / "policy")
    with partitioned_loading(SINGLE, memory=memory, ranks=world_size()):
        model = load_causal_lm(folder / "policy", tokenizer, dtype=torch.float32, attention="sdpa")
    if adapted:
        add_adapters(model, rank=4, alpha=8.0, dropout=0.0, targets=["q_proj", "v_proj", "fc1"], seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return build_engine(model, SINGLE, memory=memory, ranks=world_size())


def generator_of(engine: Any, folder: Path, sampling: Sampling) -> Generator:
    """What generates with the miniature policy."""
    tokenizer = load_tokenizer(folder / "policy")
    return Generator(engine=engine, tokenizer=tokenizer, sampling=sampling, vocab_limit=len(tokenizer))


def answers(engine: Any, prompts: PromptBatch, folder: Path, sampling: Sampling, **options: Any) -> Rollout:
    """The responses of one way to generate, which is the one that was wanted."""
    generator = generator_of(engine, folder, sampling)
    said = generator.backend.description
    assert generator.native == (sampling.backend is not RolloutBackend.hf), said
    alone = generator.native and sampling.tensor_parallel == 1 and "adapters beside the weights" not in said
    assert (", compiled" in said) == (alone and shutil.which("g++") is not None), said
    return generator.generate(prompts, **options)


def tokens(rollout: Rollout) -> list[list[int]]:
    """Each row's response."""
    rows = zip(rollout.response_ids, rollout.response_mask, strict=True)
    return [ids[mask].tolist() for ids, mask in rows]


def weights(engine: Any) -> list[Tensor]:
    """All weights, whole."""
    with whole_parameters(engine, engine.module):
        return [parameter.detach().clone() for parameter in engine.module.parameters()]


def are_alike(old: list[Tensor], new: list[Any]) -> bool:
    """Whether tensors equal others to the last bit."""
    return all(torch.equal(one, other) for one, other in zip(old, new, strict=True))


def are_partitioned(module: torch.nn.Module) -> bool:
    """Whether a module's parameters are, for DeepSpeed and in fact."""
    parameters: list[Any] = list(module.parameters())
    return all(each.numel() == 0 and each.ds_status is ZeroParamStatus.NOT_AVAILABLE for each in parameters)
