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
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from liplayers.errors import ArgumentError, SettledError, ShapeError

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


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_TORCHS = frozenset(vars(nn.Module()))  # what torch itself changes in a module
_CHANGING = frozenset({"_kept"})


def check_dtype(owner: object, dtype: torch.dtype | None) -> None:
    """Raise ArgumentError unless parameters of that dtype are real numbers that layers compute with."""
    if dtype is not None and dtype not in DTYPES:
        known = ", ".join(map(str, DTYPES))
        raise ArgumentError(f"{type(owner).__name__}: dtype={dtype!r}; expected one of {known}")


def check_shape(owner: object, name: str, value: Tensor, expected: Sequence[int]) -> None:
    """Raise ShapeError unless a parameter has the shape that it was made with: others may broadcast."""
    if tuple(value.shape) != tuple(expected):
        raise ShapeError(
            f"{type(owner).__name__}: {name} is of shape {tuple(value.shape)}; expected {tuple(expected)}, "
            f"as constructed: build a new layer"
        )


class SettledModule(nn.Module):
    """A module whose settings stay what the constructor made of them; its parameters and modules may change.

    Weights, those kept, checks and bounds depend on settings in more ways than could be asked again at each use. What
    is set a second time is refused, so constructors set each once; copies and pickles do not pass through here.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        self._check_not_settled(name)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self._check_not_settled(name)
        super().__delattr__(name)

    def _check_not_settled(self, name: str) -> None:
        own = vars(self).get(name)
        settled = name in vars(self) and name not in _TORCHS | _CHANGING and not (callable(own) or torch.is_tensor(own))
        rule = getattr(type(self), name, None)
        if settled or (isinstance(rule, property) and rule.fset is None):
            raise SettledError(
                f"{type(self).__name__}: {name} cannot be changed after construction, since weights and bounds depend "
                f"on it: build a new layer"
            )

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            check_dtype(self, param.dtype)
            held = self._parameters.get(name)
            check_shape(self, name, param, param.shape if held is None else held.shape)
        super().register_parameter(name, param)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, param in self._parameters.items():
            value = state_dict.get(prefix + name)
            # what is one number now was a scalar, which cannot be sharded, in older checkpoints
            if param is not None and param.shape == (1,) and isinstance(value, Tensor) and value.dim() == 0:
                state_dict[prefix + name] = value[None]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def checked(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor.dtype in DTYPES:
                check_dtype(self, moved.dtype)
            return moved

        return super()._apply(checked, recurse)


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


class LipschitzModule(SettledModule):
    """A module that states a proven bound on its own ℓ2 Lipschitz constant."""

    def lipschitz_bound(self) -> float:
        """A proven upper bound on the Lipschitz constant of the map, in exact arithmetic on the exact weights.

        Exact weights are what the raw parameters stand for. Those that run are rounded to the layer's dtype: a bound
        that is 1 by construction may be exceeded by some units in the last place (4e-7 seen in float32). Half precision
        is counted here; for single and double, certificates are given for what `freeze` makes of a layer, whose bound
        is proven for the numbers that run.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement lipschitz_bound()")

    def check_parts(self) -> None:
        """Raise ArgumentError or UnknownBoundError where its parts, as they are now, allow no bound; without norms."""

    def constant_errors(self) -> dict[str, float]:
        """How far buffers that stand for constants are from them, by the buffer's name; none unless a layer says so.

        Upper bounds on the spectral norm of the difference between a buffer as it runs and the exact constant, where
        lipschitz_bound() is about the exact one.
        """
        return {}

    def frozen(self, shape: tuple[int, ...] | None) -> nn.Module:
        """What `liplayers.freeze` puts in its place, for a layer that computes otherwise than the shared base classes.

        Plain modules with computed weights, equal to this one in eval mode on inputs of `shape` (without the batch;
        None where it is not known).
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement frozen()")


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


def executed_dtype(weight: Tensor) -> torch.dtype:
    """The dtype that products with a weight run in here and now: its own, or autocast's, which lets float64 be."""
    device = weight.device.type
    if device == "meta" or weight.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return weight.dtype
    return torch.get_autocast_dtype(device)


def executed(weight: Tensor) -> Tensor:
    """In float64, the weight that runs here and now."""
    return weight.detach().to(executed_dtype(weight)).double()


class Setting:
    """A setting of torch's for the whole process, and how many threads need it to be `value`.

    The first of them sets it, the last puts back what was there; where it has a value that will do, nothing is set.
    """

    def __init__(self, owner: Any, name: str, value: Any, will_do: tuple[Any, ...] = (), default: Any = None) -> None:
        self.owner, self.name, self.value, self.will_do, self.default = owner, name, value, (value, *will_do), default
        self.holders = 0
        self.before: Any = None

    @property
    def fits(self) -> bool:
        """Whether it will do, and not only for as long as another thread holds it."""
        return not self.holders and self._now() in self.will_do

    def take(self) -> bool:
        """Whether it has to be given back."""
        if self.fits:
            return False
        if self._now() not in self.will_do:
            self.before = self._now()
            self._set(self.value)
        self.holders += 1
        return True

    def give_back(self) -> None:
        self.holders -= 1
        if self.holders or self._now() != self.value:  # meanwhile set by someone else
            return
        if self.default is not None:
            self._set(self.default)
        if self._now() != self.before:  # it was not inherited from a more general setting
            self._set(self.before)

    def _now(self) -> Any:
        return getattr(self.owner, self.name)

    def _set(self, value: Any) -> None:
        setattr(self.owner, self.name, value)


_settings_lock = threading.Lock()


@contextmanager
def held(settings: Sequence[Setting], general: Sequence[Setting] = ()) -> Iterator[None]:
    """Within this context every setting will do, whatever other threads do in theirs.

    `general` are settings that the others may inherit from: set first, where one of the others will not do.
    """
    taken: list[Setting] = []
    try:
        with _settings_lock:
            if any(setting.holders for setting in general) or not all(setting.fits for setting in settings):
                taken.extend(setting for setting in (*general, *settings) if setting.take())
        yield
    finally:
        with _settings_lock:
            for setting in reversed(taken):
                setting.give_back()


def _in_float32(backend: Any) -> Setting:
    return Setting(backend, "fp32_precision", "ieee", will_do=("none",), default="none")


# cudnn's convolutions inherit TF32 in a way that cannot be set again: what they inherit from is changed first
_GENERAL = [Setting(torch.backends, "fp32_precision", "ieee")]
_CUDA = [_in_float32(torch.backends.cuda.matmul), _in_float32(torch.backends.cudnn.conv)]  # type: ignore[attr-defined]
_ONEDNN = [_in_float32(torch.backends.mkldnn.matmul), _in_float32(torch.backends.mkldnn.conv)]  # type: ignore[attr-defined]


@contextmanager
def exact_precision(device: torch.device) -> Iterator[None]:
    """Autocast off, and products of float32 matrices and kernels on `device` in float32, not in TF32 or bfloat16."""
    # meta knows no autocast; torch.compile traces no backend settings
    fixed = device.type == "meta" or torch.compiler.is_compiling()
    with (
        nullcontext() if fixed else held(_CUDA if device.type == "cuda" else _ONEDNN, _GENERAL),
        nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False),
    ):
        yield


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


def check_positive(owner: object, **sizes: int) -> None:
    """Raise ArgumentError unless every size is an integer of at least 1."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            owner_name = getattr(owner, "__name__", type(owner).__name__)
            raise ArgumentError(f"{owner_name}: {name}={value!r}; expected an integer of at least 1")


class LipschitzLinear(ParametrizedModule):
    """Base of the dense families: y = Wx + b with W = `map_weight(raw)`, ‖W‖ ≤ 1.

    The arguments are those of `torch.nn.Linear`. Subclasses implement `map_weight`, and may change `reset_parameters`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(self, in_features=in_features, out_features=out_features)
        self.in_features = in_features
        self.out_features = out_features
        self._make_raw(device, dtype)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def raw_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"raw": (self.out_features, self.in_features)}

    def reset_parameters(self) -> None:
        """An orthogonal raw matrix, no bias."""
        fill_orthogonal_(self.raw)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    map_weight: Callable[..., Tensor]
    """(*raw parameters) → the contraction W, (out, in), that they stand for."""

    def compute_effective(self) -> Tensor:
        return self.map_weight(*self.raw_values()).to(self.raw.dtype)

    @property
    def weight(self) -> Tensor:
        """The effective weight, (out_features, in_features)."""
        return self.effective()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.effective(), self.bias)

    def lipschitz_bound(self) -> float:
        dtype = self.executed_dtype()
        if torch.finfo(dtype).bits >= 32:
            return 1.0
        return 1.0 + low_precision_excess(self, dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def low_precision_excess(module: LipschitzLinear, dtype: torch.dtype) -> float:
    """‖W_executed − W‖_F, what rounding the weight to bfloat16 or float16 can add to its norm."""
    with torch.no_grad(), exact_precision(module.raw_device):
        exact = module.map_weight(*module.raw_values()).double()
        return torch.linalg.matrix_norm(exact.to(module.raw.dtype).to(dtype).double() - exact).item()


def fill_orthogonal_(raw: Tensor) -> Tensor:
    """`nn.init.orthogonal_` for every dtype (its QR knows no half precision)."""
    Q = torch.empty(raw.shape, dtype=torch.promote_types(raw.dtype, torch.float32), device=raw.device)
    with torch.no_grad():
        return raw.copy_(nn.init.orthogonal_(Q))
