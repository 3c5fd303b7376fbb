"""Peak memory of log-probabilities and their gradients: whole logits in fp32 against slices of the vocabulary.

`python benchmarks/logprob_memory.py` writes benchmarks/results/logprob_memory.md. Each figure is the rise of the peak
resident memory of a fresh process, forward and backward, beyond what is held before: weights and hidden states in bf16.
"""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

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


def main() -> int:
    """Measure in this process if told to, else write the table."""
    if len(sys.argv) == 4:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1")))
        return 0
    from importlib.metadata import version

    head = [
        f"- command: `python benchmarks/logprob_memory.py`, torch {version('torch')}, one thread of {os.cpu_count()} "
        f"CPU cores ({platform.machine()})",
        f"- vocabulary {VOCABULARY:,}, hidden size {WIDTH}, bf16; log-probabilities and entropies with slices, "
        "log-probabilities alone the plain way",
        "",
        "| tokens | weight of the head | plain (MiB) | slices (MiB) | times less memory | "
        "beyond the weight's own gradient | time, slices / plain | norms of the gradients apart |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines = [row(batch, frozen) for batch in (1, 8) for frozen in (False, True)]
    text = "\n".join([*head, *lines, ""])
    (ROOT / "benchmarks" / "results" / "logprob_memory.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
