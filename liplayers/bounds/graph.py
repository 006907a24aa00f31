"""The operations of a traced forward method, and how each combines the bounds of its arguments.

A value's bound is its Lipschitz constant with respect to the module's input; 0 for whatever does not depend on it
(numbers, parameters, shapes). What is not listed raises.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from liplayers.errors import UnknownBoundError
from liplayers.linalg import upward

Shapes = dict[fx.Node, tuple[int, ...] | None]

_BATCHES = (5, 7)  # of the trial runs that record shapes: what is no batch has the same size in both

_UNCHANGED_FUNCTIONS = {torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze}
_UNCHANGED_METHODS = {
    "flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze", "contiguous", "movedim", "unflatten",
    "clone",
}  # fmt: skip
_ENTRYWISE_FUNCTIONS = {F.relu, torch.relu, torch.tanh, F.tanh, torch.abs, operator.neg, torch.neg}
_ENTRYWISE_METHODS = {"relu", "tanh", "abs", "neg"}
_ADD = {operator.add, torch.add, operator.sub, torch.sub}
_MULTIPLY = {operator.mul, torch.mul}
_DIVIDE = {operator.truediv, torch.div}
_CONCATENATE = {torch.cat, torch.concat}
_SHAPE_METHODS = {"size", "dim"}
_SHAPE_ATTRIBUTES = {"shape", "ndim", "device", "dtype"}
# keyword arguments without an effect on the bound; `out`, `alpha`, `rounding_mode` and `dtype` have one
_HARMLESS = {"dim", "axis", "start_dim", "end_dim", "dim0", "dim1", "dims", "shape", "source", "destination", "inplace"}


class _NoInPlace(fx.Proxy):
    """Refuses in-place operators: the trace would not see that another name changes with this one."""

    def _refuse(self, other: object) -> fx.Proxy:
        raise UnknownBoundError("its forward updates a tensor in place (x += y and the like): write x = x + y")

    __iadd__ = __isub__ = __imul__ = __itruediv__ = _refuse


def _autocast() -> tuple[bool, ...]:
    return tuple(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))


def trace(module: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> fx.Graph:
    """The graph of `module.forward`, with the modules for which `is_leaf` as single calls.

    Raises:
        UnknownBoundError: it cannot be traced.
    """
    outside = _autocast()

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return is_leaf(m)

        def proxy(self, node: fx.Node) -> fx.Proxy:
            if _autocast() != outside:
                raise UnknownBoundError("its forward switches autocast, which a trace does not keep")
            return _NoInPlace(node, self)

    attributes = {m: dict(vars(m)) for m in module.modules()}
    try:
        return Tracer().trace(module)
    except UnknownBoundError:
        raise
    except Exception as error:  # tracing runs the user's code: anything may come out
        raise UnknownBoundError(f"its forward cannot be traced ({' '.join(str(error).split())})") from None
    finally:
        for m, before in attributes.items():  # a forward may keep what it was given; that must not be a proxy
            vars(m).clear()
            vars(m).update(before)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients for a trial run; puts each module's mode back."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m, training in modes:
            m.training = training


def value_shapes(module: nn.Module, graph: fx.Graph, input_shape: tuple[int, ...], like: Tensor) -> Shapes:
    """The shape of each tensor in the graph for one sample, from runs on batches of zeros; None without a batch."""

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor):
                shapes.setdefault(n, []).append(tuple(value.shape))
            return value

    shapes: dict[fx.Node, list[tuple[int, ...]]] = {}
    with evaluating(module):
        for batch in _BATCHES:
            Recorder(module, graph=graph).run(torch.zeros(batch, *input_shape, dtype=like.dtype, device=like.device))
    batched = {n: tuple(s[:1] for s in found) == tuple((b,) for b in _BATCHES) for n, found in shapes.items()}
    return {n: found[0][1:] if batched[n] and found[0][1:] == found[1][1:] else None for n, found in shapes.items()}


def graph_bounds(graph: fx.Graph, leaf_bound: Callable[[str], float], shapes: Shapes | None) -> dict[fx.Node, float]:
    """The bound of each value of a graph.

    Args:
        leaf_bound: path of a leaf module → its bound.
        shapes: of the values, or None where the input's shape is not known; sums of tensors then raise.

    Raises:
        UnknownBoundError: an operation of unknown effect.
    """
    bounds: dict[fx.Node, float] = {}
    for node in graph.nodes:
        bounds[node] = _value(node, bounds, leaf_bound, shapes)
        if shapes is not None and bounds[node] and shapes.get(node, ()) is None:
            raise UnknownBoundError(f"its forward mixes the samples of a batch ({_name(node)})")
    return bounds


def _value(
    node: fx.Node, bounds: dict[fx.Node, float], leaf_bound: Callable[[str], float], shapes: Shapes | None
) -> float:
    if node.op == "placeholder":
        if bounds:
            raise UnknownBoundError(f"its forward takes a second input {node.target!r}")
        return 1.0
    if node.op == "get_attr":
        return 0.0
    if node.op == "output":
        if not isinstance(node.args[0], fx.Node):
            raise UnknownBoundError("its forward returns something other than one tensor")
        return bounds[node.args[0]]
    if node.op == "call_module":
        arguments = [*node.args, *node.kwargs.values()]
        if len(arguments) != 1 or not isinstance(arguments[0], fx.Node):
            raise UnknownBoundError(f"it calls {node.target} with other arguments than one tensor")
        return upward.product(leaf_bound(str(node.target)), bounds[arguments[0]])
    return _operation(node, bounds, shapes)


def _operation(node: fx.Node, bounds: dict[fx.Node, float], shapes: Shapes | None) -> float:
    if not any(bounds[n] for n in node.all_input_nodes):
        return 0.0  # computed from constants only
    target, method = node.target, node.op == "call_method"
    if set(node.kwargs) - _HARMLESS:
        raise UnknownBoundError(f"its forward calls {_name(node)} with {', '.join(node.kwargs)}")
    if (method and target in _SHAPE_METHODS) or (target is getattr and node.args[1] in _SHAPE_ATTRIBUTES):
        return 0.0
    first = node.args[0] if node.args else None
    if isinstance(first, fx.Node) and not any(bounds[n] for n in node.all_input_nodes if n is not first):
        unchanged = target in (_UNCHANGED_METHODS if method else _UNCHANGED_FUNCTIONS)
        entrywise = target in (_ENTRYWISE_METHODS if method else _ENTRYWISE_FUNCTIONS)
        reinterprets = any(isinstance(a, torch.dtype) for a in node.args)
        indexed = target is operator.getitem and _plain_index(node.args[1])
        if entrywise or indexed or (unchanged and not reinterprets):
            return bounds[first]
    if not method and target in _ADD and len(node.args) == 2:
        return _sum(node, bounds, shapes)
    if not method and target in _MULTIPLY | _DIVIDE and len(node.args) == 2:
        return _scaled(node, bounds)
    if not method and target in _CONCATENATE and isinstance(first, (list, tuple)):
        return upward.hypot(*(bounds[n] for n in first if isinstance(n, fx.Node)))
    raise UnknownBoundError(f"its forward calls {_name(node)!r}, whose effect on the bound is not known")


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _sum(node: fx.Node, bounds: dict[fx.Node, float], shapes: Shapes | None) -> float:
    """Σ bounds, each times √(times that broadcasting repeats its entries)."""
    operands = [a for a in node.args if isinstance(a, fx.Node)]
    if all(isinstance(a, (int, float)) or (isinstance(a, fx.Node) and a is operands[0]) for a in node.args):
        return upward.product(len(operands), bounds[operands[0]])
    if shapes is None:
        raise UnknownBoundError("its forward adds tensors, which may broadcast: pass input_shape")
    whole = shapes[node]
    parts = [(a, shapes[a]) for a in operands if bounds[a]]
    if whole is None or any(part is None or len(part) != len(whole) for _, part in parts):
        raise UnknownBoundError("its forward adds tensors of different dimensions, which mixes the samples of a batch")
    repeats = ((a, math.prod(whole) // max(1, math.prod(part or ()))) for a, part in parts)
    return upward.total(*(upward.product(bounds[a], upward.root(times)) for a, times in repeats))


def _scaled(node: fx.Node, bounds: dict[fx.Node, float]) -> float:
    left, right = node.args
    if isinstance(left, fx.Node) and isinstance(right, (int, float)) and (right or node.target in _MULTIPLY):
        combine = upward.product if node.target in _MULTIPLY else upward.quotient
        return combine(bounds[left], abs(right))
    if isinstance(right, fx.Node) and isinstance(left, (int, float)) and node.target in _MULTIPLY:
        return upward.product(bounds[right], abs(left))
    raise UnknownBoundError("its forward multiplies or divides tensors, or divides by zero")


def _plain_index(index: Any) -> bool:
    """Whether an index selects each entry at most once."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(isinstance(p, (int, slice)) or p is None or p is Ellipsis for p in parts)
