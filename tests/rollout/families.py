"""Run by the launcher on each rank: greedy tokens of every family in every engine. Usage: families.py FOLDER"""

import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from decoders import EOS, MODELS, PAD, SIZE, adapt, expected, model_of, prompts

from rlhf.batch import PromptBatch
from rlhf.config.roles import Role
from rlhf.config.schema import MemoryConfig, OptimizerConfig, Precision
from rlhf.engine.build import build_engine
from rlhf.engine.distributed import gather_objects, initialize_distributed, rank, shut_down, world_size
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


def differing(name: str, *, adapted: bool, facts: dict[str, Any]) -> Iterator[str]:
    """The engines, and numbers of ranks, whose tokens are not those of transformers."""
    rows = prompts(LENGTHS[rank()])
    wanted = expected(prepared(name, adapted=adapted), rows, max_new_tokens=LONGEST)
    if adapted and wanted == expected(prepared(name, adapted=False), rows, max_new_tokens=LONGEST):
        yield f"{name}: its adapters change nothing"
    facts["early"] += sum(len(row) < LONGEST for row in wanted)
    width = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=PAD) for row in rows])
    lengths = torch.tensor([len(row) for row in rows]).unsqueeze(1)
    batch = PromptBatch(prompt_ids=ids, prompt_mask=torch.arange(width) >= width - lengths)
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
            rollout = generator.generate(batch)
            found = [row[mask].tolist() for row, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]
            facts["compared"] += len(found)
            if found != wanted:
                yield f"{name}{' with adapters' if adapted else ''}, ZeRO-{stage}, {ranks} ranks each, on {rank()}"
        engine.destroy()


def main() -> None:
    """Write what differs on any rank, and how much was compared, to FOLDER/families.json (rank 0)."""
    torch.set_num_threads(1)
    initialize_distributed(timeout_minutes=5)
    facts: dict[str, Any] = {"early": 0, "compared": 0}
    pairs = itertools.product(MODELS, (False, True))
    wrong = [line for name, adapted in pairs for line in differing(name, adapted=adapted, facts=facts)]
    everywhere = gather_objects((wrong, facts))
    if rank() == 0:
        whole = {key: sum(part[key] for _, part in everywhere) for key in facts}
        whole["differing"] = [line for part, _ in everywhere for line in part]
        (Path(sys.argv[1]) / "families.json").write_text(json.dumps(whole), encoding="utf-8")
    shut_down()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
