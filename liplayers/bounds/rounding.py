"""How far the floating-point evaluation of a frozen model can be from the exact one.

The model runs once, on zeros, and every operation of ATen that it dispatches is intercepted. Each value is followed by
two numbers that hold for all inputs of norm up to a given one: `magnitude` ≥ ‖h‖ of the exact value h, and `error`
≥ ‖ĥ − h‖ of what is computed. An operation without a rule raises; nothing counts as exact by default.

Rules, with u = 2⁻⁵³ (float64) and γ_n = nu/(1 − nu): a linear map with inner products of length n has the error
‖W‖·E + γ_{n+2}(‖|W|‖(H + E) + ‖b‖), in whatever order it sums and with or without fused multiply-adds; sums have
u(H + E); maxima, sorting and moving entries have none. Those alone would let the error grow by ‖|W|‖ from layer to
layer. A module g with a proven bound L does better: g is computed at ĥ, of norm up to H + E, with some error e that
the rules give for an exact input, and ‖g(ĥ) − g(h)‖ ≤ L·E. So E ← L·E + e, and H ← L·H + ‖g(0)‖.

Tensors that do not depend on the input are constants, exact as they were computed, but for those that a module says
stand for others (`constant_errors`). Results below the least normal number may lose everything.

Source: the analysis of inner products is Higham, Accuracy and Stability of Numerical Algorithms, 2002, ch. 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from liplayers.bounds.composition import layer_bounds
from liplayers.bounds.torch_modules import Shape
from liplayers.bounds.twin import twin
from liplayers.core.module import LipschitzModule
from liplayers.errors import ArgumentError, UnknownBoundError
from liplayers.linalg.convolution import overlap
from liplayers.linalg.verified import conv_norm_enclosure, entry_norm, largest_norm_enclosure

__all__ = ["FACTORIES", "RULES", "WHOLE", "Arithmetic", "Rounding", "RoundingAnalysis", "RoundingRow", "Value", "aten"]

_SLACK = 1 + 2.0**-40  # of each rule's own arithmetic in float64: fewer than 2¹² roundings
_FUNCTION = 64  # units u by which torch's exp, tanh, erf and what is made of them may be off

aten = torch.ops.aten


@dataclass(frozen=True)
class Value:
    """‖h‖ ≤ magnitude and ‖ĥ − h‖ ≤ error, for all inputs in the domain."""

    magnitude: float
    error: float = 0.0

    @property
    def computed(self) -> float:
        """At least ‖ĥ‖."""
        return self.magnitude + self.error

    def scaled(self, factor: float) -> Value:
        return Value(self.magnitude * factor, self.error * factor)


@dataclass(frozen=True)
class Arithmetic:
    """A format of floating-point numbers: unit roundoff, least normal number, and what is far from overflow."""

    u: float
    tiny: float
    large: float

    @classmethod
    def of(cls, dtype: torch.dtype) -> Arithmetic:
        info = torch.finfo(dtype)
        return cls(info.eps / 2, 4 * info.tiny, info.max**0.85)

    def gamma(self, n: int) -> float:
        """γ_n."""
        return n * self.u / (1 - n * self.u) if n * self.u < 0.5 else math.inf

    def product_gamma(self, n: int, is_complex: bool) -> float:
        """ε with |fl(WX) − WX| ≤ ε|W||X|, for inner products of length n; complex ones by three or four real ones."""
        return self.gamma(8 * (2 * n + 8) if is_complex else n + 2)

    def rounded(self, value: Value, roundings: int, entries: int) -> Value:
        """The value with γ_roundings·‖ĥ‖ more of error, and with what underflow may lose in each entry."""
        more = self.gamma(roundings) * value.computed + self.tiny * roundings * math.sqrt(entries)
        return Value(value.magnitude, value.error + more)


@dataclass(frozen=True)
class RoundingRow:
    """One module: where it is, its bound, the norm of its output, the error made in it, the error of its output.

    All for inputs of the norm that was asked for; a module that runs several times has its last run here.
    """

    path: str
    type: str
    bound: float
    magnitude: float
    local_error: float
    error: float


@dataclass(frozen=True)
class Rounding:
    """magnitude ≥ ‖f(x)‖, error ≥ ‖f̂(x) − f(x)‖ for all floating-point x of norm up to `input_norm`, and how it grows.

    `rows` has the modules whose bound is not composed from those of their parts, in the order that they run in.
    """

    input_norm: float
    magnitude: float
    error: float
    rows: tuple[RoundingRow, ...]


class RoundingAnalysis:
    """The rounding errors of a frozen model, for inputs of any norm.

    In float32 it holds for inner products that sum products, which torch's convolutions need not do in that precision
    (Winograd, TF32); certificates are about float64.

    Args:
        network: from `liplayers.freeze`, of one dtype, in evaluation mode, on the CPU.
        input_shape: of one input, without the batch dimension.
        bounds: of its modules by path, from `layer_bounds`; None computes them.
        dtype: that it is evaluated in, torch.float64 or torch.float32; it must be that of its parameters.

    Raises:
        ArgumentError: parameters of another dtype or not on the CPU, training mode.
        UnknownBoundError: a module without a bound, or an operation whose rounding is not known.

    >>> from liplayers import AOLLinear, MaxMin, freeze
    >>> network = freeze(nn.Sequential(AOLLinear(4, 4), MaxMin()), (4,)).double()
    >>> 0 < RoundingAnalysis(network, (4,)).at(1.0).error < 1e-14
    True
    """

    def __init__(
        self,
        network: nn.Module,
        input_shape: Shape,
        bounds: Mapping[str, float] | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        _check_network(network, dtype)
        self.network = network
        self.dtype = dtype
        self.input_shape = tuple(input_shape)
        self.bounds = dict(layer_bounds(network, input_shape) if bounds is None else bounds)

    @torch.inference_mode(False)
    def at(self, input_norm: float) -> Rounding:
        """The error for all inputs of norm up to `input_norm`."""
        network = twin(self.network)  # for the hooks: the network may run elsewhere
        run = _Run(self.dtype, self._leaves(network), _constant_errors(network))
        x = torch.zeros(1, *self.input_shape, dtype=self.dtype)
        run.set(x, Value(input_norm))
        try:
            with torch.no_grad(), run.hooks(), run:
                y = network(x)
        except Exception:  # of operators, Python turns our TypeError into one of its own
            if run.refusal is None:
                raise
        if run.refusal is not None:
            raise run.refusal
        if not run.depends(y):
            raise run.unknown("what it returns does not depend on its input, or was computed outside torch")
        found = run.get(y)
        error = found.error if math.isfinite(found.error) else math.inf
        return Rounding(input_norm, found.magnitude, error, tuple(run.rows.values()))

    def _leaves(self, network: nn.Module) -> dict[nn.Module, tuple[str, float]]:
        """The modules whose bound was not composed from those of their parts."""
        parts = [path.split(".") for path in self.bounds if path]
        composed = {".".join(names[:i]) for names in parts for i in range(len(names))}
        paths = self.bounds.keys() - composed
        return {network.get_submodule(path): (path, self.bounds[path]) for path in paths}


def _check_network(network: nn.Module, dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float64):
        raise ArgumentError(f"dtype={dtype}; the rounding of torch.float32 and torch.float64 can be analysed")
    for path, module in network.named_modules():
        if module.training:
            raise ArgumentError(f"{path or 'the model'} ({type(module).__name__}): it is in training mode")
    for name, parameter in network.named_parameters():
        if parameter.dtype != dtype or parameter.device.type != "cpu":
            raise ArgumentError(f"{name} is {parameter.dtype} on {parameter.device}; expected {dtype} on the CPU")


def _constant_errors(network: nn.Module) -> dict[int, float]:
    """By storage: how far a buffer is from what it stands for."""
    return {
        _storage(module.get_buffer(name)): error
        for module in network.modules()
        if isinstance(module, LipschitzModule)
        for name, error in module.constant_errors().items()
    }


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _entries(x: Tensor) -> int:
    """The number of entries in the storage of x."""
    return x.untyped_storage().nbytes() // x.element_size()


def _repeats(x: Tensor) -> int:
    """How often each stored entry occurs in a tensor that `expand` made."""
    return math.prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride == 0)


class _Run(TorchDispatchMode):
    """One run of the model: values by storage, so that views and writes in place are seen to be the same."""

    def __init__(
        self,
        dtype: torch.dtype,
        leaves: Mapping[nn.Module, tuple[str, float]],
        constant_errors: Mapping[int, float],
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.arithmetic = Arithmetic.of(dtype)
        self.leaves = leaves
        self.constant_errors = constant_errors
        self.rows: dict[str, RoundingRow] = {}
        self.paused = False
        self.where = ""
        self.refusal: UnknownBoundError | None = None
        self._values: dict[int, Value] = {}
        self._norms: dict[tuple, tuple[float, float]] = {}
        self._alive: list[Tensor] = []  # a storage that was freed would give its address to another

    # values

    def get(self, x: Any) -> Value:
        """The value of a tensor, or of a number as a tensor of one entry."""
        if not isinstance(x, Tensor):
            return Value(abs(float(x)))
        value = self._values.get(_storage(x))
        if value is None:
            return Value(_norm(x), self.constant_errors.get(_storage(x), 0.0))
        return value.scaled(math.sqrt(_repeats(x)))

    def set(self, x: Tensor, value: Value) -> None:
        self._values[_storage(x)] = value
        self._alive.append(x)

    def depends(self, x: Any) -> bool:
        return isinstance(x, Tensor) and _storage(x) in self._values

    def spread(self, x: Any, out: Tensor) -> Value:
        """The value of an operand that is broadcast to the shape of the result."""
        entries = x.numel() if isinstance(x, Tensor) else 1
        return self.get(x).scaled(math.sqrt(out.numel() / entries)) if entries else Value(0.0)

    def largest(self, factor: Any) -> float:
        """|factor|, of a constant the largest entry."""
        if not isinstance(factor, Tensor):
            return abs(factor)
        if _storage(factor) in self.constant_errors:
            raise self.unknown("it multiplies entry by entry with an approximate constant")
        return factor.abs().amax().item() if factor.numel() else 0.0

    def weight_norms(
        self, weight: Tensor, kind: str, compute: Callable[[], tuple[float, float]]
    ) -> tuple[float, float]:
        """(‖W‖, ‖|W|‖), computed once for each constant."""
        key = (_storage(weight), weight.storage_offset(), tuple(weight.shape), weight.stride(), kind)
        if key not in self._norms:
            self._norms[key] = compute()
            self._alive.append(weight)
        return self._norms[key]

    # operations

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        if func._schema.is_mutable and any(map(self.depends, tensors)) and not self.depends(args[0]):
            whole = args[0].as_strided((_entries(args[0]),), (1,), 0)
            self.set(args[0], Value(_norm(whole)))  # a constant that is written to; read before it is
        out = func(*args, **kwargs)
        if func.overloadpacket in FACTORIES:
            if func.overloadpacket in (aten.new_empty, aten.empty_like):  # to be filled in place
                self.set(out, Value(0.0))
        elif any(map(self.depends, tensors)):
            rule = RULES.get(func.overloadpacket)
            if rule is None:
                raise self.unknown(f"the rounding of {func} is not known")
            try:
                value = rule(self, out, *args, **kwargs)
            except TypeError:  # of the call, or a refusal
                raise self.refusal or self.unknown(
                    f"the rounding of {func} with these arguments is not known"
                ) from None
            if value is not None:
                self._record(func, out, value)
        elif torch.Tag.nondeterministic_seeded in func.tags:
            raise self.unknown(f"{func} draws random numbers")
        elif any(_storage(a) in self.constant_errors for a in tensors) and not self._views(tensors, out):
            raise self.unknown(f"{func} computes with an approximate constant")
        return out

    def _views(self, tensors: list[Tensor], out: Any) -> bool:
        storages = {_storage(a) for a in tensors}
        return all(_storage(o) in storages for o in tree_leaves(out) if isinstance(o, Tensor))

    def _record(self, func: Any, out: Any, value: Value) -> None:
        out, *others = out if isinstance(out, (tuple, list)) else [out]
        for other in others:  # the positions of maxima depend on the input, and no rule takes them
            self.set(other, Value(math.inf, math.inf))
        self.require_dtype(func, out)
        magnitude, error = value.magnitude * _SLACK, value.error * _SLACK
        if func._schema.is_mutable and out.numel() < _entries(out):
            old = self.get(out)  # the rest of the storage stays as it was
            magnitude, error = math.hypot(magnitude, old.magnitude) * _SLACK, math.hypot(error, old.error) * _SLACK
        overflows = not (magnitude < self.arithmetic.large and error < self.arithmetic.large)
        self.set(out, Value(math.inf, math.inf) if overflows else Value(magnitude, error))

    def require_dtype(self, what: Any, x: Tensor) -> None:
        if x.dtype not in (self.dtype, self.dtype.to_complex()):
            raise self.unknown(f"{what} gives {x.dtype}, expected {self.dtype}")

    def unknown(self, reason: str) -> UnknownBoundError:
        self.refusal = UnknownBoundError(
            f"{self.where or 'the model'}: {reason}, so that its rounding cannot be counted; replace it by a module "
            "that freezes to torch's own layers, or certify with mode=fast, which counts no rounding"
        )
        return self.refusal

    # modules

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = []
        for module in self.leaves:
            given: list[Value] = []
            handles.append(module.register_forward_pre_hook(self._enter(given), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave(given), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, given: list[Value]) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            (x,) = (*args, *kwargs.values())
            if self.paused or not self.depends(x):
                return
            path = self.leaves[module][0]
            self.where = f"{path} ({type(module).__name__})" if path else type(module).__name__
            given.append(self.get(x))
            self.set(x, Value(given[-1].computed))
            self.paused = type(module) in WHOLE

        return hook

    def _leave(self, given: list[Value]) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            (x,) = (*args, *kwargs.values())
            whole = WHOLE.get(type(module))
            if not given or (self.paused and whole is None):
                return
            if whole is None and not self.depends(output):
                raise self.unknown("what it returns was computed outside torch")
            path, bound = self.leaves[module]
            before = given.pop()
            inside = self.get(output)
            if whole is not None:
                inside = Value(math.inf, whole(module, self.get(x), output, self.arithmetic))
            self.paused = True
            at_zero = _norm(module.forward(torch.zeros_like(x))) + inside.error
            self.paused = False
            magnitude = min(inside.magnitude, (bound * before.magnitude + at_zero) * _SLACK)
            error = (bound * before.error + inside.error) * _SLACK
            if _storage(x) == _storage(output) and output.numel() < _entries(output):
                magnitude, error = math.hypot(magnitude, before.magnitude), math.hypot(error, before.error)
            self.set(x, before)
            self.set(output, Value(magnitude, error))
            self.rows[path] = RoundingRow(path, type(module).__name__, bound, magnitude, inside.error, error)
            self.where = ""

        return hook


def _norm(x: Tensor) -> float:
    """At least ‖x‖₂."""
    values = torch.view_as_real(x) if x.is_complex() else x
    values = values.detach().double()
    largest = values.abs().amax().item() if values.numel() else 0.0
    if not largest or not math.isfinite(largest):
        return largest
    scale = 2.0 ** -min(1000, max(-1000, math.frexp(largest)[1]))
    return (values * scale).square().sum().sqrt().item() / scale * (1 + (values.numel() + 8) * 2.0**-52) + 2.0**-1020


# Rules: (run, result, *arguments) → Value, or None for a view -------------------------------------------------------


def _linear(
    run: _Run, x: Value, norms: tuple[float, float], n: int, out: Tensor, bias: float = 0.0, is_complex: bool = False
) -> Value:
    """Wx + b with norms ‖W‖ and ‖|W|‖, inner products of length n, and ‖b‖."""
    (sigma, absolute), format = norms, run.arithmetic
    error = format.product_gamma(n, is_complex) * (absolute * x.computed + bias)
    underflow = format.tiny * 8 * (n + 8) * math.sqrt(out.numel())
    return Value(sigma * x.magnitude + bias, sigma * x.error + error + underflow)


def _product(run: _Run, out: Tensor, a: Tensor, b: Tensor, bias: Value = Value(0.0)) -> Value:
    """A product of matrices, one of them constant: its norm is that of its transpose, too."""
    if run.depends(a) and run.depends(b):
        raise run.unknown("it multiplies values that both depend on the input")
    constant, x = (b, a) if run.depends(a) else (a, b)
    n = constant.shape[-2] if constant is b else constant.shape[-1]

    def norms() -> tuple[float, float]:
        absolute = entry_norm(constant)
        return min(largest_norm_enclosure(constant, math.inf).upper, absolute), absolute

    weight = run.weight_norms(constant, "matrix", norms)
    value = _linear(run, run.get(x), weight, n, out, bias.magnitude, out.is_complex())
    approximation = run.constant_errors.get(_storage(constant), 0.0) * run.get(x).computed
    return Value(value.magnitude, value.error + approximation + bias.error)


def _addmm(run: _Run, out: Tensor, bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Value:
    if beta != 1 or alpha != 1:
        raise run.unknown(f"addmm with beta={beta}, alpha={alpha}")
    return _product(run, out, a, b, run.spread(bias, out))


def _convolution(
    run: _Run, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int],
    dilation: list[int], transposed: bool, output_padding: list[int], groups: int,
) -> Value:  # fmt: skip
    if run.depends(weight) or weight.dim() not in (3, 4, 5):
        raise run.unknown("a convolution other than of lines, images and volumes with a constant kernel")
    kernel = weight[:, :, None] if weight.dim() == 3 else weight
    strides, dilations = ((1, size[0]) if len(size) == 1 else (size[-2], size[-1]) for size in (stride, dilation))

    def norms() -> tuple[float, float]:
        grouped = kernel.double().abs().flatten(2).sum(2).unflatten(0, (groups, -1))
        absolute = entry_norm(grouped) * (1 + kernel[0, 0].numel() * 2.0**-52)
        # a transposed convolution is the adjoint of the convolution with the same kernel, one of volumes the sum of
        # those with its slices
        planes = kernel.unbind(2) if kernel.dim() == 5 else (kernel,)
        total = sum(conv_norm_enclosure(plane, strides, dilations, groups, math.inf).upper for plane in planes)
        return min(total * _SLACK, absolute), absolute

    inner = (kernel.shape[0] // groups if transposed else kernel.shape[1]) * kernel[0, 0].numel()
    norm = run.weight_norms(weight, f"kernel {stride} {dilation} {groups}", norms)
    offset = 0.0 if bias is None else run.get(bias).magnitude * math.sqrt(out[0, 0].numel())
    return _linear(run, run.get(x), norm, inner, out, offset)


def _add(run: _Run, out: Tensor, a: Any, b: Any, *, alpha: float = 1) -> Value:
    left, right = run.spread(a, out), run.spread(b, out).scaled(abs(alpha))
    terms = Value(left.magnitude + right.magnitude, left.error + right.error)
    return run.arithmetic.rounded(terms, 3, out.numel())  # alpha and a scalar may be rounded, too


def _multiply(run: _Run, out: Tensor, a: Any, b: Any) -> Value:
    if run.depends(a) and run.depends(b):
        raise run.unknown("it multiplies values that both depend on the input")
    x, factor = (a, b) if run.depends(a) else (b, a)
    return run.arithmetic.rounded(run.spread(x, out).scaled(run.largest(factor)), 3, out.numel())


def _divide(run: _Run, out: Tensor, a: Any, b: Any) -> Value:
    if run.depends(b):
        raise run.unknown("it divides by values that depend on the input")
    smallest = abs(b) if not isinstance(b, Tensor) else b.detach().abs().amin().item() if b.numel() else math.inf
    if not smallest:
        raise run.unknown("it divides by zero")
    # by a scalar it may be a product with the reciprocal
    return run.arithmetic.rounded(run.spread(a, out).scaled(1 / smallest), 3, out.numel())


def _same(run: _Run, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> Value:
    """Entries moved, dropped, sorted, or made no larger and no farther apart, each used once; nothing is rounded."""
    return run.get(x)


def _view(run: _Run, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> Value | None:
    """A view has the value of its storage; on some tensors these operations copy."""
    first = out[0] if isinstance(out, (tuple, list)) else out
    if x.is_floating_point() or x.is_complex() or first.dtype != x.dtype:  # positions stay without a value
        run.require_dtype("a view", first)
    return None if _storage(first) == _storage(x) else run.get(x)


def _abs(run: _Run, out: Tensor, x: Tensor) -> Value:
    if x.is_complex():
        raise run.unknown("absolute values of complex numbers")
    return run.get(x)


def _together(run: _Run, out: Tensor, *operands: Any, **kwargs: Any) -> Value:
    """Maxima and minima, entry by entry: |max(a, b)|² ≤ a² + b², and the same of differences."""
    values = [run.spread(x, out) for x in operands]
    return Value(math.hypot(*(v.magnitude for v in values)), math.hypot(*(v.error for v in values)))


def _concatenation(run: _Run, out: Tensor, parts: list[Tensor], dim: int = 0) -> Value:
    values = [run.get(part) for part in parts]
    return Value(math.hypot(*(v.magnitude for v in values)), math.hypot(*(v.error for v in values)))


def _copy(run: _Run, out: Tensor, target: Tensor, source: Tensor, *args: Any) -> Value:
    if target.dtype != source.dtype:
        raise run.unknown(f"it converts {source.dtype} to {target.dtype}")
    return run.spread(source, target)


def _converted(run: _Run, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Value:
    if x.dtype != out.dtype:
        raise run.unknown(f"it converts {x.dtype} to {out.dtype}")
    return run.get(x)


def _constant_pad(run: _Run, out: Tensor, x: Tensor, pad: list[int], value: float = 0) -> Value:
    inside = run.get(x)
    return Value(math.hypot(inside.magnitude, abs(value) * math.sqrt(out.numel())), inside.error)


def _repeating_pad(run: _Run, out: Tensor, x: Tensor, pad: list[int]) -> Value:
    """Along each axis a pixel occurs once, and at most as often again as there are rows of padding."""
    copies = math.prod(1 + max(0, a) + max(0, b) for a, b in zip(pad[::2], pad[1::2], strict=True))
    return run.get(x).scaled(math.sqrt(copies))


def _vector_norm(run: _Run, out: Tensor, x: Tensor, ord: float = 2, *args: Any, **kwargs: Any) -> Value:
    if ord != 2 or kwargs.get("dtype") is not None:
        raise run.unknown(f"a norm of order {ord}")
    given, terms = run.get(x), x.numel() // max(1, out.numel())
    if given.computed > math.sqrt(run.arithmetic.large):
        return Value(math.inf, math.inf)
    underflow = math.sqrt(x.numel() * run.arithmetic.tiny)  # of the squares
    return Value(given.magnitude, given.error + run.arithmetic.gamma(terms + 8) * given.computed + underflow)


def _sum(run: _Run, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Value:
    terms = x.numel() // max(1, out.numel())
    return run.arithmetic.rounded(run.get(x).scaled(math.sqrt(terms)), terms, out.numel())


def _mean(run: _Run, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Value:
    terms = x.numel() // max(1, out.numel())
    # the sum is rounded relative to Σ|x|, of norm √terms·‖x‖ at most, then divided
    return run.arithmetic.rounded(run.get(x).scaled(1 / math.sqrt(terms)), terms + 3, out.numel())


def _maxima(run: _Run, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> Value:
    """Of all entries along a dimension, or of two tensors."""
    if args and isinstance(args[0], Tensor):
        return _together(run, out, x, args[0])
    return run.get(x)


def _repeated(run: _Run, out: Tensor, x: Tensor, *args: Any) -> Value:
    """Each entry occurs equally often."""
    return run.spread(x, out)


def _filled(run: _Run, out: Tensor, x: Tensor, value: Any = 0.0) -> Value:
    if isinstance(value, Tensor):
        raise run.unknown("it fills a tensor with another one")
    return Value(abs(value) * math.sqrt(out.numel()))


def _max_pool(run: _Run, out: Any, x: Tensor, size: list[int], stride: list[int] = [], *args: Any) -> Value:  # noqa: B006
    dilation = args[1] if len(args) > 1 else [1] * len(size)
    meet = math.prod(overlap(*axis) for axis in zip(size, stride or size, dilation, strict=True))
    return run.get(x).scaled(math.sqrt(meet))


def _selection(run: _Run, out: Any, x: Tensor, *args: Any) -> Value:
    """Each entry of the result is one of x."""
    return run.get(x).scaled(math.sqrt(out[0].numel()))


def _avg_pool(run: _Run, out: Tensor, x: Tensor, size: list[int], stride: list[int] = [], *args: Any) -> Value:  # noqa: B006
    """Rows of |W| sum up to 1 at most, columns to the windows that meet; a divisor scales both."""
    area = math.prod(size)
    meet = math.prod(overlap(n, s) for n, s in zip(size, stride or size, strict=True))
    divisor = args[3] if len(args) > 3 else None
    norm = math.sqrt(meet) * max(1.0, area / abs(divisor) if divisor else 1.0)
    return _linear(run, run.get(x), (norm, norm), area + 3, out)


def _adaptive_avg_pool(run: _Run, out: Tensor, x: Tensor, size: list[int]) -> Value:
    """Along each axis rows of |W| sum up to 1, columns to what `_column_sum` says."""
    axes = zip(x.shape[-len(size) :], out.shape[-len(size) :], strict=True)
    norm = math.sqrt(math.prod(_column_sum(*axis) for axis in axes)) * _SLACK
    return _linear(run, run.get(x), (norm, norm), math.prod(x.shape[-len(size) :]) + 3, out)


def _column_sum(size: int, windows: int) -> float:
    """The largest sum of the weights with which a pixel enters the windows [⌊i·n/w⌋, ⌈(i + 1)·n/w⌉)."""
    sums = [0.0] * size
    for i in range(windows):
        first, end = i * size // windows, -(-(i + 1) * size // windows)
        for pixel in range(first, end):
            sums[pixel] += 1 / (end - first)
    return max(sums, default=0.0)


def _nearest(line: Any) -> Callable[..., Value]:
    """Copies of pixels, as many as there are along each axis; `line` does it along one axis."""

    def rule(run: _Run, out: Tensor, x: Tensor, size: list[int], *scales: float | None) -> Value:
        copies = 1
        for n, m, scale in zip(x.shape[2:], out.shape[2:], scales or (None,) * len(size), strict=True):
            positions = torch.arange(n, dtype=run.dtype)[None, None]
            copies *= int(line(positions, [m], scale).long().flatten().bincount().max())
        return run.get(x).scaled(math.sqrt(copies))

    return rule


def _interpolation(taps: int, line: Callable[..., Tensor]) -> Callable[..., Value]:
    """Interpolation of `taps` pixels along each axis; `line` does it along the first of one axis or two.

    Along an axis of n pixels a coordinate is off by a few units of u·n, and its weights by 16(n + 4)u at most.
    """

    def rule(run: _Run, out: Tensor, x: Tensor, size: list[int], corners: bool, *scales: float | None) -> Value:
        exact, computed = 1.0, 1.0
        for n, m, scale in zip(x.shape[2:], out.shape[2:], scales or (None,) * len(size), strict=True):
            weights = line(torch.eye(n, dtype=torch.float64)[None], m, corners, scale).flatten(2)[0].abs()
            columns, used = weights.sum(1).amax().item(), (weights > 0).sum(1).amax().item()
            norm = math.sqrt(max(1.0, weights.sum(0).amax().item()) * max(columns, 1e-9)) * _SLACK
            exact *= norm
            computed *= norm + 16 * (n + 4) * run.arithmetic.u * math.sqrt(taps * (used + taps))
        given = run.get(x)
        value = _linear(run, given, (exact, exact), taps ** len(size) + 16, out)
        return Value(value.magnitude, value.error + (computed - exact) * _SLACK * given.computed)

    return rule


def _linear_line(lines: Tensor, m: int, corners: bool, scale: float | None) -> Tensor:
    return aten.upsample_linear1d(lines, [m], corners, scale)


def _bicubic_line(lines: Tensor, m: int, corners: bool, scale: float | None) -> Tensor:
    return aten.upsample_bicubic2d(lines[..., None], [m, 1], corners, scale, None)


def _batch_norm(
    run: _Run, out: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor,
    training: bool, momentum: float, eps: float,
) -> Value:  # fmt: skip
    if training:
        raise run.unknown("batch normalisation in training mode")
    scale = (variance.double() + eps).rsqrt().abs() * (1 if weight is None else weight.double().abs())
    pixels = math.sqrt(x.numel() / x.shape[1])
    offset = pixels * (_norm(scale * mean) + (0.0 if bias is None else _norm(bias)))
    given = run.get(x).scaled(scale.amax().item())
    # x·α + β with α = w/√(v + ε) and β = b − μα, or (x − μ)·α + b: each factor off by few units
    value = Value(given.magnitude + offset, given.error)
    return run.arithmetic.rounded(value, 32, x.numel())


def _entrywise(slope: Callable[..., float], at_zero: Callable[..., float]) -> Callable[..., Value]:
    """A function f of each entry with slopes up to `slope`, off by _FUNCTION units u of slope·(|x| + 1) + |f(0)|.

    Both are given the further arguments of the operation.
    """

    def rule(run: _Run, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> Value:
        steepest, offset = slope(*args, **kwargs), math.sqrt(x.numel()) * at_zero(*args, **kwargs)
        given = run.get(x).scaled(steepest)
        scale = given.computed + offset + steepest * math.sqrt(x.numel())
        return Value(given.magnitude + offset, given.error + _FUNCTION * run.arithmetic.u * scale)

    return rule


def _clamp(run: _Run, out: Tensor, x: Tensor, min: Any = None, max: Any = None) -> Value:
    """Between numbers or constants, entry by entry: nothing is rounded, and no two entries move apart."""
    if run.depends(min) or run.depends(max):
        raise run.unknown("it clamps between tensors that depend on the input")
    at_zero = torch.clamp(torch.zeros_like(out), min, max)
    given = run.spread(x, out)
    return Value(given.magnitude + _norm(at_zero), given.error)


def _softplus(run: _Run, out: Tensor, x: Tensor, beta: float = 1, threshold: float = 20) -> Value:
    """log(1 + exp(βx))/β, which torch takes for x where βx is above the threshold."""
    value = _entrywise(_constant(1), _constant(math.log(2) / beta))(run, out, x)
    jump = math.log1p(math.exp(-threshold)) / beta * _SLACK
    return Value(value.magnitude, value.error + jump * math.sqrt(x.numel()))


def _softmax(run: _Run, out: Tensor, x: Tensor, dim: int, *args: Any) -> Value:
    """p_i = exp(x_i − m)/Σ, m the largest of n entries.

    Rounding x_i − m changes p_i by u|x_i − m|p_i ≤ u/e, as p_i ≤ exp(x_i − m); with exp, the sum and the quotient the
    entries of one p are off by (3n + 2·_FUNCTION)u in sum at most.
    """
    n = x.shape[dim] if x.dim() else 1
    groups = math.sqrt(x.numel() / max(1, n))
    given = run.get(x).scaled(0.5)
    own = (3 * n + 2 * _FUNCTION) * run.arithmetic.u * groups + run.arithmetic.tiny * x.numel()
    return Value(groups, given.error + own)


def _log_softmax(run: _Run, out: Tensor, x: Tensor, dim: int, *args: Any) -> Value:
    """x_i − m − log Σ exp(x_j − m): differences are rounded by u·2|x|, the logarithm of the sum by (n + _FUNCTION)u."""
    n = x.shape[dim] if x.dim() else 1
    given, entries = run.get(x).scaled(math.sqrt(n)), math.sqrt(x.numel())
    at_zero = math.log(max(1, n)) * entries
    scale = 8 * given.computed + (2 * n + 2 * _FUNCTION + 4 * math.log(max(1, n))) * entries
    return Value(given.magnitude + at_zero, given.error + run.arithmetic.u * scale)


def _leaky(run: _Run, out: Tensor, x: Tensor, *slopes: Any) -> Value:
    """Slopes of 1 and others; the product is rounded."""
    steepest = max([1.0, *(run.largest(slope) for slope in slopes)])
    return run.arithmetic.rounded(run.get(x).scaled(steepest), 2, out.numel())


def _elu_slope(alpha: float = 1, scale: float = 1, input_scale: float = 1) -> float:
    return abs(scale) * max(1.0, abs(alpha * input_scale))


def _constant(value: float) -> Callable[..., float]:
    return lambda *args, **kwargs: value


# of the shape of a tensor, not of its values
FACTORIES = {
    aten.new_empty, aten.new_zeros, aten.new_ones, aten.new_full, aten.empty_like, aten.zeros_like, aten.ones_like,
    aten.full_like,
}  # fmt: skip

RULES: dict[Any, Callable[..., Value | None]] = {
    **dict.fromkeys(
        (
            aten.view, aten._unsafe_view, aten.t, aten.transpose, aten.permute, aten.slice, aten.select, aten.split,
            aten.split_with_sizes, aten.unbind, aten.expand, aten.unsqueeze, aten.squeeze, aten.alias, aten.detach,
            aten.view_as_complex, aten.view_as_real,
        ),
        _view,
    ),
    **dict.fromkeys(
        (
            aten.relu, aten.relu_, aten.neg, aten.clone, aten.roll, aten.flip, aten.sort, aten.amax,
            aten.amin, aten.pixel_shuffle, aten.pixel_unshuffle, aten.channel_shuffle, aten.native_channel_shuffle,
        ),
        _same,
    ),
    aten.abs: _abs,
    aten.mm: _product,
    aten.bmm: _product,
    aten.addmm: _addmm,
    aten.convolution: _convolution,
    aten.add: _add,
    aten.add_: _add,
    aten.sub: _add,
    aten.sub_: _add,
    aten.rsub: lambda run, out, a, b, alpha=1: _add(run, out, b, a, alpha=alpha),
    aten.mul: _multiply,
    aten.mul_: _multiply,
    aten.div: _divide,
    aten.div_: _divide,
    aten.maximum: _together,
    aten.minimum: _together,
    aten.max: _maxima,
    aten.min: _maxima,
    aten.cat: _concatenation,
    aten.stack: _concatenation,
    aten.repeat: _repeated,
    aten.fill_: _filled,
    aten.zero_: _filled,
    aten.copy_: _copy,
    aten._to_copy: _converted,
    aten.constant_pad_nd: _constant_pad,
    aten.reflection_pad1d: _repeating_pad,
    aten.reflection_pad2d: _repeating_pad,
    aten.reflection_pad3d: _repeating_pad,
    aten.replication_pad1d: _repeating_pad,
    aten.replication_pad2d: _repeating_pad,
    aten.replication_pad3d: _repeating_pad,
    aten.linalg_vector_norm: _vector_norm,
    aten.sum: _sum,
    aten.mean: _mean,
    aten.max_pool2d_with_indices: _max_pool,
    aten.max_pool3d_with_indices: _max_pool,
    aten.adaptive_max_pool2d: _selection,
    aten.adaptive_max_pool3d: _selection,
    aten.avg_pool1d: _avg_pool,
    aten.avg_pool2d: _avg_pool,
    aten.avg_pool3d: _avg_pool,
    aten._adaptive_avg_pool2d: _adaptive_avg_pool,
    aten._adaptive_avg_pool3d: _adaptive_avg_pool,
    **dict.fromkeys(
        (aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_nearest3d), _nearest(aten.upsample_nearest1d)
    ),
    **dict.fromkeys(
        (aten._upsample_nearest_exact1d, aten._upsample_nearest_exact2d, aten._upsample_nearest_exact3d),
        _nearest(aten._upsample_nearest_exact1d),
    ),
    **dict.fromkeys(
        (aten.upsample_linear1d, aten.upsample_bilinear2d, aten.upsample_trilinear3d), _interpolation(2, _linear_line)
    ),
    aten.upsample_bicubic2d: _interpolation(4, _bicubic_line),
    aten.softplus: _softplus,
    aten._softmax: _softmax,
    aten._log_softmax: _log_softmax,
    aten.native_batch_norm: _batch_norm,
    aten.clamp: _clamp,
    aten.clamp_min: _clamp,
    aten.clamp_max: lambda run, out, x, max: _clamp(run, out, x, None, max),
    aten.hardtanh: _clamp,
    aten.leaky_relu: _leaky,
    aten._prelu_kernel: _leaky,
    aten.rrelu_with_noise: lambda run, out, x, noise, low=1 / 8, high=1 / 3, *rest: _leaky(run, out, x, low, high),
    aten.softshrink: _entrywise(_constant(1), _constant(0)),
    aten.tanh: _entrywise(_constant(1), _constant(0)),
    aten.sigmoid: _entrywise(_constant(1), _constant(0.5)),
    aten.log_sigmoid_forward: _entrywise(_constant(1), _constant(1)),
    aten.hardsigmoid: _entrywise(_constant(1), _constant(0.5)),
    aten.hardswish: _entrywise(_constant(1.5), _constant(0)),
    aten.gelu: _entrywise(_constant(1.2), _constant(0)),
    aten.silu: _entrywise(_constant(1.2), _constant(0)),
    aten.mish: _entrywise(_constant(1.2), _constant(0)),
    aten.elu: _entrywise(_elu_slope, _constant(0)),
    aten.celu: _entrywise(_constant(1), _constant(0)),
}  # fmt: skip
for _name in (
    "neg", "abs", "clamp", "clamp_min", "clamp_max", "hardtanh", "leaky_relu", "tanh", "sigmoid", "hardsigmoid",
    "hardswish", "gelu", "silu", "mish", "elu", "celu",
):  # fmt: skip
    RULES[getattr(aten, f"{_name}_")] = RULES[getattr(aten, _name)]


def _softsign(module: nn.Softsign, x: Value, out: Tensor, format: Arithmetic) -> float:
    """x/(1 + |x|): a sum and a quotient."""
    return format.gamma(4) * x.computed + 4 * format.tiny * math.sqrt(out.numel())


def _lp_pool(module: nn.LPPool2d, x: Value, out: Tensor, format: Arithmetic) -> float:
    """The root of a sum of squares, each off by few units: of the ℓ2 norm, since only that has a bound."""
    kernel = module.kernel_size if isinstance(module.kernel_size, tuple) else (module.kernel_size,) * 2
    area = math.prod(kernel)
    if x.computed > math.sqrt(format.large):
        return math.inf
    return format.gamma(area + 16) * x.computed + math.sqrt(4 * out.numel() * area * area * format.tiny)


# modules whose operations say too little one by one: (module, input, output, arithmetic) → error for an exact input
WHOLE: dict[type[nn.Module], Callable[[Any, Value, Tensor, Arithmetic], float]] = {
    nn.Softsign: _softsign,
    nn.LPPool2d: _lp_pool,
}
