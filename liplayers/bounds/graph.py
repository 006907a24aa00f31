"""How the operations of a traced forward method combine the bounds of their arguments.

A value's bound is its Lipschitz constant with respect to the module's input. Constants, which are the same for every
input of a shape (numbers, parameters, shapes, zeros of that shape), may enter any operation with each other; a value
that merely has the bound 0 may not: x·0 carries the signs of x. What is not listed raises.

Operations in place change the value that later operations read, under every name and through every view. `_Memory`
says which values may share memory. After a write, the tensor that was written to has the bound of the result; another
one that shares memory with it consists of old entries and of entries of the result, each at most once, so that its
bound is √(old² + result²), or, where something was added, old + added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from liplayers.bounds.advice import advice
from liplayers.bounds.operations import (
    ADD,
    CONCATENATE,
    FRESH,
    MULTIPLY,
    Call,
    bind,
    norm_of,
    operation_of,
    plain_index,
)
from liplayers.bounds.trace import Program, written
from liplayers.core.precision import executed_dtype
from liplayers.errors import UnknownBoundError
from liplayers.linalg import upward
from liplayers.linalg.verified import Enclosure

__all__ = ["Bounds", "Effect", "Leaf", "Shapes", "constant_values", "graph_bounds", "name_of"]

Shapes = dict[fx.Node, tuple[int, ...] | None]

_SHAPE_METHODS = {"size", "dim", "numel"}
_SHAPE_ATTRIBUTES = {"shape", "ndim", "device", "dtype"}
_FACTORY_FUNCTIONS = {torch.zeros_like, torch.ones_like, torch.full_like}
_FACTORY_METHODS = {"new_zeros", "new_ones", "new_full"}
_SAME_ATTRIBUTES = {"mT", "data"}
_WITH_POSITIONS = ("max", "min", "sort")  # which return values and their positions
_DERIVED = 1 + 2.0**-40  # constants that are computed: elsewhere they may be off by some units of their last place


class Effect(Enum):
    """What a module does to the memory of its input: it returns other memory, maybe the same, or writes to it."""

    FRESH = "fresh"
    MAY_SHARE = "may share"
    WRITES = "writes"


@dataclass(frozen=True)
class Leaf:
    """A module that is called as one operation: its bound, when it is asked for, and its effect on its input.

    Attributes:
        bound: computes it.
        effect: on the memory of its input.
        embeds: whether it makes vectors of whole numbers; bounds are then in these vectors.
    """

    bound: Callable[[], float]
    effect: Effect
    embeds: bool = False


def constant_values(program: Program, tensor: Callable[[str], Tensor]) -> dict[fx.Node, Any]:
    """The values of a program that do not depend on its input, for the weights as they are now.

    Args:
        program: of a module.
        tensor: name of a parameter or buffer → itself.
    """
    values: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            name = str(node.target)
            values[node] = _exact(tensor(name) if name in program.held else program.constants[name])
        elif node.op in ("call_function", "call_method") and all(n in values for n in node.all_input_nodes):
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            with torch.no_grad():
                if node.op == "call_function":
                    values[node] = node.target(*args, **kwargs)
                else:
                    values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return values


def _exact(tensor: Tensor) -> Tensor:
    """In float64, unless what is computed from it runs in fewer digits than float32 has."""
    tensor = tensor.detach()
    single = tensor.dtype == torch.float32 and executed_dtype(tensor) == torch.float32
    return tensor.double() if single else tensor


def graph_bounds(
    program: Program,
    leaf: Callable[[str], Leaf],
    shapes: Shapes | None,
    constants: Mapping[fx.Node, Any],
    refused: list[tuple[fx.Node, UnknownBoundError]] | None = None,
    norms: bool = True,
) -> Bounds:
    """The bound of each value of a graph.

    Args:
        program: of a traced forward method.
        leaf: path of a module that it calls → what is known of it.
        shapes: of the values, without the batch, or None where the input's shape is not known; sums of tensors then
            raise.
        constants: from `constant_values`.
        refused: a list that collects all errors with the operation that each is about, where the first is not to be
            raised; those values then count as 1.
        norms: whether those that take long are computed; otherwise they count as 1.

    Raises:
        UnknownBoundError: an operation of unknown effect.
    """
    analysis = _Analysis(leaf, shapes, constants, norms)
    for node in program.graph.nodes:
        try:
            analysis.add(node)
        except UnknownBoundError as error:
            if refused is None:
                raise
            refused.append((node, error))
            analysis.bounds[node] = 1.0
    return Bounds(analysis.bounds, analysis.given, analysis.own, analysis.writes_to_input)


@dataclass
class Bounds:
    """What is known of the values of a program.

    Attributes:
        values: their bounds; of one that was written to, at the end.
        given: the bound of what each node was given, when it was.
        own: the norm of each operation in what it was given.
        writes_to_input: whether it writes to the memory of its input.
    """

    values: dict[fx.Node, float]
    given: dict[fx.Node, float]
    own: dict[fx.Node, float]
    writes_to_input: bool


@dataclass
class _Memory:
    """Which values may share memory: as views of each other, or through a module of which that is not known."""

    views: dict[fx.Node, set[fx.Node]] = field(default_factory=dict)
    modules: dict[fx.Node, set[fx.Node]] = field(default_factory=dict)
    repeating: set[fx.Node] = field(default_factory=set)  # views with several entries in one place
    whole: set[fx.Node] = field(default_factory=set)  # of which the others in their group are views

    def add(self, node: fx.Node, views_of: Iterable[fx.Node] = (), through_module: Iterable[fx.Node] = ()) -> None:
        views_of = [*views_of]
        if not views_of:
            self.whole.add(node)
        for groups, others in ((self.views, views_of), (self.modules, [*views_of, *through_module])):
            group = {node}.union(*(groups[n] for n in others if n in groups))
            for member in group:
                groups[member] = group


class _Analysis:
    """The bounds of the values so far, as operations are added one by one."""

    def __init__(
        self, leaf: Callable[[str], Leaf], shapes: Shapes | None, values: Mapping[fx.Node, Any], norms: bool
    ) -> None:
        self.leaf = leaf
        self.shapes = shapes
        self.values = values
        self.norms = norms
        self.bounds: dict[fx.Node, float] = {}
        self.given: dict[fx.Node, float] = {}
        self.own: dict[fx.Node, float] = {}
        self.constants: set[fx.Node] = set()
        self.weighted: dict[fx.Node, tuple[Any, fx.Node]] = {}  # products of a constant and a value
        self.lost: set[fx.Node] = set()  # what may have been written to in a way that is not known
        self.inputs: list[fx.Node] = []
        self.writes_to_input = False
        self.memory = _Memory()

    # nodes

    def add(self, node: fx.Node) -> None:
        if any(n in self.lost for n in node.all_input_nodes):
            raise UnknownBoundError(
                "its forward reads a tensor again that was written to in place meanwhile, by a module that it called "
                "or through the result of one: write out of place, or clone() it before"
            )
        if self._is_constant(node):
            self.constants.add(node)
            self.bounds[node] = 0.0
            self.memory.add(node, node.all_input_nodes if self._is_view(node) else ())
            return
        self.given[node] = max((self.bounds[n] for n in node.all_input_nodes), default=0.0)
        if node.op in ("placeholder", "output", "call_module"):
            self._structural(node)
        else:
            self._operation(node)
        if self.shapes is not None and self.shapes.get(node, ()) is None:
            raise UnknownBoundError(f"its forward mixes the samples of a batch ({name_of(node)})")

    def _is_constant(self, node: fx.Node) -> bool:
        """Whether a value is the same for all inputs of a shape."""
        if node.op in ("placeholder", "output"):
            return False
        others = [n for n in node.all_input_nodes if n not in self.constants]
        if not others:
            return True
        method, first = node.op == "call_method", node.args[0] if node.args else None
        if node.op == "call_module" or others != [first]:
            return False
        of_shape = node.target in (_SHAPE_METHODS if method else ())
        attribute = node.target is getattr and node.args[1] in _SHAPE_ATTRIBUTES
        factory = node.target in (_FACTORY_METHODS if method else _FACTORY_FUNCTIONS)
        return of_shape or attribute or (factory and "out" not in node.kwargs)

    def _structural(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.bounds[node] = 1.0
            self.inputs.append(node)
            self.memory.add(node)
        elif node.op == "output":
            returned = tree_leaves(node.args[0])
            if not any(isinstance(r, fx.Node) for r in returned):
                raise UnknownBoundError("its forward returns no tensor that depends on its input")
            self.bounds[node] = self._joint(r for r in returned if isinstance(r, fx.Node))
        else:
            self._call(node)

    def _joint(self, nodes: Iterable[fx.Node]) -> float:
        return upward.hypot(*(self.bounds[n] for n in nodes))

    def _call(self, node: fx.Node) -> None:
        arguments = [*node.args, *node.kwargs.values()]
        if len(arguments) != 1 or not isinstance(arguments[0], fx.Node):
            raise UnknownBoundError(f"it calls {node.target} with other arguments than one tensor")
        x = arguments[0]
        called = self.leaf(str(node.target))
        self.own[node] = called.bound()
        self.bounds[node] = self.own[node] if called.embeds else upward.product(self.own[node], self.bounds[x])
        self.memory.add(node, through_module=() if called.effect is Effect.FRESH else [x])
        if called.effect is Effect.WRITES:
            self._lose(self.memory.modules[x] - {node})

    # operations

    def _operation(self, node: fx.Node) -> None:
        name, target = operation_of(node), written(node)
        if node.target is getattr:
            return self._attribute(node)
        if name is None:
            reason, instead = advice(operation=name_of(node))
            use = f": {reason}; use {instead}" if reason else ", whose effect on the bound is not known"
            raise UnknownBoundError(f"its forward calls {name_of(node)!r}{use}")
        if name == "setitem":
            return self._set(node)
        args = bind(name, node.args, dict(node.kwargs))
        first, *_ = [*args.values(), None]
        added = None
        if name in ADD:
            self.bounds[node], added = self._sum(node, name, args)
        elif name in MULTIPLY:
            self.bounds[node] = self._scaled(node, name, args)
        elif name in CONCATENATE:
            parts = args["tensors"] if "tensors" in args else args.values()
            self.bounds[node] = self._together(node, name, parts, args)
        elif name in ("copy", "fill", "zero"):
            self._require(target is not None, node)
            self.bounds[node] = self._repeated(args.get("other"), node)
        else:
            if name == "matmul" and (first in self.constants or not isinstance(first, fx.Node)):
                first = args["other"]
            self._require(isinstance(first, fx.Node), node)
            assert isinstance(first, fx.Node)
            if not name.endswith("_as"):
                self._require(all(n is first or n in self.constants for n in node.all_input_nodes), node)
            self._require_values(name, first, args)
            norm = norm_of(Call(name, args, self._shape, self._constant, self._shape(node)))
            self.own[node] = self._number(norm)
            self.bounds[node] = upward.product(self.own[node], self.bounds[first])
        if target is not None:
            return self._wrote(node, target, added)
        self.memory.add(
            node, [n for n in node.all_input_nodes if n in self.memory.views] if self._is_view(node) else ()
        )
        if name in ("expand", "expand_as", "broadcast_to"):
            self.memory.repeating.add(node)

    def _is_view(self, node: fx.Node) -> bool:
        """Whether the result may share memory with an argument."""
        return operation_of(node) not in FRESH or written(node) is not None

    def _require(self, condition: bool, node: fx.Node) -> None:
        if not condition:
            raise UnknownBoundError(
                f"its forward calls {name_of(node)!r} with tensors whose effect on the bound is not known"
            )

    def _require_values(self, name: str, first: fx.Node, args: dict[str, Any]) -> None:
        """Of a pair of values and positions, the values are what has a bound."""
        if operation_of(first) in _WITH_POSITIONS and name == "getitem" and args["index"] != 0:
            raise UnknownBoundError(f"its forward uses the positions that {name_of(first)!r} finds, which jump")

    def _attribute(self, node: fx.Node) -> None:
        first, name = node.args
        assert isinstance(first, fx.Node)
        if name not in _SAME_ATTRIBUTES and not (name == "values" and operation_of(first) in _WITH_POSITIONS):
            raise UnknownBoundError(f"its forward reads {name!r} of a tensor, which is not known")
        self.bounds[node] = self.bounds[first]
        self.memory.add(node, [first])

    def _number(self, norm: Any) -> float:
        if callable(norm):
            if not self.norms:
                return 1.0
            norm = norm()
        return norm.upper if isinstance(norm, Enclosure) else norm

    def _shape(self, value: Any) -> tuple[int, ...] | None:
        if isinstance(value, (tuple, list)):
            value = value[0]
        return self.shapes.get(value) if self.shapes is not None and isinstance(value, fx.Node) else None

    def _constant(self, value: Any) -> Any:
        if not isinstance(value, fx.Node):
            return value
        if value not in self.values:
            what = "made for the shape of the input" if value in self.constants else "that depends on the input"
            raise UnknownBoundError(f"its forward multiplies with a tensor {what}")
        return self.values[value]

    def _repeated(self, value: Any, node: fx.Node) -> float:
        """The bound of an operand, times √(how often broadcasting repeats its entries)."""
        if not isinstance(value, fx.Node) or value in self.constants:
            return 0.0
        if self.shapes is None:
            raise UnknownBoundError("its forward adds tensors, which may broadcast: pass input_shape")
        whole, part = self._shape(node), self._shape(value)
        if whole is None or part is None or len(part) != len(whole):
            raise UnknownBoundError(
                "its forward combines tensors of different dimensions, which mixes the samples of a batch"
            )
        times = math.prod(whole) // max(1, math.prod(part))
        return upward.product(self.bounds[value], upward.root(times))

    def _sum(self, node: fx.Node, name: str, args: dict[str, Any]) -> tuple[float, float | None]:
        """Σ bounds, and that of what was added to the first operand."""
        alpha = args.pop("alpha", 1)
        if not isinstance(alpha, (int, float)):
            raise UnknownBoundError(f"its forward calls {name} with an alpha that it computes")
        if name == "rsub":
            args = {"input": args["other"], "other": args["input"]}
        left, right = args["input"], args["other"]
        self._require(all(isinstance(a, (int, float, fx.Node)) for a in (left, right)), node)
        if len({a for a in (left, right) if isinstance(a, fx.Node)}) == 1:  # with a number or itself: no broadcasting
            first, second = (self.bounds[a] if isinstance(a, fx.Node) else 0.0 for a in (left, right))
        else:
            first, second = self._repeated(left, node), self._repeated(right, node)
        second = upward.product(abs(alpha), second)
        found = upward.total(first, second)
        if alpha == 1 and first and second:
            found = min(found, self._convex(left, right, node))
        return found, second

    def _convex(self, left: Any, right: Any, node: fx.Node) -> float:
        """Of a·f + b·g, a and b constants, entry by entry: (|a||Δf| + |b||Δg|)² ≤ (|a| + |b|)(|a||Δf|² + |b||Δg|²)."""
        factors, others = [], []
        for operand in (left, right):
            factor, other = self.weighted.get(operand, (1.0, operand))
            if self._shape(other) != self._shape(node):
                return math.inf
            factors.append(torch.as_tensor(factor, dtype=torch.float64).abs().cpu())
            others.append(self.bounds[other])
        both = factors[0] + factors[1]
        weights = [(both * factor).max().item() * _DERIVED for factor in factors]
        return upward.root(sum(upward.product(w, b, b) for w, b in zip(weights, others, strict=True)))

    def _scaled(self, node: fx.Node, name: str, args: dict[str, Any]) -> float:
        left, right = args["input"], args["other"]
        divides = name == "div"
        swap = not divides and (not isinstance(left, fx.Node) or left in self.constants)
        x, factor = (right, left) if swap else (left, right)
        if not isinstance(x, fx.Node) or x in self.constants:
            raise UnknownBoundError("its forward divides by a tensor that depends on the input")
        if isinstance(factor, fx.Node) and factor not in self.constants:
            raise UnknownBoundError("its forward multiplies or divides tensors that both depend on the input")
        value = self._constant(factor)
        scale = _reciprocal(value) if divides else _largest(value)
        if isinstance(factor, fx.Node) and factor.op != "get_attr" and scale != 0:
            scale = upward.product(scale, _DERIVED)
        self.own[node] = scale
        if not divides and written(node) is None:
            self.weighted[node] = value, x
        of = self.bounds[x] if not isinstance(value, Tensor) else self._repeated(x, node)
        return upward.product(of, scale)

    def _together(self, node: fx.Node, name: str, parts: Any, args: dict[str, Any]) -> float:
        """Joined, or of maxima and minima the larger one: √(Σ bounds²)."""
        parts = list(parts) if isinstance(parts, (tuple, list)) or not isinstance(parts, fx.Node) else [parts]
        self._require(all(isinstance(p, (fx.Node, int, float)) for p in parts), node)
        if name in ("cat", "stack"):
            rank = None if (shape := self._shape(node)) is None else len(shape) + 1
            dim = args.get("dim", 0)
            if not isinstance(dim, int) or dim == 0 or (rank is not None and dim == -rank):
                raise UnknownBoundError(f"its forward calls {name_of(node)} along the batch, whose samples it mixes")
            return self._joint(p for p in parts if isinstance(p, fx.Node))
        return upward.hypot(*(self._repeated(p, node) for p in parts))

    # writes

    def _set(self, node: fx.Node) -> None:
        """x[index] = value."""
        x, index, value = node.args
        assert isinstance(x, fx.Node)
        self.bounds[node] = 0.0
        self.memory.add(node)
        if not plain_index(index):
            raise UnknownBoundError("its forward assigns to other than numbers and slices of a tensor ('setitem')")
        if isinstance(value, fx.Node) and self._is_itself(x, index, value):
            return
        batch = index[0] if isinstance(index, tuple) else index
        if batch is not Ellipsis and batch != slice(None):
            raise UnknownBoundError("its forward assigns to some samples of a batch: write x[:, …] = …")
        self._wrote(node, x, None, partly=self._assigned(x, index, value))

    def _is_itself(self, x: fx.Node, index: Any, value: fx.Node) -> bool:
        """Whether it is the last step of x[index] += …, which assigns what the view already holds."""
        view = written(value)
        return view is not None and operation_of(view) == "getitem" and view.args == (x, index)

    def _assigned(self, x: fx.Node, index: Any, value: Any) -> float:
        """The bound of the entries that are assigned."""
        if not isinstance(value, fx.Node) or value in self.constants:
            return 0.0
        whole, part = self._shape(x), self._shape(value)
        if whole is None or part is None:
            raise UnknownBoundError("its forward assigns to a part of a tensor: pass input_shape")
        place = torch.empty(1, *whole, device="meta")[index]
        if place.dim() != len(part) + 1:
            raise UnknownBoundError(
                "its forward assigns a tensor of other dimensions, which mixes the samples of a batch"
            )
        return upward.product(self.bounds[value], upward.root(place.numel() // max(1, math.prod(part))))

    def _wrote(self, node: fx.Node, target: fx.Node, added: float | None, partly: float | None = None) -> None:
        """What becomes of all that may share memory with the target.

        Args:
            node: the operation, whose result is the target, unless `partly` is given.
            target: what was written to.
            added: the bound of what was added to it, if that is what was done.
            partly: the bound of what was written to some of its entries.
        """
        if target in self.values:
            raise UnknownBoundError("its forward writes to a tensor that it holds: write out of place")
        group = self.memory.views[target]
        if group & self.memory.repeating:
            raise UnknownBoundError("its forward writes to the memory of an expanded tensor: clone() it before")
        written_bound = self.bounds[node] if partly is None else partly
        for other in group:
            if other is target and partly is None:
                self.bounds[other] = written_bound
                continue
            mixed = upward.hypot(self.bounds[other], written_bound)
            if partly is None and target in self.memory.whole:  # all that is left of the old is a copy
                mixed = max(self.bounds[other], written_bound)
            if added is not None:
                mixed = min(mixed, upward.total(self.bounds[other], added))
            self.bounds[other] = mixed
        self.constants -= group
        for other in [n for n, (_, of) in self.weighted.items() if n in group or of in group]:
            del self.weighted[other]
        self._lose(self.memory.modules[target] - group)
        if partly is None:
            self.memory.add(node, [target])
            self.memory.whole |= {node} if target in self.memory.whole else set()
        self.writes_to_input |= any(n in self.memory.modules[target] for n in self.inputs)

    def _lose(self, nodes: set[fx.Node]) -> None:
        self.lost |= nodes
        self.writes_to_input |= any(n in nodes for n in self.inputs)


def name_of(node: fx.Node) -> str:
    """What an operation is called."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _largest(factor: Any) -> float:
    """|factor|, of a tensor its largest entry."""
    if isinstance(factor, Tensor) and not factor.is_complex():
        largest = factor.double().abs().max().item() if factor.numel() else 0.0
    elif isinstance(factor, (int, float)):
        largest = abs(factor)
    else:
        raise UnknownBoundError(f"its forward multiplies with {factor!r}")
    if not math.isfinite(largest):
        raise UnknownBoundError(f"its forward multiplies with {largest}")
    return largest


def _reciprocal(divisor: Any) -> float:
    if isinstance(divisor, Tensor) and not divisor.is_complex():
        smallest = divisor.double().abs().min().item() if divisor.numel() else math.inf
    elif isinstance(divisor, (int, float)):
        smallest = abs(divisor)
    else:
        raise UnknownBoundError(f"its forward divides by {divisor!r}")
    if not smallest or math.isnan(smallest):
        raise UnknownBoundError("its forward divides by zero")
    return upward.quotient(1, smallest)
