"""What each module of a model is given and returns: one run in evaluation mode on random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from liplayers.errors import ShapeError

__all__ = ["Seen", "survey"]

_BATCH = 2
_PASSING = (nn.Identity, nn.modules.dropout._DropoutNd)


@dataclass
class Seen:
    """What was seen of one module.

    Attributes:
        single: whether each call took one tensor, and nothing else, and returned one.
        shapes: of its inputs, without the batch.
        calls: how often it was called.
        sources: the modules without parts that returned what it was given; None for what no module did.
        changes: whether it writes into what it is given.
        example: of the first call, what it was given and returned.
    """

    single: bool = True
    shapes: set[tuple[int, ...]] = field(default_factory=set)
    calls: int = 0
    sources: set[nn.Module | None] = field(default_factory=set)
    changes: bool = False
    example: tuple[Tensor, Tensor] | None = None


def survey(model: nn.Module, input_shape: tuple[int, ...]) -> dict[nn.Module, Seen]:
    """What the modules of a model, in evaluation mode, see.

    Raises:
        ShapeError: it does not run on inputs of that shape.
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_BATCH, *input_shape, generator=generator).to(like.device, like.dtype)
    with _recorded(model) as seen, torch.no_grad():
        try:
            model(x)
        except ShapeError:
            raise
        except Exception as error:  # of the user's code: anything may come out
            raise ShapeError(
                f"the model does not run on inputs of shape {input_shape} ({' '.join(str(error).split())}); "
                f"pass the shape of one input without the batch dimension"
            ) from None
    return seen


@contextmanager
def _recorded(model: nn.Module) -> Iterator[dict[nn.Module, Seen]]:
    seen: dict[nn.Module, Seen] = {}
    origin: dict[int, tuple[nn.Module, Any]] = {}  # the tensors are kept, so that no id is used again
    given: list[Tensor | None] = []

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
        entry = seen.setdefault(module, Seen())
        entry.calls += 1
        x = args[0] if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) else None
        given.append(None if x is None else x.clone())
        if x is None:
            entry.single = False
        else:
            entry.shapes.add(tuple(x.shape[1:]))
            entry.sources.add(origin[id(x)][0] if id(x) in origin else None)

    def leave(module: nn.Module, args: tuple, result: Any) -> None:
        entry, x = seen[module], given.pop()
        entry.single &= isinstance(result, Tensor)
        entry.changes |= x is not None and not torch.equal(x, args[0])
        if entry.single and entry.example is None and x is not None:
            entry.example = x, result.clone()
        if not any(True for _ in module.children()) and not isinstance(module, _PASSING):
            origin[id(result)] = module, result

    handles = [m.register_forward_pre_hook(enter, with_kwargs=True) for m in model.modules()]
    handles += [m.register_forward_hook(leave) for m in model.modules()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
