"""Memory: log-probabilities from whole logits and from slices of the vocabulary; an adapted policy and its reference.

`python benchmarks/memory.py` writes benchmarks/results/memory.md. Each figure is a rise of the resident memory of a
fresh process: the peak of a forward and backward pass, or what is held after an engine was built.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from machine import processor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
VOCABULARY, LENGTH, WIDTH = 50272, 512, 768


def resident(field: str) -> int:
    """KiB of resident memory: VmRSS is what is held now, VmHWM the peak."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field)))


def measure(way: str, batch: int, frozen: bool) -> dict[str, float]:
    """One forward and backward pass in this process: peak rise in MiB, seconds, and a sample of the gradients."""
    import torch
    from torch.nn.functional import linear, log_softmax

    from rlhf.functional.head import head_logprobs

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(batch * LENGTH, WIDTH, generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(VOCABULARY, WIDTH, generator=generator) / WIDTH**0.5).bfloat16().requires_grad_(not frozen)
    ids = torch.randint(VOCABULARY, (batch * LENGTH,), generator=generator)

    def run(rows: int) -> "torch.Tensor":
        if way == "plain":
            logprobs = log_softmax(linear(hidden[:rows], weight).float(), dim=-1)
            return logprobs.gather(1, ids[:rows, None]).squeeze(1)
        return head_logprobs(hidden[:rows], weight, None, ids[:rows])[:, 0]

    run(2).sum().backward()  # Whatever the libraries allocate once.
    hidden.grad = weight.grad = None
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # The peak so far is forgotten.
    held = resident("VmRSS")
    started = time.perf_counter()
    run(batch * LENGTH).sum().backward()
    seconds = time.perf_counter() - started
    peak = resident("VmHWM")
    assert hidden.grad is not None
    result = {"MiB": (peak - held) / 1024, "seconds": seconds, "hidden": float(hidden.grad.float().norm())}
    if weight.grad is not None:
        result["weight"] = float(weight.grad.float().norm())
    return result


def row(batch: int, frozen: bool) -> str:
    """Both ways in processes of their own, as a line of the table."""
    results = {}
    for way in ("plain", "slices"):
        command = [sys.executable, __file__, way, str(batch), str(int(frozen))]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
        results[way] = json.loads(done.stdout)
    plain, ours = results["plain"], results["slices"]
    apart = max(abs(ours[name] / plain[name] - 1) for name in ("hidden", "weight") if name in plain)
    gradient = 0 if frozen else VOCABULARY * WIDTH * 2 / 2**20
    beyond = (plain["MiB"] - gradient) / (ours["MiB"] - gradient)
    return (
        f"| {batch} × {LENGTH} | {'frozen' if frozen else 'trained'} | {plain['MiB']:.0f} | {ours['MiB']:.0f} | "
        f"{plain['MiB'] / ours['MiB']:.1f} | {beyond:.1f} | {ours['seconds'] / plain['seconds']:.2f} | {apart:.1e} |"
    )


def build_reference() -> dict[str, float]:
    """MiB that this process holds of an adapted OPT-125M policy, its reference, and a copy as the reference."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(alone, DS_ACCELERATOR="cpu")
    import torch
    from transformers import AutoModelForCausalLM, OPTConfig

    from rlhf.config.roles import Role
    from rlhf.config.schema import MemoryConfig, OptimizerConfig, Precision
    from rlhf.engine.build import build_engine
    from rlhf.engine.distributed import initialize_distributed
    from rlhf.models.lora import AdaptersOff, add_adapters

    initialize_distributed(timeout_minutes=1)
    memory = MemoryConfig(zero_stage=0, precision=Precision.bf16)
    role = Role(name="actor", optimizer=OptimizerConfig(), batch_size=1, micro_batch_size_per_gpu=1)
    frozen = Role(name="reference", optimizer=None, batch_size=1, micro_batch_size_per_gpu=1)
    held = [resident("VmRSS")]

    def model() -> "torch.nn.Module":
        return AutoModelForCausalLM.from_config(OPTConfig(), dtype=torch.bfloat16)

    policy = model()
    add_adapters(policy, rank=8, alpha=16.0, dropout=0.0, targets=["q_proj", "v_proj"], seed=1)
    engine = build_engine(policy, role, memory=memory, ranks=1)
    held.append(resident("VmRSS"))
    reference = AdaptersOff(engine)
    with torch.no_grad():
        reference(input_ids=torch.zeros(1, 2, dtype=torch.long))
    held.append(resident("VmRSS"))
    copy = build_engine(model(), frozen, memory=memory, ranks=1)
    held.append(resident("VmRSS"))
    names = ("policy", "reference", "copy")
    rises = {name: (held[number + 1] - held[number]) / 1024 for number, name in enumerate(names)}
    return rises | {"weights": sum(p.numel() * p.element_size() for p in copy.module.parameters()) / 2**20}


def reference_table() -> str:
    """What the reference of an adapted policy costs."""
    done = subprocess.run([sys.executable, __file__, "reference"], check=True, capture_output=True, text=True, cwd=ROOT)
    found = json.loads(done.stdout.splitlines()[-1])
    return (
        f"OPT-125M with adapters of rank 8 in bf16 ({found['weights']:.0f} MiB of weights): the policy's engine holds "
        f"{found['policy']:.0f} MiB; the reference, which is the policy with its adapters off, "
        f"{found['reference']:.0f} MiB more, one pass included; a copy as the reference {found['copy']:.0f} MiB more."
    )


def main() -> int:
    """Measure in this process if told to, else write the table."""
    if sys.argv[1:] == ["reference"]:
        print(json.dumps(build_reference()))
        return 0
    if len(sys.argv) == 4:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1")))
        return 0
    from importlib.metadata import version

    head = [
        f"- command: `python benchmarks/memory.py`, torch {version('torch')}, one thread of {processor()}",
        f"- vocabulary {VOCABULARY:,}, hidden size {WIDTH}, bf16; log-probabilities and entropies with slices, "
        "log-probabilities alone the plain way",
        "",
        "| tokens | weight of the head | plain (MiB) | slices (MiB) | times less memory | "
        "beyond the weight's own gradient | time, slices / plain | norms of the gradients apart |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines = [row(batch, frozen) for batch in (1, 8) for frozen in (False, True)]
    text = "\n".join([*head, *lines, "", reference_table(), ""])
    (ROOT / "benchmarks" / "results" / "memory.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
