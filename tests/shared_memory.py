"""What a run has left in shared memory: its own alone, whatever else runs on the machine."""

import re
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")


def left_by(run_dir: Path) -> list[str]:
    """Names that carry the port or a process of a launch whose log is below the directory."""
    logs = [path.read_text(encoding="utf-8", errors="replace") for path in run_dir.rglob("launcher.log")]
    ports = {port for log in logs for port in re.findall(r"--master_port[= ](\d+)", log)}
    processes = {pid for log in logs for pid in re.findall(r"process (\d+) spawned", log)}
    assert ports and processes, f"no launch is known below {run_dir}"
    of_deepspeed = re.compile(rf"deepspeed_.*_({'|'.join(ports)})_\d+")
    of_torch = re.compile(rf"torch_({'|'.join(processes)})_.*")
    names = [path.name for path in SHARED_MEMORY.iterdir()]
    return [name for name in names if of_deepspeed.fullmatch(name) or of_torch.match(name)]
