"""Run by the launcher on each rank: answers of vLLM against those of transformers. Usage: answering.py FOLDER RANKS"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf.batch import PromptBatch, Rollout
from rlhf.config.choices import RolloutBackend
from rlhf.config.roles import Role
from rlhf.config.schema import MemoryConfig, OptimizerConfig, Precision
from rlhf.engine.build import build_engine, partitioned_loading
from rlhf.engine.distributed import initialize_distributed, rank, shut_down, world_size
from rlhf.models.load import load_causal_lm
from rlhf.models.lora import add_adapters
from rlhf.models.tokenizer import load_tokenizer
from rlhf.rollout.forward import response_logprobs
from rlhf.rollout.generate import Generator
from rlhf.rollout.sampling import Sampling
from rlhf.rollout.vllm import VllmBackend

SIZE = 48


def save_policy(folder: Path) -> None:
    """A miniature whose heads are as wide as vLLM's kernels want, with tied weights, and its tokenizer."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=SIZE + 4,
        hidden_size=128,
        intermediate_size=96,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.2,
        **sizes,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "policy")
    words = ["<s>", "</s>", "<pad>", "<unk>", *(f"w{index}" for index in range(SIZE - 4))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder / "policy")


def engine_of(folder: Path, *, zero_stage: int, adapted: bool) -> Any:
    """The policy's engine, if adapted with adapters that change it."""
    tokenizer = load_tokenizer(folder / "policy")
    memory = MemoryConfig(zero_stage=zero_stage, precision=Precision.fp32)
    role = Role(name="actor", optimizer=OptimizerConfig(), batch_size=2, micro_batch_size_per_gpu=1)
    with partitioned_loading(role, memory=memory, ranks=world_size()):
        model = load_causal_lm(folder / "policy", tokenizer, dtype=torch.float32, attention="sdpa")
    if adapted:
        add_adapters(model, rank=4, alpha=8.0, dropout=0.0, targets=["q_proj", "down_proj"], seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return build_engine(model, role, memory=memory, ranks=world_size())


def prompts() -> PromptBatch:
    """This rank's prompts, ragged and of another number on each rank."""
    generator = torch.Generator().manual_seed(3 + rank())
    count = 4 - rank()
    ids = torch.randint(6, SIZE, (count, 7), generator=generator)
    mask = torch.arange(7) >= torch.arange(count).unsqueeze(1)
    return PromptBatch(prompt_ids=torch.where(mask, ids, 2), prompt_mask=mask)


def tokens(rollout: Rollout) -> list[list[int]]:
    """Each row's response."""
    return [ids[mask].tolist() for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]


def facts_of(generator: Generator, tokenizer: Any) -> dict[str, float]:
    """Greedy answers of vLLM and of transformers, and drawn ones against training's log-probabilities."""
    engine, greedy = generator.engine, replace(generator.sampling, temperature=0.0)
    slow = Generator(
        engine=engine,
        tokenizer=tokenizer,
        sampling=replace(greedy, backend=RolloutBackend.hf, tensor_parallel=1),
        vocab_limit=SIZE,
    )
    assert isinstance(generator.backend, VllmBackend)
    generator.backend.sampling = greedy
    found, wanted = generator.generate(prompts()), slow.generate(prompts())
    generator.backend.sampling = generator.sampling
    drawn = generator.generate(prompts(), seed=4)
    with torch.no_grad():
        computed = response_logprobs(engine, drawn, temperature=1.0, vocab_limit=SIZE)
    assert drawn.sampled_logprobs is not None
    stop = [tokenizer.decode(tokens(wanted)[0][2:4])]
    dist.broadcast_object_list(stop)
    generator.backend.sampling = slow.backend.sampling = replace(greedy, stop=tuple(stop))  # type: ignore[attr-defined]
    cut, stopped = slow.generate(prompts()), generator.generate(prompts())
    generator.backend.sampling = generator.sampling
    return {
        "stopped": float(tokens(stopped) == tokens(cut) and len(tokens(cut)[0]) < len(tokens(wanted)[0])),
        "ended": float(torch.equal(stopped.ended, cut.ended)),
        "same": float(tokens(found) == tokens(wanted)),
        "tokens": float(found.response_mask.sum()),
        "again": float(tokens(generator.generate(prompts(), seed=4)) == tokens(drawn)),
        "logprob_error": float((drawn.sampled_logprobs - computed)[drawn.response_mask].abs().max()),
    }


def main() -> None:
    """Collect facts and write them to FOLDER/vllm-RANKS.json (rank 0)."""
    folder, each = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    initialize_distributed(timeout_minutes=5)
    tokenizer = load_tokenizer(folder / "policy")
    sampling = Sampling(
        temperature=1.0,
        stop_ids=(1,),
        max_new_tokens=12,
        max_length=40,
        backend=RolloutBackend.vllm,
        tensor_parallel=each,
        gather=each == 1,
    )
    before = torch.random.get_rng_state()
    engine = engine_of(folder, zero_stage=3, adapted=True)
    drawn = torch.random.get_rng_state()
    generator = Generator(engine=engine, tokenizer=tokenizer, sampling=sampling, vocab_limit=SIZE)
    facts: dict[str, Any] = {
        "random_state_kept": float(torch.equal(drawn, torch.random.get_rng_state()) and before is not None),
        "threads": float(torch.get_num_threads()),
        "zero3_lora": facts_of(generator, tokenizer),
    }
    # The same vLLM with other weights, as after a training step.
    for stage in (0, 1, 2, 3):
        generator.engine = generator._plain = generator.backend.engine = engine_of(  # type: ignore[attr-defined]
            folder, zero_stage=stage, adapted=False
        )
        facts[f"zero{stage}"] = facts_of(generator, tokenizer)
    if rank() == 0:
        (folder / f"vllm-{each}.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    shut_down()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
