"""The exponential moving average of a model's weights: fp32, each rank its own share, whatever the ZeRO stage."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from rlhf.engine.distributed import all_gather_flat, all_reduce_sum
from rlhf.engine.shards import extent


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """This rank's share of one parameter: `numel` elements from `offset` on of the flattened parameter.

    `master` is a 1-D view of the fp32 weights that the optimizer steps; it may lie in the host's memory.
    """

    parameter: nn.Parameter
    offset: int
    numel: int
    master: Tensor


def master_shards(engine: Any) -> list[Shard]:
    """The shares of all trained parameters. Together the ranks hold each element exactly once.

    Where DeepSpeed keeps whole masters on every rank (ZeRO-0), a rank's share is a slice of them.
    """
    trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    whole = _whole_masters(engine.optimizer)
    shards = [_shard(parameter, engine, whole) for parameter in trained]
    found = [shard for shard in shards if shard.numel > 0]
    assert all(shard.master.dtype == torch.float32 for shard in found), "these are not the weights that are stepped"
    return found


def _shard(parameter: Any, engine: Any, whole: dict[nn.Parameter, Tensor]) -> Shard:
    offset, numel = extent(parameter)
    if hasattr(parameter, "ds_id"):
        partition, _ = engine.optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=True)
        master = partition[:numel]
    elif hasattr(parameter, "_hp_mapping"):
        master = parameter._hp_mapping.hp_fragment.detach() if numel else torch.zeros(0)
    else:
        master = whole.get(parameter, parameter).detach().view(-1)[offset : offset + numel]
    return Shard(parameter=parameter, offset=offset, numel=numel, master=master)


def _whole_masters(optimizer: Any) -> dict[nn.Parameter, Tensor]:
    """The fp32 copies that DeepSpeed's 16-bit optimizer of ZeRO-0 keeps, by parameter."""
    if not hasattr(optimizer, "fp32_groups"):
        return {}
    pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return {own: copy for group, copies in pairs for own, copy in zip(group, copies, strict=True)}


class WeightAverage:
    """`average = decay * average + (1 - decay) * weights`, once per optimizer step (Ouyang et al. 2022, appendix C.4).

    It takes 4 bytes per trained parameter, divided by the ranks; adapters alone are averaged where they alone are
    trained. Before `start_step` updates it is a copy of the weights.

    Args:
        engine: a DeepSpeed engine with an optimizer, any ZeRO stage.
        decay: above 0 and below 1.
        start_step: updates after which averaging begins.
    """

    def __init__(self, engine: Any, *, decay: float, start_step: int = 0) -> None:
        self._engine = engine
        self.decay, self.start_step, self.steps = decay, start_step, 0
        self._shards = master_shards(engine)
        self._averages = [shard.master.clone() for shard in self._shards]

    @property
    def num_bytes(self) -> int:
        """Bytes that the average takes on this rank."""
        return sum(average.numel() * average.element_size() for average in self._averages)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of an optimizer step that was applied. No rank waits for another."""
        self.steps += 1
        for average, shard in zip(self._averages, self._shards, strict=True):
            if self.steps <= self.start_step:
                average.copy_(shard.master)
            else:
                average.lerp_(shard.master, 1.0 - self.decay)

    def state_dict(self) -> dict[str, Any]:
        """This rank's share, and how many updates it has seen."""
        return {"steps": self.steps, "averages": self._averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave on the same rank of as many; raises ValueError if the sizes differ."""
        sizes = [average.numel() for average in state["averages"]]
        if sizes != [average.numel() for average in self._averages]:
            raise ValueError("the saved average is of another model, another number of ranks or another ZeRO stage")
        self.steps = int(state["steps"])
        for average, saved in zip(self._averages, state["averages"], strict=True):
            average.copy_(saved)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this context the engine's module computes with the average; afterwards with its own weights again.

        The masters stay as they are, so the engine must not step inside. Every rank must enter and leave. The weights
        come back bit for bit, also after an exception; meanwhile they are in the host's memory.
        """
        shares = [(parameter, _copied(_weights_here(parameter))) for parameter in self._trained()]
        whole = {parameter: _copied(parameter.data) for parameter in self._trained() if _is_kept_whole(parameter)}
        try:
            self._load_averages()
            yield
        finally:
            # No collective here: a rank may leave alone, with an exception.
            with torch.no_grad():
                for parameter, values in shares:
                    _weights_here(parameter).copy_(values)
                    if not _is_kept_whole(parameter):
                        continue
                    if parameter in whole:
                        parameter.data.copy_(whole[parameter])
                    else:
                        parameter.partition()  # It was made whole meanwhile, of averages.

    def _trained(self) -> list[Any]:
        return [parameter for parameter in self._engine.module.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def _load_averages(self) -> None:
        pairs = zip(self._shards, self._averages, strict=True)
        mine = {shard.parameter: (shard, average) for shard, average in pairs}
        for parameter in self._trained():
            shard, average = mine.get(parameter, (None, None))
            target = _weights_here(parameter).view(-1)
            if hasattr(parameter, "ds_id"):
                if shard is not None and average is not None:
                    target[: shard.numel].copy_(average)
                _refresh(parameter)
            else:
                target.copy_(self._gathered(target.numel(), shard, average))

    def _gathered(self, numel: int, shard: Shard | None, average: Tensor | None) -> Tensor:
        """The whole average of a parameter on every rank, flat."""
        values = torch.zeros(numel, dtype=torch.float32, device=self._engine.device)
        if shard is not None and average is not None:
            values[shard.offset : shard.offset + shard.numel].copy_(average)
        return all_reduce_sum(values)


def _weights_here(parameter: Any) -> Tensor:
    """What this rank holds of a parameter's computing weights: under ZeRO-3 its share."""
    weights: Tensor = parameter.ds_tensor.data if hasattr(parameter, "ds_id") else parameter.data
    return weights


def _copied(values: Tensor) -> Tensor:
    """A copy in the host's memory."""
    return values.to("cpu", copy=True)


def _is_kept_whole(parameter: Any) -> bool:
    """Whether ZeRO-3 keeps a small parameter whole on every rank beside its shares."""
    return hasattr(parameter, "ds_id") and parameter.ds_status == ZeroParamStatus.AVAILABLE


def _refresh(parameter: Any) -> None:
    """Make a parameter that ZeRO-3 keeps whole that of the present shares."""
    if _is_kept_whole(parameter):
        shares = all_gather_flat(parameter.ds_tensor.data.to(parameter.data.device))
        parameter.data.copy_(shares[: parameter.ds_numel].view_as(parameter.data))
