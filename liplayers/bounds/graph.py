"""The operations of a traced forward method, and how each combines the bounds of its arguments.

A value's bound is its Lipschitz constant with respect to the module's input; 0 for whatever does not depend on it
(numbers, parameters, shapes). What is not listed raises.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from liplayers.errors import UnknownBoundError

_UNCHANGED_FUNCTIONS = {torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze}
_UNCHANGED_METHODS = {
    "flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze", "contiguous", "movedim", "unflatten",
    "clone",
}  # fmt: skip
_ENTRYWISE_FUNCTIONS = {F.relu, torch.relu, torch.tanh, F.tanh, torch.abs, operator.neg, torch.neg, F.hardtanh, abs}
_ENTRYWISE_METHODS = {"relu", "tanh", "abs", "neg"}
_ADD = {operator.add, torch.add, operator.sub, torch.sub}
_SHAPE_METHODS = {"size", "dim"}


class _Functional(fx.Proxy):
    """A proxy that refuses in-place operators: the trace would not see that another name changes with this one."""

    def _refuse(self, other: object) -> fx.Proxy:
        raise UnknownBoundError("its forward updates a tensor in place (x += y and the like): write x = x + y")

    __iadd__ = __isub__ = __imul__ = __itruediv__ = _refuse


def traced_bounds(module: nn.Module, is_leaf: Any, leaf_bound: Any) -> tuple[fx.Graph, dict[fx.Node, float]]:
    """The graph of `module.forward` and the bound of each of its values.

    Args:
        is_leaf: (module, path) → bool, whether the module has a bound of its own.
        leaf_bound: (path) → float, that bound.

    Raises:
        UnknownBoundError: the forward method cannot be traced, or contains an operation of unknown effect.
    """

    class Tracer(fx.Tracer):
        def proxy(self, node: fx.Node) -> fx.Proxy:
            return _Functional(node, self)

        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return is_leaf(m, module_qualified_name)

    try:
        graph = Tracer().trace(module)
    except UnknownBoundError:
        raise
    except Exception as error:  # tracing runs the user's code: anything may come out
        raise UnknownBoundError(f"its forward cannot be traced ({str(error).splitlines()[0]})") from None
    bounds: dict[fx.Node, float] = {}
    inputs = 0
    for node in graph.nodes:
        if node.op == "placeholder":
            inputs += 1
            if inputs > 1:
                raise UnknownBoundError(f"its forward takes a second input {node.target!r}")
            bounds[node] = 1.0
        elif node.op == "get_attr":
            bounds[node] = 0.0
        elif node.op == "call_module":
            tensors = [a for a in [*node.args, *node.kwargs.values()] if isinstance(a, fx.Node)]
            if len(tensors) != 1:
                raise UnknownBoundError(f"it calls {node.target} with {len(tensors)} tensors")
            bounds[node] = leaf_bound(node.target) * bounds[tensors[0]]
        elif node.op == "output":
            if not isinstance(node.args[0], fx.Node):
                raise UnknownBoundError("its forward returns more than one tensor")
            bounds[node] = bounds[node.args[0]]
        else:
            bounds[node] = _operation(node, bounds)
    return graph, bounds


def _operation(node: fx.Node, bounds: dict[fx.Node, float]) -> float:
    arguments = [bounds[n] for n in node.all_input_nodes]
    if not any(arguments):
        return 0.0  # computed from constants only
    target = node.target
    method = node.op == "call_method"
    first = bounds[node.args[0]] if node.args and isinstance(node.args[0], fx.Node) else None
    others_constant = first is not None and sum(arguments) == first
    if (method and target in _SHAPE_METHODS) or (
        target is getattr and node.args[1] in ("shape", "ndim", "device", "dtype")
    ):
        return 0.0
    unchanged = target in (_UNCHANGED_METHODS if method else _UNCHANGED_FUNCTIONS)
    entrywise = target in (_ENTRYWISE_METHODS if method else _ENTRYWISE_FUNCTIONS)
    if others_constant and (entrywise or (unchanged and not _has_dtype(node))):
        assert first is not None
        return first
    if not method and target in _ADD and "alpha" not in node.kwargs and len(node.args) == 2:
        return sum(bounds[a] for a in node.args if isinstance(a, fx.Node))
    if not method and target in (operator.mul, torch.mul, operator.truediv, torch.div) and len(node.args) == 2:
        return _scaled(node, bounds)
    if not method and target in (torch.cat, torch.concat) and isinstance(node.args[0], (list, tuple)):
        return math.hypot(*(bounds[n] for n in node.args[0] if isinstance(n, fx.Node)))
    if target is operator.getitem and first is not None and _plain_index(node.args[1]):
        return first
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    raise UnknownBoundError(f"its forward calls {name!r}, whose effect on the bound is not known")


def _has_dtype(node: fx.Node) -> bool:
    return any(isinstance(a, torch.dtype) for a in [*node.args, *node.kwargs.values()])


def _scaled(node: fx.Node, bounds: dict[fx.Node, float]) -> float:
    left, right = node.args
    if isinstance(left, fx.Node) and isinstance(right, (int, float)):
        factor = abs(right) if node.target in (operator.mul, torch.mul) else 1 / abs(right)
        return bounds[left] * factor
    if isinstance(right, fx.Node) and isinstance(left, (int, float)) and node.target in (operator.mul, torch.mul):
        return bounds[right] * abs(left)
    raise UnknownBoundError("its forward multiplies or divides tensors, whose bound is not known")


def _plain_index(index: Any) -> bool:
    """Whether an index selects each entry at most once."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(isinstance(p, (int, slice)) or p is None or p is Ellipsis for p in parts)
