"""The operations of a traced forward method, and how each combines the bounds of its arguments.

A value's bound is its Lipschitz constant with respect to the module's input. Constants, which are the same for every
input of a shape (numbers, parameters, shapes, zeros of that shape), may enter any operation with each other; a value
that merely has the bound 0 may not: x·0 carries the signs of x. What is not listed raises.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import Argument, map_arg

from liplayers.bounds.twin import private_copy
from liplayers.errors import UnknownBoundError
from liplayers.linalg import upward

__all__ = ["Program", "Shapes", "graph_bounds", "trace"]

Shapes = dict[fx.Node, tuple[int, ...] | None]

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
_SHAPE_METHODS = {"size", "dim", "numel"}
_SHAPE_ATTRIBUTES = {"shape", "ndim", "device", "dtype"}
_FACTORY_FUNCTIONS = {torch.zeros_like, torch.ones_like, torch.full_like}
_FACTORY_METHODS = {"new_zeros", "new_ones", "new_full"}
# keyword arguments without an effect on the bound; `out`, `alpha`, `rounding_mode` and `dtype` have one
_HARMLESS = {"dim", "axis", "start_dim", "end_dim", "dim0", "dim1", "dims", "shape", "source", "destination", "inplace"}


class _NoInPlace(fx.Proxy):
    """Refuses in-place operators: the trace would not see that another name changes with this one."""

    def _refuse(self, other: object) -> fx.Proxy:
        raise UnknownBoundError("its forward updates a tensor in place (x += y and the like): write x = x + y")

    __iadd__ = __isub__ = __imul__ = __itruediv__ = _refuse


def _autocast() -> tuple[bool, ...]:
    return tuple(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))


@dataclass(frozen=True, eq=False)
class Program:
    """What a forward method did while it was traced, and the tensors that it met on the way."""

    graph: fx.Graph = field(default_factory=fx.Graph)
    constants: dict[str, Tensor] = field(default_factory=dict)

    @property
    def output(self) -> fx.Node:
        return next(iter(reversed(self.graph.nodes)))

    def calls(self) -> list[str]:
        """The paths of the modules that it calls, in order."""
        return [str(node.target) for node in self.graph.nodes if node.op == "call_module"]

    def run(self, x: Tensor, call: Callable[..., Any]) -> dict[fx.Node, Any]:
        """The value of each node for the input x; call(path, *arguments) gives those of the modules."""
        values: dict[fx.Node, Any] = {}
        for node in self.graph.nodes:
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "placeholder":
                values[node] = x
            elif node.op == "get_attr":
                values[node] = self.constants[node.target]
            elif node.op == "call_function":
                values[node] = node.target(*args, **kwargs)
            elif node.op == "call_method":
                values[node] = getattr(args[0], node.target)(*args[1:], **kwargs)
            elif node.op == "call_module":
                values[node] = call(node.target, *args, **kwargs)
            else:
                values[node] = args[0]
        return values


class _Tracer(fx.proxy.GraphAppendingTracer):
    """Unlike fx.Tracer it replaces no method of nn.Module meanwhile, which other threads would run into."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.graph)
        self.constants = program.constants
        self.autocast = _autocast()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        if _autocast() != self.autocast:
            raise UnknownBoundError("its forward switches autocast, which a trace does not keep")
        return _NoInPlace(node, self)

    def create_arg(self, a: Any) -> Argument:
        if not isinstance(a, Tensor):
            return super().create_arg(a)
        name = next((name for name, tensor in self.constants.items() if tensor is a), f"constant_{len(self.constants)}")
        self.constants[name] = a
        return self.create_node("get_attr", name, (), {})

    def call(self, path: str, *args: Any, **kwargs: Any) -> fx.Proxy:
        return self.create_proxy("call_module", path, args, kwargs)


def trace(module: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> Program:
    """The program of `module.forward` for one argument, with the modules for which `is_leaf` as single calls.

    It is traced on a copy, since that runs the user's code, which may keep what it was given.

    Raises:
        UnknownBoundError: it cannot be traced.
    """
    module, program = private_copy(module), Program()
    tracer = _Tracer(program)
    for path, part in module.named_modules():
        if part is not module and is_leaf(part):
            part._compiled_call_impl = partial(tracer.call, path)  # what nn.Module calls where there is one
    try:
        with torch.no_grad():
            result = module.forward(tracer.create_proxy("placeholder", "x", (), {}))
            program.graph.output(tracer.create_arg(result))
    except UnknownBoundError:
        raise
    except Exception as error:  # anything may come out of the user's code
        raise UnknownBoundError(f"its forward cannot be traced ({' '.join(str(error).split())})") from None
    return program


def graph_bounds(
    graph: fx.Graph,
    leaf_bound: Callable[[str], float],
    shapes: Shapes | None,
    refused: list[UnknownBoundError] | None = None,
) -> dict[fx.Node, float]:
    """The bound of each value of a graph.

    Args:
        graph: of a traced forward method.
        leaf_bound: path of a leaf module → its bound.
        shapes: of the values, or None where the input's shape is not known; sums of tensors then raise.
        refused: a list that collects all errors, where the first is not to be raised; those values then count as 1.

    Raises:
        UnknownBoundError: an operation of unknown effect.
    """
    bounds: dict[fx.Node, float] = {}
    constants: set[fx.Node] = set()
    for node in graph.nodes:
        if _is_constant(node, constants):
            constants.add(node)
            bounds[node] = 0.0
            continue
        try:
            bounds[node] = _value(node, bounds, constants, leaf_bound, shapes)
            if shapes is not None and shapes.get(node, ()) is None:
                raise UnknownBoundError(f"its forward mixes the samples of a batch ({_name(node)})")
        except UnknownBoundError as error:
            if refused is None:
                raise
            refused.append(error)
            bounds[node] = 1.0
    return bounds


def _is_constant(node: fx.Node, constants: set[fx.Node]) -> bool:
    """Whether a value is the same for all inputs of a shape."""
    if node.op in ("placeholder", "output"):
        return False
    others = [n for n in node.all_input_nodes if n not in constants]
    if not others:
        return True
    method, first = node.op == "call_method", node.args[0] if node.args else None
    if node.op == "call_module" or others != [first]:
        return False
    of_shape = node.target in (_SHAPE_METHODS if method else ())
    attribute = node.target is getattr and node.args[1] in _SHAPE_ATTRIBUTES
    factory = node.target in (_FACTORY_METHODS if method else _FACTORY_FUNCTIONS)
    return of_shape or attribute or (factory and "out" not in node.kwargs)


def _value(
    node: fx.Node,
    bounds: dict[fx.Node, float],
    constants: set[fx.Node],
    leaf_bound: Callable[[str], float],
    shapes: Shapes | None,
) -> float:
    if node.op == "placeholder":
        return 1.0
    if node.op == "output":
        if not isinstance(node.args[0], fx.Node):
            raise UnknownBoundError("its forward returns something other than one tensor")
        return bounds[node.args[0]]
    if node.op == "call_module":
        arguments = [*node.args, *node.kwargs.values()]
        if len(arguments) != 1 or not isinstance(arguments[0], fx.Node):
            raise UnknownBoundError(f"it calls {node.target} with other arguments than one tensor")
        return upward.product(leaf_bound(str(node.target)), bounds[arguments[0]])
    return _operation(node, bounds, constants, shapes)


def _operation(node: fx.Node, bounds: dict[fx.Node, float], constants: set[fx.Node], shapes: Shapes | None) -> float:
    target, method = node.target, node.op == "call_method"
    if set(node.kwargs) - _HARMLESS:
        raise UnknownBoundError(f"its forward calls {_name(node)} with {', '.join(node.kwargs)}")
    first = node.args[0] if node.args else None
    if isinstance(first, fx.Node) and all(n is first or n in constants for n in node.all_input_nodes):
        unchanged = target in (_UNCHANGED_METHODS if method else _UNCHANGED_FUNCTIONS)
        entrywise = target in (_ENTRYWISE_METHODS if method else _ENTRYWISE_FUNCTIONS)
        reinterprets = any(map(_is_dtype, node.args))
        indexed = target is operator.getitem and _plain_index(node.args[1])
        if entrywise or indexed or (unchanged and not reinterprets):
            return bounds[first]
    if not method and target in _ADD and len(node.args) == 2:
        return _sum(node, bounds, constants, shapes)
    if not method and target in _MULTIPLY | _DIVIDE and len(node.args) == 2:
        return _scaled(node, bounds)
    if not method and target in _CONCATENATE and isinstance(first, (list, tuple)):
        return upward.hypot(*(bounds[n] for n in first if isinstance(n, fx.Node)))
    raise UnknownBoundError(f"its forward calls {_name(node)!r}, whose effect on the bound is not known")


def _is_dtype(argument: Any) -> bool:
    """Whether an argument is a dtype, or what a forward read as the dtype of a tensor."""
    if isinstance(argument, fx.Node):
        return argument.target is getattr and str(argument.args[1]) == "dtype"
    return isinstance(argument, torch.dtype)


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _sum(node: fx.Node, bounds: dict[fx.Node, float], constants: set[fx.Node], shapes: Shapes | None) -> float:
    """Σ bounds, each times √(times that broadcasting repeats its entries)."""
    operands = [a for a in node.args if isinstance(a, fx.Node)]
    if all(isinstance(a, (int, float)) or (isinstance(a, fx.Node) and a is operands[0]) for a in node.args):
        return upward.product(len(operands), bounds[operands[0]])
    if shapes is None:
        raise UnknownBoundError("its forward adds tensors, which may broadcast: pass input_shape")
    whole = shapes.get(node)
    parts = [(a, shapes.get(a)) for a in operands if a not in constants]
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
