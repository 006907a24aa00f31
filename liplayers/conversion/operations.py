"""What a traced forward does by functions and methods: what is swapped, what is merged, and what has no bound."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from liplayers.bounds.graph import graph_bounds
from liplayers.conversion.merging import ConvexSum, ScaledCat
from liplayers.conversion.program import Traced
from liplayers.conversion.survey import Seen
from liplayers.conversion.swaps import Place, Settings, Swap, scaled_to_one, swapped
from liplayers.errors import UnknownBoundError

__all__ = ["Rewriting"]

_ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
_ARITHMETIC: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_ADD, operator.add),
    **dict.fromkeys((torch.sub, operator.isub, "sub", "sub_"), operator.sub),
    **dict.fromkeys((torch.mul, operator.imul, "mul", "mul_"), operator.mul),
    **dict.fromkeys((torch.div, operator.itruediv, "div", "div_"), operator.truediv),
}
_CATS = {torch.cat, torch.concat, torch.concatenate}
_SKIPPED = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout,
}  # fmt: skip
_MEANS = {torch.mean, "mean"}

# what is done by a function → the module that does it, and the names of the function's arguments after the first
_MODULES: dict[Any, tuple[type[nn.Module], tuple[str, ...]]] = {
    **dict.fromkeys((F.relu, torch.relu, F.relu_, torch.relu_, "relu", "relu_"), (nn.ReLU, ())),
    F.relu6: (nn.ReLU6, ()),
    F.leaky_relu: (nn.LeakyReLU, ("negative_slope",)),
    F.elu: (nn.ELU, ("alpha",)),
    F.celu: (nn.CELU, ("alpha",)),
    F.selu: (nn.SELU, ()),
    F.gelu: (nn.GELU, ()),
    F.silu: (nn.SiLU, ()),
    F.mish: (nn.Mish, ()),
    F.hardswish: (nn.Hardswish, ()),
    F.softplus: (nn.Softplus, ("beta", "threshold")),
    F.avg_pool2d: (
        nn.AvgPool2d,
        ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    ),
    **dict.fromkeys(
        (F.max_pool2d, torch.max_pool2d),
        (nn.MaxPool2d, ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")),
    ),
    F.adaptive_avg_pool2d: (nn.AdaptiveAvgPool2d, ("output_size",)),
    F.adaptive_max_pool2d: (nn.AdaptiveMaxPool2d, ("output_size",)),
    F.interpolate: (nn.Upsample, ("size", "scale_factor", "mode", "align_corners")),
}
_WITHOUT_EFFECT = {"inplace", "training", "antialias", "recompute_scale_factor"}

_HINTS: dict[str, str] = {
    **dict.fromkeys(
        ("scaled_dot_product_attention", "matmul", "bmm", "softmax", "einsum"),
        "attention by products of values has no Lipschitz constant: replace the module by a mixing layer, such as a "
        "linear one along the tokens",
    ),
    **dict.fromkeys(
        ("layer_norm", "group_norm", "instance_norm", "normalize", "rms_norm"),
        "it divides each sample by a number of its own: centre it, or leave it out",
    ),
    **dict.fromkeys(
        ("conv1d", "conv2d", "conv3d", "linear", "conv_transpose2d", "batch_norm"),
        "a function with weights of the module: use torch's module for it",
    ),
}
_PRODUCT = (
    "a product of two values that depend on the input (as in squeeze-and-excitation) has no Lipschitz constant: "
    "replace the module, as by nn.Identity, or build the model without it"
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
        refused: what has no bound.
    """

    module: nn.Module
    program: Traced
    seen: dict[nn.Module, Seen]
    settings: Settings
    parts: dict[str, nn.Module] = field(default_factory=dict)
    swaps: dict[str, tuple[str, Swap | None]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for node in self._nodes():
            self._without_writing(node)
        for node in self._nodes():
            try:
                self._swap(node)
            except UnknownBoundError as error:
                self.refused.append(f"{_name(node)}: {error}")
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
        if not node.args or not isinstance(node.args[0], fx.Node) or not self._writes(node):
            return
        values, order = self.program.values, {other: i for i, other in enumerate(self.program.graph.nodes)}
        written = values[node.args[0]]
        for other in [other for other in order if order[other] < order[node] and _share(values[other], written)]:
            for user in [user for user in other.users if order[user] > order[node]]:
                if values[other] is not written or values[node] is not written:
                    return self.refused.append(
                        f"{_name(node)} writes into a tensor that {_name(user)} uses again: write out of place"
                    )
                user.replace_input_with(other, node)

    def _writes(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            seen = self.seen.get(self._called(node))
            return seen is not None and seen.changes
        name = _name(node)
        return node.kwargs.get("inplace") is True or (name.endswith("_") and not name.endswith("__"))

    # functions that are modules

    def _swap(self, node: fx.Node) -> None:
        target: Any = node.target
        x = node.args[0] if node.args else None
        if node.op == "call_module" or not isinstance(x, fx.Node) or _plain(node.target) is None:
            return
        if target in _ARITHMETIC and not node.kwargs and len(node.args) == 2:
            node.op, node.target = "call_function", _ARITHMETIC[target]
        elif target in _SKIPPED:
            self.swaps[node.name] = _name(node), None
            node.replace_all_uses_with(x)
            self.program.graph.erase_node(node)
        elif target in _MEANS:
            self._swap_mean(node, x)
        elif target in _MODULES:
            module = _module(node)
            if module is not None:
                self._put(node, x, self._swapped(module, x))

    def _swapped(self, module: nn.Module, x: fx.Node) -> Swap:
        shape = self._shape(x)
        linear = x.op == "call_module" and isinstance(self._called(x), nn.Linear)
        return swapped(module, self.settings, Place(set() if shape is None else {shape}, -1 if linear else 1))

    def _swap_mean(self, node: fx.Node, x: fx.Node) -> None:
        """The mean over the two sides of an image is adaptive pooling."""
        shape = self._shape(x)
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        kept = node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False)
        if shape is None or len(shape) != 3 or not isinstance(dims, list | tuple) or {*_positive(dims)} != {2, 3}:
            return
        swap = scaled_to_one(nn.AdaptiveAvgPool2d(1), {shape})
        if not kept:
            parts = [*swap.module] if isinstance(swap.module, nn.Sequential) else [swap.module]
            swap = Swap(nn.Sequential(*parts, nn.Flatten()), note=swap.note)
        self._put(node, x, swap)

    def _put(self, node: fx.Node, x: fx.Node, swap: Swap) -> None:
        was = _name(node)
        node.op, node.target, node.args, node.kwargs = "call_module", self._new(was, swap.module), (x,), {}
        self.swaps[str(node.target)] = was, swap

    def _new(self, base: str, module: nn.Module) -> str:
        base = base.strip("_")
        names = (base if i == 0 else f"{base}_{i}" for i in range(len(self.parts) + len(vars(self.module)) + 99))
        name = next(name for name in names if name not in self.parts and not hasattr(self.module, name))
        self.parts[name] = module
        return name

    # sums and concatenations

    def _merge(self, node: fx.Node) -> None:
        depends = self.program.depends
        if node.op != "call_function":
            return
        if node.target is operator.add and all(isinstance(a, fx.Node) and a in depends for a in node.args):
            if self._shape(node.args[0]) == self._shape(node.args[1]):  # type: ignore[arg-type]
                self._call(node, "sum", ConvexSum(learnable=self.settings.learned_sums), node.args)
        elif node.target in _CATS and isinstance(node.args[0], list | tuple):
            values = node.args[0]
            dim = node.kwargs.get("dim", node.kwargs.get("axis", node.args[1] if len(node.args) > 1 else 0))
            if len(values) > 1 and all(isinstance(a, fx.Node) and a in depends for a in values):
                self._call(node, "cat", ScaledCat(len(values), dim), tuple(values))  # type: ignore[arg-type]

    def _call(self, node: fx.Node, base: str, module: nn.Module, args: Any) -> None:
        was = _name(node)
        node.op, node.target, node.args, node.kwargs = "call_module", self._new(base, module), tuple(args), {}
        self.swaps[str(node.target)] = was, Swap(module)

    # what has no bound

    def _look_for_obstacles(self) -> None:
        shapes = {node: self._shape(node) for node in self.program.graph.nodes}
        errors: list[UnknownBoundError] = []
        graph_bounds(self.program.graph, lambda name: 1.0, shapes, errors)
        for error in errors:
            text = str(error)
            found = next((hint for name, hint in _HINTS.items() if f"{name!r}" in text), None)
            text = text if found is None else f"{text}: {found}"
            if "multiplies or divides tensors" in text and self._has_product():
                text = _PRODUCT
            if "with other arguments than one tensor" not in text and text not in self.refused:
                self.refused.append(text)

    def _has_product(self) -> bool:
        arithmetic = (operator.mul, operator.truediv)
        return any(n.target in arithmetic and {*n.all_input_nodes} <= self.program.depends for n in self._nodes())


def _plain(target: Any) -> Any:
    """A target that can be looked up."""
    return target if isinstance(target, str) or callable(target) else None


def _share(a: Any, b: Any) -> bool:
    """Whether two values are tensors in the same memory."""
    both = isinstance(a, Tensor) and isinstance(b, Tensor)
    return both and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _positive(dims: Any) -> list[int]:
    return [dim % 4 for dim in dims if isinstance(dim, int)]


def _module(node: fx.Node) -> nn.Module | None:
    """The module that does what a call of a function does; None where an argument is not a constant."""
    kind, names = _MODULES[node.target]
    arguments = dict(zip(names, node.args[1:], strict=False))
    arguments |= {name: value for name, value in node.kwargs.items() if name not in _WITHOUT_EFFECT and name != "input"}
    if node.all_input_nodes != [node.args[0]] or len(node.args) - 1 > len(names):
        return None
    arguments = {name: value for name, value in arguments.items() if value is not None}
    return None if arguments.keys() - set(names) - {"approximate"} else kind(**arguments)
