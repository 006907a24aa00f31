"""The bounds of single operations, as functions of torch and methods of tensors, by name.

A rule gives the norm of one operation in the value that it acts on; what has the form of one of torch's modules asks
the rule of that module. Everything is about one sample: what acts along the batch is refused, and what an operation may
do to the size of the batch is refused by `graph`, from the shapes that a run of the model showed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from liplayers.bounds.torch_modules import Bound, conv_bound, matrix_bound, padding_bound, torch_rule
from liplayers.errors import UnknownBoundError
from liplayers.linalg import upward

__all__ = [
    "ADD",
    "CONCATENATE",
    "FRESH",
    "MULTIPLY",
    "Call",
    "Factor",
    "bind",
    "norm_of",
    "operation_of",
    "plain_index",
]

Factor = Bound | Callable[[], Bound]  # what takes long is returned to be called later


@dataclass(frozen=True)
class Call:
    """One operation: its name in the tables here, its arguments by name, and what is known of these.

    Attributes:
        name: of the operation.
        args: by name; values are nodes of the graph.
        shape_of: without the batch, of a value; None where it is not known.
        constant_of: the tensor or number that a value is for every input; raises where there is none.
        result: the shape of the result, as `shape_of`.
    """

    name: str
    args: dict[str, Any]
    shape_of: Callable[[Any], tuple[int, ...] | None]
    constant_of: Callable[[Any], Any]
    result: tuple[int, ...] | None

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of the first argument."""
        return self.shape_of(next(iter(self.args.values())))

    def known_shape(self) -> tuple[int, ...]:
        if self.shape is None:
            raise UnknownBoundError(f"what {self.name} does depends on the shape of its input: pass input_shape")
        return self.shape

    def settings(self, *without: str) -> dict[str, Any]:
        """The arguments behind the first one, which have to be no tensors."""
        rest = dict(list(self.args.items())[1:])
        for name, value in rest.items():
            if isinstance(value, fx.Node) and name not in without:
                raise UnknownBoundError(f"its forward calls {self.name} with a {name} that it computes")
        return {name: value for name, value in rest.items() if name not in (*without, "inplace", "out")}

    def dims(self, dims: Any) -> list[int]:
        """Dimensions from 1 on: 0 is the batch.

        Raises:
            UnknownBoundError: one is the batch, or is not a number.
        """
        rank = None
        found = []
        for dim in dims if isinstance(dims, (tuple, list)) else (dims,):
            if not isinstance(dim, int) or isinstance(dim, bool):
                raise UnknownBoundError(f"its forward calls {self.name} along all dimensions, the batch among them")
            if dim < 0:
                rank = len(self.known_shape()) + 1
            found.append(dim if rank is None or dim >= 0 else dim + rank)
        if min(found, default=0) <= 0:
            raise UnknownBoundError(f"its forward calls {self.name} along the batch, whose samples it mixes")
        return found


def norm_of(call: Call) -> Factor:
    """The norm of an operation.

    Raises:
        UnknownBoundError: none is known.
    """
    return _RULES[call.name][1](call)


# Names ----------------------------------------------------------------------------------------------------------------

ADD = {"add": 1, "sub": -1, "rsub": -1}
MULTIPLY = ("mul", "div")
CONCATENATE = ("cat", "stack", "maximum", "minimum")

Rule = Callable[[Call], Factor]
_RULES: dict[str, tuple[tuple[str, ...], Rule]] = {}
_FUNCTIONS: dict[Any, str] = {operator.getitem: "getitem", getattr: "getattr", operator.setitem: "setitem"}
_METHODS: dict[str, str] = {"__setitem__": "setitem"}
FRESH: set[str] = {*ADD, *MULTIPLY, *CONCATENATE}  # what never shares memory with its arguments, unless in place


def _know(names: str, parameters: str, rule: Rule, fresh: bool = False, homes: Sequence[Any] = (torch, F)) -> None:
    """A rule for functions and methods: the first name is that of the rule, the others are synonyms."""
    name, *synonyms = names.split()
    _RULES[name] = (tuple(parameters.split()), rule)
    if fresh:
        FRESH.add(name)
    for known in (name, *synonyms):
        for called in (known, f"{known}_"):
            for home in homes:
                if hasattr(home, called):
                    _FUNCTIONS[getattr(home, called)] = name
            if hasattr(Tensor, called):
                _METHODS[called] = name


def operation_of(node: fx.Node) -> str | None:
    """The name of the operation in the tables here, of its form in place, too; None for an unknown one."""
    if node.op == "call_method":
        return _METHODS.get(str(node.target))
    try:
        return _FUNCTIONS.get(node.target)
    except TypeError:  # it cannot be hashed
        return None


def bind(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name.

    Raises:
        UnknownBoundError: one that the rules do not know.
    """
    parameters = _RULES[name][0]
    given = dict(kwargs)
    if "dim" in parameters and "axis" in given:
        given["dim"] = given.pop("axis")
    if parameters[-1].startswith("*"):  # x.view(2, 3) and x.view((2, 3))
        *plain, rest = parameters
        parameters = (*plain, rest[1:])
        args = [*args[: len(plain)], *([args[len(plain) :]] if len(args) > len(plain) else [])]
    if len(args) > len(parameters):
        raise UnknownBoundError(f"its forward calls {name!r} with {len(args)} arguments")
    bound = dict(zip(parameters, args, strict=False))
    for key, value in given.items():
        if key in parameters:
            bound[key] = value
        elif key not in _WITHOUT_EFFECT and (key not in _UNSET or value not in (None, False)):
            raise UnknownBoundError(f"its forward calls {name!r} with {key}")
    return bound


_WITHOUT_EFFECT = frozenset({"inplace", "_stacklevel", "memory_format", "non_blocking", "copy"})
_UNSET = frozenset({"out", "dtype", "rounding_mode", "antialias", "return_indices"})


# Rules ----------------------------------------------------------------------------------------------------------------


def plain_index(index: Any) -> bool:
    """Whether an index selects each entry at most once."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(isinstance(p, (int, slice)) or p is None or p is Ellipsis for p in parts)


def _one(call: Call) -> float:
    """Entries that are moved or dropped."""
    if any(map(_is_dtype, call.args.values())):
        raise UnknownBoundError(f"its forward reads the bits of a tensor as another dtype ({call.name})")
    return 1.0


def _is_dtype(argument: Any) -> bool:
    if isinstance(argument, (tuple, list)):
        return any(map(_is_dtype, argument))
    if isinstance(argument, fx.Node):
        return argument.target is getattr and str(argument.args[1]) == "dtype"
    return isinstance(argument, torch.dtype)


def _getitem(call: Call) -> float:
    index = call.args["index"]
    if not plain_index(index):
        raise UnknownBoundError("its forward indexes with other than numbers and slices ('getitem')")
    return 1.0


def _along(call: Call) -> float:
    """Entries that are moved along dimensions that must not be the batch."""
    call.dims(call.args.get("dim"))
    return 1.0


def _roll(call: Call) -> float:
    call.dims(call.args.get("dims") or None)
    return 1.0


def _flip(call: Call) -> float:
    dims = call.args["dims"]
    call.dims(dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims)
    return 1.0


def _repeated(call: Call) -> float:
    """Each entry occurs equally often."""
    if call.name == "repeat_interleave":
        call.settings()
    if call.result is None:
        raise UnknownBoundError(f"how often {call.name} repeats a number is not known: pass input_shape")
    return upward.root(Fraction(math.prod(call.result), max(1, math.prod(call.known_shape()))))


def _terms(call: Call) -> int:
    """How many numbers are reduced to one."""
    shape = call.known_shape()
    return math.prod(shape[d - 1] for d in set(call.dims(call.args.get("dim"))))


def _mean(call: Call) -> float:
    return upward.root(Fraction(1, max(1, _terms(call))))


def _sum(call: Call) -> float:
    return upward.root(_terms(call))


def _clamp(call: Call) -> float:
    for name in ("min", "max"):
        if isinstance(call.args.get(name), fx.Node):
            call.constant_of(call.args[name])
            if call.result is None or call.result != call.shape:
                raise UnknownBoundError("its forward clamps between tensors of another shape")
    return 1.0


def _pad(call: Call) -> float:
    settings = call.settings()
    pad, mode = settings["pad"], settings.get("mode", "constant")
    if not all(isinstance(p, int) for p in pad):
        raise UnknownBoundError("its forward pads by sizes that it computes")
    if len(pad) // 2 > len(call.known_shape()):
        raise UnknownBoundError("its forward pads the batch")
    return 1.0 if mode == "constant" else padding_bound(mode, pad, call.known_shape())


def _converted(call: Call) -> float:
    """Exact for a wider dtype; what is rounded to few bits is no Lipschitz function."""
    target = call.args.get("target", ())
    for value in target if isinstance(target, (tuple, list)) else (target,):
        if isinstance(value, fx.Node):
            raise UnknownBoundError("its forward converts to the dtype of another tensor")
        if isinstance(value, torch.dtype) and not value.is_floating_point:
            raise UnknownBoundError(f"its forward converts to {value}")
        if isinstance(value, torch.dtype) and torch.finfo(value).bits < 32:
            raise UnknownBoundError(f"its forward rounds to {value}")
    if call.args.get("dtype") is not None:
        raise UnknownBoundError("its forward converts with a dtype by its name")
    return 1.0


def _dropout(call: Call) -> float:
    if call.settings().get("training", True) is not False:
        raise UnknownBoundError("its forward drops at random: call model.eval(), and pass training=self.training")
    return 1.0


def _linear(call: Call) -> Factor:
    return matrix_bound(call.constant_of(call.args["weight"]))


def _matmul(call: Call) -> Factor:
    """With a constant matrix on one side."""
    left, right = call.args["input"], call.args["other"]
    for other in (right, left):
        try:
            matrix = call.constant_of(other)
        except UnknownBoundError:
            continue
        if matrix.dim() == 2 or (matrix.dim() == 1 and other is right):
            return matrix_bound(matrix if matrix.dim() == 2 else matrix[None])
    raise UnknownBoundError("its forward multiplies tensors with each other, none of them a constant matrix")


def _conv(call: Call) -> Factor:
    settings = call.settings("weight", "bias")
    weight = call.constant_of(call.args["weight"])
    return conv_bound(weight, settings.get("stride", 1), settings.get("dilation", 1), settings.get("groups", 1))


def _conv_transpose(call: Call) -> Factor:
    return _conv(call)  # the norm of its adjoint, a convolution with the same kernel


def _batch_norm(call: Call) -> Factor:
    settings = call.settings("running_mean", "running_var", "weight", "bias")
    if settings.get("training") or call.args.get("running_var") is None:
        raise UnknownBoundError("it normalises by statistics of the batch: call model.eval()")
    variance = call.constant_of(call.args["running_var"])
    norm = nn.BatchNorm1d(len(variance), settings.get("eps", 1e-5), affine=call.args.get("weight") is not None).eval()
    norm.running_var = variance
    if call.args.get("weight") is not None:
        norm.weight = nn.Parameter(call.constant_of(call.args["weight"]))
    return _known(torch_rule(norm, None))


def _prelu(call: Call) -> float:
    weight = call.constant_of(call.args["weight"])
    return max(1.0, weight.double().abs().max().item())


def _known(factor: Factor | None) -> Factor:
    if factor is None:
        raise UnknownBoundError("its forward calls it with arguments for which no bound is known")
    return factor


def _as_module(make: Callable[..., nn.Module], call: Call) -> Factor:
    """What the module of the same name and arguments has."""
    settings = call.settings("training")
    module = make(**settings).eval()
    if "dim" in settings:
        call.dims(settings["dim"])
    return _known(torch_rule(module, call.shape))


def _module_forms() -> None:
    """Functions whose arguments are those of a module."""
    for names, parameters, module in (
        ("relu", "", nn.ReLU),
        ("relu6", "", nn.ReLU6),
        ("hardtanh", "min_val max_val", nn.Hardtanh),
        ("tanh", "", nn.Tanh),
        ("sigmoid", "", nn.Sigmoid),
        ("logsigmoid", "", nn.LogSigmoid),
        ("softsign", "", nn.Softsign),
        ("softshrink", "lambd", nn.Softshrink),
        ("tanhshrink", "", nn.Tanhshrink),
        ("hardsigmoid", "", nn.Hardsigmoid),
        ("hardswish", "", nn.Hardswish),
        ("elu", "alpha", nn.ELU),
        ("celu", "alpha", nn.CELU),
        ("selu", "", nn.SELU),
        ("gelu", "approximate", nn.GELU),
        ("silu", "", nn.SiLU),
        ("mish", "", nn.Mish),
        ("leaky_relu", "negative_slope", nn.LeakyReLU),
        ("rrelu", "lower upper training", nn.RReLU),
        ("softplus", "beta threshold", nn.Softplus),
        ("softmax", "dim", nn.Softmax),
        ("softmin", "dim", nn.Softmin),
        ("log_softmax", "dim", nn.LogSoftmax),
    ):
        _know(names, f"input {parameters}", partial(_as_module, module), fresh=True)
    for names, parameters, module in (
        ("glu", "dim", nn.GLU),
        ("pixel_shuffle", "upscale_factor", nn.PixelShuffle),
        ("pixel_unshuffle", "downscale_factor", nn.PixelUnshuffle),
        ("channel_shuffle native_channel_shuffle", "groups", nn.ChannelShuffle),
        ("interpolate", "size scale_factor mode align_corners recompute_scale_factor", nn.Upsample),
        *(
            (f"avg_pool{n}d", "kernel_size stride padding ceil_mode count_include_pad divisor_override", module)
            for n, module in ((2, nn.AvgPool2d), (3, nn.AvgPool3d))
        ),
        ("avg_pool1d", "kernel_size stride padding ceil_mode count_include_pad", nn.AvgPool1d),
        *(
            (f"{kind}_pool{n}d", arguments, getattr(nn, f"{name}Pool{n}d"))
            for n in (1, 2, 3)
            for kind, name, arguments in (
                ("max", "Max", "kernel_size stride padding dilation ceil_mode"),
                ("adaptive_avg", "AdaptiveAvg", "output_size"),
                ("adaptive_max", "AdaptiveMax", "output_size"),
            )
        ),
        ("lp_pool2d", "norm_type kernel_size stride ceil_mode", nn.LPPool2d),
    ):  # fmt: skip
        _know(names, f"input {parameters}", partial(_as_module, module))
    _FUNCTIONS[torch._C._nn.log_sigmoid] = "logsigmoid"  # type: ignore[attr-defined]


def _unknown(call: Call) -> Factor:
    raise AssertionError(call.name)  # `graph` has its rule


_module_forms()
for _names, _parameters in (
    ("flatten", "input start_dim end_dim"),
    ("reshape", "input *shape"),
    ("view", "input *shape"),
    ("view_as", "input other"),
    ("reshape_as", "input other"),
    ("permute", "input *dims"),
    ("transpose swapaxes swapdims", "input dim0 dim1"),
    ("squeeze", "input *dim"),
    ("unsqueeze", "input dim"),
    ("movedim moveaxis", "input source destination"),
    ("unflatten", "input dim sizes"),
    ("contiguous", "input"),
    ("detach", "input"),
    ("narrow", "input dim start length"),
    ("select", "input dim index"),
    ("positive", "input"),
):
    _know(_names, _parameters, _one)
for _names, _parameters in (("abs absolute", "input"), ("neg negative", "input"), ("clone", "input")):
    _know(_names, _parameters, _one, fresh=True)
for _names in ("chunk", "split", "tensor_split", "unbind"):
    _know(_names, "input dim" if _names == "unbind" else "input sizes dim", _one)
_RULES["split"] = (("input", "split_size_or_sections", "dim"), _one)
_RULES["chunk"] = (("input", "chunks", "dim"), _one)
_RULES["tensor_split"] = (("input", "indices_or_sections", "dim"), _one)
_know("roll", "input shifts dims", _roll)
_know("flip", "input *dims", _flip)
for _names in ("sort", "max", "min"):
    _know(_names, "input dim keepdim descending stable" if _names == "sort" else "input dim keepdim", _along)
for _names in ("amax", "amin"):
    _know(_names, "input dim keepdim", _along)
_know("expand", "input *size", _repeated)
_know("expand_as", "input other", _repeated)
_know("broadcast_to", "input size", _repeated)
_know("repeat", "input *repeats", _repeated)
_know("tile", "input *dims", _repeated)
_know("repeat_interleave", "input repeats dim", _repeated)
_know("mean", "input dim keepdim", _mean, fresh=True)
_know("sum", "input dim keepdim", _sum, fresh=True)
_know("clamp clip", "input min max", _clamp, fresh=True)
_know("clamp_min", "input min", _clamp, fresh=True)
_know("clamp_max", "input max", _clamp, fresh=True)
_know("pad", "input pad mode value", _pad)
_know("to", "input *target", _converted)
for _names in ("float", "double"):
    _know(_names, "input", _one)
for _names in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"):
    _know(_names, "input p training", _dropout)
_know("linear", "input weight bias", _linear, fresh=True)
_know("matmul mm bmm", "input other", _matmul, fresh=True)
for _n in (1, 2, 3):
    _know(f"conv{_n}d", "input weight bias stride padding dilation groups", _conv, fresh=True)
    _parameters = "input weight bias stride padding output_padding groups dilation"
    _know(f"conv_transpose{_n}d", _parameters, _conv_transpose, fresh=True)
_parameters = "input running_mean running_var weight bias training momentum eps"
_know("batch_norm", _parameters, _batch_norm, fresh=True, homes=[F])  # torch's has another order
_know("prelu", "input weight", _prelu, fresh=True)
_know("getitem", "input index", _getitem)
_know("add", "input other alpha", _unknown, fresh=True)
_know("sub subtract", "input other alpha", _unknown, fresh=True)
_know("rsub", "input other alpha", _unknown, fresh=True)
_know("mul multiply", "input other", _unknown, fresh=True)
_know("div divide true_divide", "input other", _unknown, fresh=True)
_know("cat concat concatenate", "tensors dim", _unknown, fresh=True)
_know("stack", "tensors dim", _unknown, fresh=True)
_know("maximum", "input other", _unknown, fresh=True)
_know("minimum", "input other", _unknown, fresh=True)
_know("setitem", "input index value", _unknown)
_know("copy", "input other", _unknown)
_know("fill", "input value", _unknown)
_know("zero", "input", _unknown)
_FUNCTIONS |= {
    operator.add: "add",
    operator.iadd: "add",
    operator.sub: "sub",
    operator.isub: "sub",
    operator.mul: "mul",
    operator.imul: "mul",
    operator.truediv: "div",
    operator.itruediv: "div",
    operator.matmul: "matmul",
    operator.neg: "neg",
    operator.pos: "positive",
    operator.abs: "abs",
}
