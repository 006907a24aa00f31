"""What a traced forward does by functions and methods: what is swapped, what is merged, and what has no bound."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from liplayers.bounds.advice import advice
from liplayers.bounds.graph import Effect, Leaf, constant_values, graph_bounds, name_of
from liplayers.bounds.operations import Call, bind, norm_of, operation_of
from liplayers.bounds.trace import written
from liplayers.conversion.merging import ConvexSum, ScaledCat
from liplayers.conversion.program import Traced
from liplayers.conversion.survey import Seen
from liplayers.conversion.swaps import Place, Settings, Swap, inverse, swapped
from liplayers.errors import UnknownBoundError

__all__ = ["Rewriting"]

_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
}
_SKIPPED = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout,
}  # fmt: skip
# what is done by a function → the module that does it; those that are not known by name below have no bound
_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "relu6": nn.ReLU6, "leaky_relu": nn.LeakyReLU, "elu": nn.ELU, "celu": nn.CELU, "selu": nn.SELU,
    "gelu": nn.GELU, "silu": nn.SiLU, "mish": nn.Mish, "hardswish": nn.Hardswish, "softplus": nn.Softplus,
}  # fmt: skip
_POOLS = {
    f"{kind}_pool{axes}d" for kind in ("avg", "max", "adaptive_avg", "adaptive_max", "lp") for axes in (1, 2, 3)
} | {"mean", "interpolate"}  # fmt: skip

_PRODUCTS = {"mul", "multiply", "imul", "truediv", "div", "divide", "itruediv"}
_GATE = (
    "it multiplies values that both depend on the input, as squeeze-and-excitation does, which has no constant",
    "a model without it, or replace={its path or type: a function of the module}, as lambda module: nn.Identity()",
)


@dataclass
class Rewriting:
    """One pass over the program of one module.

    Args:
        module: it.
        program: its program, which changes.
        seen: of the run.
        settings: of the conversion.

    Attributes:
        parts: the new modules by name.
        swaps: what was done by functions, by the names of the parts, or of the nodes where nothing is left: what it
            was, and what it became.
        refused: what has no bound and why, and what to use instead.
    """

    module: nn.Module
    program: Traced
    seen: dict[nn.Module, Seen]
    settings: Settings
    parts: dict[str, nn.Module] = field(init=False, default_factory=dict)
    swaps: dict[str, tuple[str, Swap | None]] = field(init=False, default_factory=dict)
    refused: list[tuple[str, str]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        for node in self._nodes():
            self._without_writing(node)
        for node in self._nodes():
            try:
                self._swap(node)
            except UnknownBoundError as error:
                self.refused.append((f"{name_of(node)}: {error}", ""))
        self._look_for_obstacles()
        for node in self._nodes():
            self._merge(node)

    @property
    def changed(self) -> bool:
        return bool(self.swaps)

    def _nodes(self) -> list[fx.Node]:
        """What depends on the input."""
        return [node for node in self.program.graph.nodes if node in self.program.depends and node.op != "output"]

    def _shape(self, node: fx.Node) -> tuple[int, ...] | None:
        value, batch = self.program.values[node], self.program.values[self.program.input]
        batched = isinstance(value, Tensor) and value.shape[:1] == batch.shape[:1]
        return tuple(value.shape[1:]) if batched else None

    def _called(self, node: fx.Node) -> nn.Module:
        name = str(node.target)
        return self.parts[name] if name in self.parts else self.module.get_submodule(name)

    def _without_writing(self, node: fx.Node) -> None:
        """What reads a tensor after it was written to reads the result: what takes the place of it writes nothing."""
        target = node.args[0] if self._writes(node) else None
        if not isinstance(target, fx.Node):
            return
        values, order = self.program.values, {other: i for i, other in enumerate(self.program.graph.nodes)}
        written_to = values[target]
        for other in [other for other in order if order[other] < order[node] and _share(values[other], written_to)]:
            for user in [user for user in other.users if order[user] > order[node]]:
                if values[other] is not written_to or values[node] is not written_to:
                    reason = f"{name_of(node)} writes into a tensor that {name_of(user)} uses again: write out of place"
                    return self.refused.append((reason, ""))
                user.replace_input_with(other, node)
        if node.target == "copy_":  # of what a module returned that writes to its input
            node.replace_all_uses_with(node.args[1])  # type: ignore[arg-type]
            self.program.graph.erase_node(node)

    def _writes(self, node: fx.Node) -> bool:
        if node.op != "call_module":
            return written(node) is not None
        seen = self.seen.get(self._called(node))
        copied = any(user.target == "copy_" and user.args == (node.args[0], node) for user in node.users)
        return seen is not None and seen.changes and not copied

    # functions that are modules

    def _swap(self, node: fx.Node) -> None:
        x = node.args[0] if node.args else None
        name = None if node.op == "call_module" else operation_of(node)
        if node.op == "call_function" and node.target in _SKIPPED and isinstance(x, fx.Node):
            self.swaps[node.name] = name_of(node), None
            node.replace_all_uses_with(x)
            self.program.graph.erase_node(node)
        elif name in _ARITHMETIC and not node.kwargs and len(node.args) == 2:
            node.op, node.target = "call_function", _ARITHMETIC[name]
        elif name in _ACTIVATIONS and isinstance(x, fx.Node):
            settings = dict(list(bind(name, node.args, dict(node.kwargs)).items())[1:])
            settings.pop("inplace", None)
            if not any(isinstance(value, fx.Node) for value in settings.values()):
                self._put(node, x, self._swapped(_ACTIVATIONS[name](**settings), x))
        elif name in _POOLS:
            self._scale(node, name)

    def _swapped(self, module: nn.Module, x: fx.Node) -> Swap:
        shape = self._shape(x)
        linear = x.op == "call_module" and isinstance(self._called(x), nn.Linear)
        return swapped(module, self.settings, Place(set() if shape is None else {shape}, -1 if linear else 1))

    def _scale(self, node: fx.Node, name: str) -> None:
        """Divide what a function returns by its norm."""
        args = bind(name, node.args, dict(node.kwargs))
        norm: Any = norm_of(Call(name, args, self._shape_of, lambda value: value, self._shape(node)))
        norm = norm() if callable(norm) else norm
        if norm == 1:
            return
        scale = inverse(norm)
        with self.program.graph.inserting_after(node):
            new = self.program.graph.call_module(self._new(f"{name_of(node)}_scale", scale), ())
        node.replace_all_uses_with(new)
        new.args = (node,)
        self.swaps[str(new.target)] = name_of(node), Swap(scale, note="divided by its norm")

    def _shape_of(self, value: Any) -> tuple[int, ...] | None:
        return self._shape(value) if isinstance(value, fx.Node) else None

    def _put(self, node: fx.Node, x: fx.Node, swap: Swap) -> None:
        was = name_of(node)
        node.op, node.target, node.args, node.kwargs = "call_module", self._new(was, swap.module), (x,), {}
        self.swaps[str(node.target)] = was, swap

    def _new(self, base: str, module: nn.Module) -> str:
        names = (base.strip("_") if i == 0 else f"{base.strip('_')}_{i}" for i in count())
        name = next(name for name in names if name not in self.parts and not hasattr(self.module, name))
        self.parts[name] = module
        return name

    # sums and concatenations

    def _merge(self, node: fx.Node) -> None:
        depends = self.program.depends
        if node.op != "call_function":
            return
        if node.target is operator.add and all(isinstance(a, fx.Node) and a in depends for a in node.args):
            if self._shape_of(node.args[0]) == self._shape_of(node.args[1]):
                self._call(node, "sum", ConvexSum(learnable=self.settings.learned_sums), node.args)
        elif operation_of(node) == "cat":
            args = bind("cat", node.args, dict(node.kwargs))
            values: Any = args["tensors"]
            if len(values) > 1 and all(isinstance(a, fx.Node) and a in depends for a in values):
                self._call(node, "cat", ScaledCat(len(values), args.get("dim", 0)), values)

    def _call(self, node: fx.Node, base: str, module: nn.Module, args: Any) -> None:
        was = name_of(node)
        node.op, node.target, node.args, node.kwargs = "call_module", self._new(base, module), tuple(args), {}
        self.swaps[str(node.target)] = was, Swap(module)

    # what has no bound

    def _look_for_obstacles(self) -> None:
        program = self.program.program
        shapes = {node: self._shape(node) for node in self.program.graph.nodes if node in self.program.values}
        errors: list[tuple[fx.Node, UnknownBoundError]] = []
        constants = constant_values(program, program.constants.__getitem__)
        known = Leaf(lambda: 1.0, Effect.FRESH)
        graph_bounds(program, lambda name: known, shapes, constants, errors, norms=False)
        several = [str(error) for _, error in errors if "with other arguments than one tensor" in str(error)]
        for node, error in errors:
            if str(error) in several or (several and node.target is operator.getitem):
                continue  # it is of a module that is an obstacle by itself
            gate = name_of(node).strip("_") in _PRODUCTS and "depend on the input" in str(error)
            refused = _GATE if gate else (str(error), advice(operation=name_of(node))[1])
            if refused not in self.refused:
                self.refused.append(refused)


def _share(a: Any, b: Any) -> bool:
    """Whether two values are tensors in the same memory."""
    both = isinstance(a, Tensor) and isinstance(b, Tensor)
    return both and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
