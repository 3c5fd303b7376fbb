"""What a run would do, as text and files: where values come from, batches, memory, commands, DeepSpeed's JSON."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf.config.files import to_yaml
from rlhf.config.origins import COMMAND_LINE, flat_values, origin_of
from rlhf.config.roles import roles_of
from rlhf.config.schema import Accelerator, Config, LauncherKind
from rlhf.launcher.command import node_commands
from rlhf.launcher.ds_config import role_files
from rlhf.launcher.pipeline import StageRun
from rlhf.launcher.rundir import CONFIG
from rlhf.planner.memory import GIB, StageMemory, decodes_in_place, ranks_of, stage_memory


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """An option that is not its default, and what set it."""

    key: str
    value: object
    default: object
    origin: str


def settings(config: Config, defaults: Config, origins: Mapping[str, str]) -> list[Setting]:
    """The options of a composed configuration (before it is resolved) that differ from the typed defaults."""
    plain = dict(flat_values(defaults))
    found = []
    for key, value in flat_values(config):
        if key.startswith("hydra") or value == plain.get(key, ...):
            continue
        origin = origin_of(key, dict(origins))
        if origin != "default":
            found.append(Setting(key=key, value=value, default=plain.get(key), origin=origin))
    return found


def plan_text(
    config: Config, runs: Sequence[StageRun], *, run_dir: Path, gpus: Sequence[int], changed: Sequence[Setting]
) -> str:
    """Describe a run that `mode=run` would start; a free port is drawn anew then."""
    return "\n".join(_lines(config, runs, run_dir=run_dir, gpus=gpus, changed=changed))


def _lines(
    config: Config, runs: Sequence[StageRun], *, run_dir: Path, gpus: Sequence[int], changed: Sequence[Setting]
) -> Iterator[str]:
    hardware, memory = config.hardware, config.memory
    machines = f"{hardware.nodes} × {hardware.gpus_per_node}" if hardware.nodes > 1 else f"{hardware.gpus_per_node}"
    accelerator = hardware.gpu or (hardware.accelerator.name.upper() + " ranks")
    yield f"# {config.stage.name} of {config.model.name} on {config.data.name}, seed {config.seed}"
    yield f"hardware       {hardware.name}: {machines} {accelerator}, {memory.precision.name}, ZeRO-{memory.zero_stage}"
    yield f"run directory  {run_dir}"
    yield "\n# Values that are not the defaults"
    yield from _table([(f"{setting.key}={_shown(setting.value)}", setting.origin) for setting in changed])
    yield "\n# Batches"
    for run in runs:
        yield from _batches(run.config)
    yield "\n# Model states in GiB on each device"
    for run in runs:
        yield from _memory(run.config)
    adapters = [line for run in runs for line in _adapters(run.config)]
    if adapters:
        yield "\n# Adapters"
        yield from adapters
    if config.launcher.kind not in (LauncherKind.local, LauncherKind.no_ssh) and config.launcher.hostfile is None:
        yield f"\n# launcher.hostfile is not set: mode=run needs one; {hardware.nodes} machines are made up here"
    for run in runs:
        for where, command in node_commands(run.config, config_path=run.directory / CONFIG, gpus=gpus):
            yield f"\n# Stage {run.name}: command on {where}\n{command.shell()}"
            yield from (f"# {path}\n{text.rstrip()}" for path, text in command.files.items())
    for run in runs:
        for name, content in role_files(run.config).items():
            role = name.removesuffix(".json").replace("_", " ")
            yield f"\n# Stage {run.name}: DeepSpeed configuration of the {role}\n{content.rstrip()}"


def _table(rows: Sequence[tuple[str, str]]) -> Iterator[str]:
    width = max((len(first) for first, _ in rows), default=0)
    yield from (f"{first:<{width}}  {second}" for first, second in rows)
    if not rows:
        yield "none"


def _shown(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _batches(config: Config) -> Iterator[str]:
    """The arithmetic of a stage: global = micro × accumulation × ranks, and the steps that are known beforehand."""
    stage, ranks = config.stage, ranks_of(config)
    role = next((role for role in roles_of(config, stage) if role.optimizer is not None), None)
    if role is not None:
        unit = "pairs" if stage.name in ("rm", "dpo") else "sequences"
        yield (
            f"{stage.name}: {role.batch_size} {unit} per optimizer step = micro-batch {role.micro_batch_size_per_gpu} "
            f"× accumulation {role.accumulation_steps(ranks)} × {ranks} ranks"
        )
    yield from (f"{stage.name}: {line}" for line in stage.schedule())


def _memory(config: Config) -> Iterator[str]:
    estimate = stage_memory(config, config.stage)
    if estimate is None:
        yield f"{config.stage.name}: the sizes of a model are not known here"
        return
    roles = ", ".join(f"{role.role} {role.device / GIB:.2f}" for role in estimate.roles)
    yield f"{config.stage.name}: {estimate.states / GIB:.2f} ({roles}){_capacity(config, estimate)}"
    if estimate.host:
        yield f"{config.stage.name}: and {estimate.host / GIB:.2f} of each rank in the host's memory"
    if estimate.gathered:
        shared = config.rollout.tensor_parallel or 1
        copied = f"a copy shared by {shared} ranks" if shared > 1 else "a whole copy"
        without = "it generates as it is" if decodes_in_place(config) else "transformers generates without one"
        why = "not made" if estimate.fits(ranks=shared) else "too large beside them"
        how = copied if config.rollout.gather or shared > 1 else f"{why}, so {without}"
        yield f"{config.stage.name}: the policy takes {estimate.shared(shared) / GIB:.2f} more to generate ({how})"


def _adapters(config: Config) -> Iterator[str]:
    """What a stage trains of each model, if it trains one through adapters."""
    lora, stage = config.lora, config.stage
    trained = [role for role in roles_of(config, stage) if role.optimizer is not None]
    ranks = {role.name: lora.rank_of(stage=stage.name, role=role.name) for role in trained}
    estimate = stage_memory(config, stage) if any(ranks.values()) else None
    states = {states.role: states for states in estimate.roles} if estimate is not None else {}
    for role in trained if any(ranks.values()) else ():
        rank, optimizer = ranks[role.name], role.optimizer
        assert optimizer is not None
        told = [f"rank {rank}"] if rank is not None else ["none, all weights are trained"]
        if rank is not None and role.name in states:
            own = states[role.name]
            told.append(f"{own.trainable / 1e6:.2f} of {own.parameters / 1e6:.2f} million parameters are trained")
        if rank is not None:
            told.append(f"learning rate {lora.learning_rate or optimizer.learning_rate:g}")
        yield f"{stage.name}: {role.name}: {', '.join(told)}"


def _capacity(config: Config, estimate: StageMemory) -> str:
    if estimate.capacity is None:
        return ""
    place = "GPU" if config.hardware.accelerator is Accelerator.cuda else "rank"
    return f" of {estimate.capacity / GIB:.0f} on a {place}, {estimate.reserve / GIB:.1f} of them never free"


def plan_files(config: Config, runs: Sequence[StageRun], text: str) -> dict[str, str]:
    """The files of a plan by name: the text, the resolved configuration, and each role's DeepSpeed JSON."""
    files = {"plan.txt": text + "\n", CONFIG: to_yaml(config)}
    for run in runs:
        files |= {f"{run.name}-{name}": content for name, content in role_files(run.config).items()}
    return files


def explanation(
    key: str, *, doc: str, value: object, default: object, resolved: object, origin: str, bounds: str
) -> str:
    """What there is to know about one option."""
    rows = [("", doc), ("default", _shown(default)), ("value", f"{_shown(value)}  ({_said(origin)})")]
    if bounds:
        rows.insert(1, ("allowed", bounds))
    if resolved != value:
        rows.append(("used", f"{_shown(resolved)}  (decided for this machine and model)"))
    return "\n".join([key, *(f"  {name:<8} {text}" if name else f"  {text}" for name, text in rows)])


def _said(origin: str) -> str:
    return {"default": "the default", COMMAND_LINE: "from the command line"}.get(origin, f"from {origin}")
