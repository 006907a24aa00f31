"""The inputs of a model, from what a caller says of one sample, and what the modules of the model see of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from liplayers.bounds.trace import Given
from liplayers.bounds.twin import private_copy
from liplayers.errors import ArgumentError, LipschitzError, ShapeError

__all__ = ["InputShape", "Inputs", "Seen", "like_of", "observed", "record_shapes"]

# of one sample: a shape, an example, or several of them as the arguments of forward, by place or by name
InputShape = tuple[Any, ...] | list[Any] | Mapping[str, Any] | Tensor


def _is_shape(x: Any) -> bool:
    return isinstance(x, (tuple, list)) and all(isinstance(n, int) and not isinstance(n, bool) for n in x)


def _is_leaf(x: Any) -> bool:
    return isinstance(x, Tensor) or _is_shape(x)


@dataclass(frozen=True)
class Inputs:
    """The arguments of a forward: (args, kwargs) with a `Given` for each tensor, and the device that they are on."""

    arguments: Any
    device: torch.device

    @classmethod
    def of(cls, shape: InputShape, like: Tensor, dtype: torch.dtype | None = None) -> Inputs:
        """From shapes or examples of one sample, which get the dtype of `like` or the one that is given.

        Raises:
            ArgumentError: something else.
        """
        if isinstance(shape, Mapping):
            args: tuple[Any, ...] = ()
            kwargs: dict[str, Any] = dict(shape)
        else:
            args, kwargs = (shape,) if _is_leaf(shape) else tuple(shape), {}

        def given(x: Any) -> Given:
            if isinstance(x, Tensor):
                return Given(tuple(x.shape), x.dtype)
            if not _is_shape(x):
                raise ArgumentError(
                    f"input_shape={shape!r}: expected the shape of one input without the batch dimension"
                )
            return Given(tuple(x), like.dtype if dtype is None else dtype)

        named = {name: tree_map(given, x, is_leaf=_is_leaf) for name, x in kwargs.items()}
        return cls((tuple(tree_map(given, x, is_leaf=_is_leaf) for x in args), named), like.device)

    @property
    def leaves(self) -> list[Given]:
        return tree_leaves(self.arguments, is_leaf=lambda x: isinstance(x, Given))

    def filled(self, make: Callable[[Given], Tensor]) -> list[Tensor]:
        return [make(given) for given in self.leaves]

    def nested(self, tensors: list[Tensor]) -> Any:
        """(args, kwargs)."""
        _, structure = tree_flatten(self.arguments, is_leaf=lambda x: isinstance(x, Given))
        return tree_unflatten(tensors, structure)

    def zeros(self) -> Any:
        """(args, kwargs) for a batch of one."""
        return self.nested(self.filled(lambda g: torch.zeros(1, *g.shape, dtype=g.dtype, device=self.device)))


@dataclass
class Seen:
    """By module: the shapes of its first argument without the batch, and what it returned for each."""

    shapes: dict[nn.Module, set[tuple[int, ...]]] = field(default_factory=dict)
    results: dict[nn.Module, dict[Given, Given]] = field(default_factory=dict)

    def add(self, original: nn.Module, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        x = next(iter((*args, *kwargs.values())), None)
        if not isinstance(x, Tensor):
            return
        given = Given(tuple(x.shape[1:]), x.dtype)
        self.shapes.setdefault(original, set()).add(given.shape)
        if isinstance(output, Tensor) and output.dim() and x.dim() and len(output) == len(x):
            self.results.setdefault(original, {})[given] = Given(tuple(output.shape[1:]), output.dtype)

    def given(self, module: nn.Module) -> Given | None:
        """What a module was given, where that was always the same."""
        found = [*self.results.get(module, ())]
        return found[0] if len(found) == 1 and len(self.shapes[module]) == 1 else None


def record(model: nn.Module, inputs: Inputs) -> Seen:
    """What each module sees when a copy of the model runs on zeros in eval mode.

    Raises:
        ShapeError: it does not run.
        UnknownBoundError: it cannot be copied.
    """
    seen = Seen()
    tried = private_copy(model).eval()
    for original, module in zip(model.modules(), tried.modules(), strict=True):
        module.register_forward_hook(partial(seen.add, original), with_kwargs=True)
    args, kwargs = inputs.zeros()
    try:
        with torch.no_grad():
            tried(*args, **kwargs)
    except ShapeError:
        raise
    except Exception as error:  # the model's own code: anything may come out
        shapes = [given.shape for given in inputs.leaves]
        raise ShapeError(
            f"the model does not accept inputs of shape {', '.join(map(str, shapes))} "
            f"({' '.join(str(error).split())}); pass the shape of one input without the batch dimension"
        ) from None
    return seen


def record_shapes(model: nn.Module, input_shape: InputShape) -> dict[nn.Module, set[tuple[int, ...]]]:
    """The input shapes, without the batch, that each module sees.

    Raises:
        ShapeError: the model does not run on them.
        UnknownBoundError: it cannot be copied.
    """
    return observed(model, input_shape)[1].shapes


def observed(model: nn.Module, input_shape: InputShape) -> tuple[Inputs, Seen]:
    """The inputs, and what the modules see of them; where an embedding takes them, they are whole numbers.

    Raises:
        ShapeError: the model does not run on them.
        UnknownBoundError: it cannot be copied.
    """
    like = like_of(model)
    inputs = Inputs.of(input_shape, like)
    try:
        return inputs, record(model, inputs)
    except LipschitzError:
        if not any(isinstance(module, (nn.Embedding, nn.EmbeddingBag)) for module in model.modules()):
            raise
    inputs = Inputs.of(input_shape, like, torch.long)
    return inputs, record(model, inputs)


def like_of(model: nn.Module) -> Tensor:
    """A tensor of the dtype and device that the model runs in."""
    return next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
