"""Writing parameters that ZeRO-3 may have partitioned."""

from typing import cast

import deepspeed
from torch import nn

from rlhf.models.load import ScalarModel, initialize_head_weight


def new_head(model: ScalarModel, *, seed: int) -> None:
    """Give a scalar model a freshly drawn head, before its engine is built.

    A ZeRO-3 write inside `GatheredParameters` is lost without `modifier_rank`; rank 0's values reach all ranks.
    """
    weight = cast(nn.Linear, model.classifier.score).weight
    if hasattr(weight, "ds_id"):
        with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
            if weight.numel():
                initialize_head_weight(weight, seed=seed)
    else:
        initialize_head_weight(weight, seed=seed)
