"""What stands around a model in training: data parallelism, torch.compile, averages of weights."""

from __future__ import annotations

import sys

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from liplayers.errors import Obstacle, UnknownBoundError

__all__ = ["refuse_wrapper", "unwrapped"]

_INNER = {DataParallel: "module", DistributedDataParallel: "module", AveragedModel: "module"}


def _inner(module: nn.Module) -> str | None:
    """The name of the module within a wrapper; None for what is none."""
    dynamo = sys.modules.get(
        "torch._dynamo.eval_frame"
    )  # which takes a second to import; without it nothing is compiled
    if dynamo is not None and type(module) is dynamo.OptimizedModule:
        return "_orig_mod"
    return _INNER.get(type(module))


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within wrappers that compute what it computes.

    Raises:
        UnknownBoundError: a wrapper with hooks, or parameters in shards.

    >>> type(unwrapped(AveragedModel(nn.Linear(2, 2)))).__name__
    'Linear'
    """
    while (inner := _inner(model)) is not None:
        if model._forward_hooks or model._forward_pre_hooks:
            raise UnknownBoundError.of(
                [Obstacle("", type(model).__name__, "a forward hook may change what it computes")]
            )
        model = model.get_submodule(inner)
    for name, tensor in model.named_parameters():
        if hasattr(tensor, "full_tensor") or type(model).__name__ == "FullyShardedDataParallel":
            reason = (
                f"its parameter {name!r} is in shards: load the full state dict "
                "(torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True) into a plain "
                "model, and pass that one"
            )
            raise UnknownBoundError.of([Obstacle("", type(model).__name__, reason)])
    return model


def refuse_wrapper(module: nn.Module) -> None:
    """Raise UnknownBoundError where a part of a model is wrapped."""
    inner = _inner(module)
    if inner == "_orig_mod":
        raise UnknownBoundError("torch.compile(module) made it within a model: call module.compile() in its place")
    if inner is not None:
        raise UnknownBoundError(f"it wraps a part of the model: put its {inner!r} in its place")
