"""The layer contract: effective weights, their cache, the argument checks, and the bound.

A layer holds *raw* parameters; its effective weight is a pure function of them. Nothing else is state, so nothing can
go stale: the cache of an effective weight is used only while every raw parameter equals, element by element, what the
weight was computed from. A version counter would be cheaper to compare, but `param.data.copy_()`, which swaps of
averaged weights use, does not advance it.
"""

from __future__ import annotations

import copy
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from liplayers.core.checks import check_dtype, check_shape
from liplayers.core.module import LipschitzModule
from liplayers.core.precision import exact_precision, executed_dtype

_shared: ContextVar[dict | None] = ContextVar("liplayers_shared_weights", default=None)
_SIZES_KEPT = 4


@contextmanager
def cached() -> Iterator[None]:
    """Within this context each effective weight is computed once, even where gradients are needed.

    For layers that are used several times in one forward pass, and for losses that read a weight. Changing a raw
    parameter in place inside the context is noticed, except through `param.data`. Contexts may be nested; the inner
    one shares the outer one's weights.

    >>> from liplayers import AOLLinear
    >>> layer = AOLLinear(4, 4)
    >>> with cached():
    ...     layer.weight is layer.weight
    True
    """
    token = _shared.set({}) if _shared.get() is None else None
    try:
        yield
    finally:
        if token is not None:
            _shared.reset(token)


class _Kept:
    """Effective weights by key, and copies of the raw parameters that they were computed from.

    Whoever runs a layer, in whatever thread, finds both or neither here. A copy or a pickle begins without any.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.raw: list[Tensor] = []
        self.weights: dict[tuple, tuple[tuple[int, ...], Any]] = {}  # key → (versions of the weight's tensors, weight)

    def __reduce__(self) -> tuple[type[_Kept], tuple[()]]:
        return _Kept, ()


class ParametrizedModule(LipschitzModule):
    """A module whose effective weight is a pure function of its raw parameters.

    Subclasses state the shapes of those parameters in `raw_shapes` and implement `compute_effective(*key)`, which
    returns a tensor or a tuple of tensors; `effective(*key)` calls it with autocast off, in float32 at least, and
    caches.
    """

    raw_names: tuple[str, ...] = ("raw",)
    raw: nn.Parameter
    constant_bound = True  # whatever the raw parameters are
    range_exponent = 0.4  # of the least normal number: raw entries below count as zero, above its inverse as that

    def __init__(self) -> None:
        super().__init__()
        self._kept = _Kept()

    compute_effective: Callable[..., Any]

    def raw_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each raw parameter, "raw" first."""
        raise NotImplementedError(f"{type(self).__name__} does not implement raw_shapes()")

    def _make_raw(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        shapes = self.raw_shapes()
        check_dtype(self, dtype)
        self.raw_names = tuple(shapes)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))

    def effective(self, *key: Any) -> Any:
        """The effective weight; `key` holds what else it depends on (the grid of a Fourier layer).

        Where gradients with respect to the raw parameters are needed, it is computed afresh at each call (once inside
        `cached()`); otherwise once, until a raw parameter changes in any way.
        """
        if torch.compiler.is_compiling() or _in_func_transform():
            return self._compute(*key)
        raw = [getattr(self, name) for name in self.raw_names]
        if torch.is_grad_enabled() and any(p.requires_grad for p in raw):
            shared = _shared.get()
            if shared is None:
                return self._compute(*key)
            versions = _versions(raw)
            entry = shared.get((self, key))
            # the parameters themselves, not their addresses: torch.func.functional_call puts others in their place
            if entry is None or entry[1] != versions or not all(map(operator.is_, entry[0], raw)):
                entry = shared[(self, key)] = (raw, versions, self._compute(*key))
            return entry[2]
        kept, differentiable = self._kept, torch.is_grad_enabled()
        with kept.lock:
            unchanged = len(kept.raw) == len(raw) and all(map(_identical, kept.raw, raw))
            entry = kept.weights.get(key) if unchanged else None
            # nobody wrote into the weight that was handed out
            if entry is not None and entry[0] == _versions(entry[1]):
                return entry[1]
            # inference tensors would be of no use to a later backward pass with respect to the input
            with torch.inference_mode(False), torch.set_grad_enabled(differentiable):
                if not unchanged:
                    kept.raw, kept.weights = [p.detach().clone() for p in raw], {}
                kept.weights.pop(key, None)
                if len(kept.weights) >= _SIZES_KEPT:
                    kept.weights.pop(next(iter(kept.weights)))
                weight = self._holding(kept.raw)._compute(*key)
                kept.weights[key] = (_versions(weight), weight)
            return weight

    def _holding(self, raw: Sequence[Tensor]) -> Self:
        """This layer with other raw parameters, which no other thread writes to."""
        other = copy.copy(self)
        other._parameters = {**self._parameters, **dict(zip(self.raw_names, raw, strict=True))}  # type: ignore[arg-type]
        return other

    def _compute(self, *key: Any) -> Any:
        for name, shape in self.raw_shapes().items():
            check_shape(self, name, getattr(self, name), shape)
            check_dtype(self, getattr(self, name).dtype)
        with exact_precision(self.raw_device):
            return self.compute_effective(*key)

    @property
    def raw_device(self) -> torch.device:
        return getattr(self, self.raw_names[0]).device

    def raw_values(self) -> tuple[Tensor, ...]:
        """The raw parameters in the precision that the effective weight is computed in, float32 at least.

        Entries beyond 1e±15 (of float32) count as zero or as the limit: maps that do not depend on a parameter's scale
        have gradients as large as its inverse, and formulas square it.
        """
        raw = (getattr(self, name) for name in self.raw_names)
        return tuple(_in_range(p.to(torch.promote_types(p.dtype, torch.float32)), self.range_exponent) for p in raw)

    def executed_dtype(self) -> torch.dtype:
        """The dtype that matrix products run in here and now: the parameters', or autocast's inside its context."""
        return executed_dtype(getattr(self, self.raw_names[0]))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._kept = _Kept()  # moved or cast: the old weight is only a waste of memory
        return super()._apply(fn, recurse)


def _in_range(raw: Tensor, exponent: float) -> Tensor:
    least = torch.finfo(raw.dtype).tiny ** exponent
    value = raw.detach()  # what counts as zero keeps its gradient
    return raw.clamp(-1 / least, 1 / least) - torch.where(value.abs() < least, value, 0)


def _in_func_transform() -> bool:
    """Whether torch.func transforms run: then a parameter stands for many, or for one to differentiate by."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _versions(value: Any) -> tuple[int, ...]:
    return tuple(t._version for t in tree_leaves(value) if isinstance(t, Tensor))


def _identical(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
