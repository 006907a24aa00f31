"""The Lipschitz bound of a whole model, composed from the bounds of its layers.

Sequential modules multiply, containers state their rule (`Container.compose_bounds`), torch's own modules are in
`torch_modules`, and any other module is traced: sums add, concatenations take the root of the sum of squares. A
module or operation that is not known raises `UnknownBoundError` with its path and type; it never counts as 1. Every
number is rounded upward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from liplayers.bounds.graph import evaluating, graph_bounds, trace, value_shapes
from liplayers.bounds.torch_modules import RULES, Shape, torch_bound
from liplayers.errors import NonFiniteError, ShapeError, UnknownBoundError
from liplayers.layers.base import LipschitzLinear, LipschitzModule
from liplayers.layers.containers import Container
from liplayers.layers.heads import rounded_up, row_distances
from liplayers.linalg import upward
from liplayers.linalg.verified import Enclosure


def lipschitz_bound(model: nn.Module, input_shape: Shape | None = None) -> float:
    """A proven upper bound on the ℓ2 Lipschitz constant of `model`.

    Args:
        model: any module whose parts are known.
        input_shape: of one input, without the batch dimension. Needed where a bound depends on the image size; the
            model is then run once on zeros, which also shows that it accepts that shape.

    The bound is for the mode, training or evaluation, that the model is in.

    Raises:
        UnknownBoundError: a part without a known bound, or changed by a hook; named by its path and type.
        ShapeError: the model does not accept inputs of that shape.
        NonFiniteError: the parameters contain NaN or infinity.

    >>> from liplayers import AOLLinear, MaxMin, Scale
    >>> lipschitz_bound(nn.Sequential(AOLLinear(4, 4), MaxMin(), Scale(3.0)), (4,))
    3.0
    """
    return _Walk(model, input_shape).bound(model, "")


def layer_bounds(model: nn.Module, input_shape: Shape | None = None) -> dict[str, float]:
    """The bound of each module on the walk through `model`, by path; the empty path is the whole.

    >>> from liplayers import AOLLinear, Scale
    >>> layer_bounds(nn.Sequential(AOLLinear(4, 4), Scale(3.0)), (4,))
    {'0': 1.0, '1': 3.0, '': 3.0}
    """
    walk = _Walk(model, input_shape)
    walk.bound(model, "")
    return walk.found


def register_bound(module_type: type[nn.Module], rule: Callable[[nn.Module, Shape | None], float]) -> None:
    """State the bound of a module type from outside liplayers: rule(module, input shape or None) → bound.

    The rule is trusted; it holds for that exact type, not for subclasses.
    """
    RULES[module_type] = rule


@dataclass(frozen=True)
class HeadSplit:
    """A classifier seen as a body with a bound and a linear head, if it ends in one.

    Attributes:
        body_bound: of everything below the head, or of the whole model where there is no linear head.
        head: the last linear layer, or None.
    """

    body_bound: float
    head: nn.Module | None

    def margin_lipschitz(self, num_classes: int) -> Tensor:
        """Lipschitz constants of all logit differences f_y − f_j, (K, K), zeros on the diagonal.

        At least body_bound·‖w_y − w_j‖ with a head (differentiable in its weight), √2·body_bound without; above by
        less than 2d + 20 units of 2⁻⁵³, d the features that the head reads.
        """
        if self.head is None:
            constant = upward.product(upward.root(2), self.body_bound)
            return constant * (1 - torch.eye(num_classes, dtype=torch.float64))
        weight: Tensor = self.head.weight  # type: ignore[assignment]
        if weight.shape[0] != num_classes:
            raise ShapeError(f"the head has {weight.shape[0]} rows, num_classes is {num_classes}")
        if torch.is_autocast_enabled(weight.device.type):
            weight = weight.to(torch.get_autocast_dtype(weight.device.type))  # as it runs
        return rounded_up(self.body_bound * row_distances(weight.double()))


def split_head(model: nn.Module, input_shape: Shape | None = None) -> HeadSplit:
    """Split a classifier into a body with a bound and its linear head; errors as `lipschitz_bound`.

    >>> from liplayers import AOLLinear, NormalizedLinear
    >>> split_head(nn.Sequential(AOLLinear(4, 4), NormalizedLinear(4, 3)), (4,)).body_bound
    1.0
    """
    return _Walk(model, input_shape).split(model, "")


@dataclass(frozen=True)
class ClassifierBounds:
    """Everything that one walk over a classifier proves.

    Attributes:
        split: the body with its bound, and the head.
        upper: the bound of each module on the walk, by path; the empty path is the whole.
        lower: proven lower bounds of the norms of layers that run one matrix or kernel; of a convolution's supremum
            over images.
    """

    split: HeadSplit
    upper: dict[str, float]
    lower: dict[str, float]


def classifier_bounds(model: nn.Module, input_shape: Shape | None = None) -> ClassifierBounds:
    """`split_head` and `layer_bounds` in one walk; errors as `lipschitz_bound`.

    >>> found = classifier_bounds(nn.Sequential(nn.ReLU(), nn.Linear(4, 3)), (4,))
    >>> found.split.body_bound, found.lower["1"] <= found.upper["1"]
    (1.0, True)
    """
    walk = _Walk(model, input_shape)
    walk.bound(model, "")
    return ClassifierBounds(walk.split(model, ""), walk.found, walk.lower)


class _Walk:
    """One walk over a model: where each bound comes from, and which input shapes each module saw."""

    def __init__(self, model: nn.Module, input_shape: Shape | None) -> None:
        self.found: dict[str, float] = {}
        self.lower: dict[str, float] = {}
        self.shapes = {} if input_shape is None else _record_shapes(model, tuple(input_shape))

    def bound(self, module: nn.Module, path: str) -> float:
        if path in self.found:
            return self.found[path]
        try:
            _check_unchanged(module)
            _check_finite(module, path)
            value = self._bound(module, path)
        except UnknownBoundError as error:
            raise _located(error, module, path) from None
        if not (math.isfinite(value) and value >= 0):
            raise NonFiniteError(
                f"{path or 'the model'} ({type(module).__name__}): its bound is {value}; "
                f"its parameters contain numbers too large for their dtype, or its rule is wrong"
            )
        self.found[path] = value
        return value

    def _bound(self, module: nn.Module, path: str) -> float:
        self._check_dimension(module)
        if isinstance(module, LipschitzModule) and _covers_forward(module, "lipschitz_bound"):
            return module.lipschitz_bound()
        if isinstance(module, Container) and _covers_forward(module, "compose_bounds"):
            names = {child: name for name, child in module.named_modules()}
            branches = module.branches()
            return module.compose_bounds([self.bound(b, _join(path, names.get(b, type(b).__name__))) for b in branches])
        if _is_sequential(module):
            return self._product(_children(module), path)
        known = self._torch_bound(module, path)
        if known is not None:
            return known
        return max(bounds[_output(graph)] for graph, bounds in self._traced(module, path))

    def _check_dimension(self, module: nn.Module) -> None:
        """What acts along dimension 0 treats the samples of a batch as one vector."""
        dim = getattr(module, "dim", None)
        if not isinstance(dim, int):
            return
        for shape in self.shapes.get(module, {None}):
            if dim == 0 or (shape is not None and dim == -1 - len(shape)):
                raise UnknownBoundError(f"dim={dim} is the batch, whose samples it mixes: choose another dimension")

    def _product(self, children: list[tuple[str, nn.Module]], path: str) -> float:
        return upward.product(*(self.bound(child, _join(path, name)) for name, child in children))

    def _torch_bound(self, module: nn.Module, path: str) -> float | None:
        found = []
        for shape in self.shapes.get(module, {None}):
            value = torch_bound(module, shape)
            if isinstance(value, Enclosure):
                self.lower[path] = value.lower
                value = value.upper
            found.append(value)
        return None if None in found else max(f for f in found if f is not None)

    def _traced(self, module: nn.Module, path: str) -> list[tuple[fx.Graph, dict[fx.Node, float]]]:
        """Graph and bounds of a custom module, for each shape of input that it has seen."""
        if type(module).__module__.startswith("torch.nn."):
            raise UnknownBoundError("no bound is known for this type")
        graph = trace(module, self._is_leaf)
        like = _like(module)
        found = []
        for shape in self.shapes.get(module, {None}):
            shapes = None if shape is None else value_shapes(module, graph, shape, like)

            def leaf_bound(name: str) -> float:
                return self.bound(module.get_submodule(name), _join(path, name))

            found.append((graph, graph_bounds(graph, leaf_bound, shapes)))
        return found

    def _is_leaf(self, module: nn.Module) -> bool:
        ours = (isinstance(module, LipschitzModule) and _covers_forward(module, "lipschitz_bound")) or (
            isinstance(module, Container) and _covers_forward(module, "compose_bounds")
        )
        known = ours or _is_sequential(module) or type(module) in RULES
        return known or type(module).__module__.startswith("torch.nn.") or is_changed(module)

    def split(self, module: nn.Module, path: str) -> HeadSplit:
        try:
            _check_unchanged(module)
            inner = self._split(module, path)
        except UnknownBoundError as error:
            raise _located(error, module, path) from None
        if not math.isfinite(inner.body_bound):
            raise NonFiniteError(f"{path or 'the model'}: the bound below the head is {inner.body_bound}")
        return inner

    def _split(self, module: nn.Module, path: str) -> HeadSplit:
        is_head = isinstance(module, LipschitzLinear) and type(module).forward is LipschitzLinear.forward
        if is_head or type(module) is nn.Linear:
            _check_finite(module, path)
            return HeadSplit(1.0, module)
        if _is_sequential(module) and len(module._modules):
            *body, (last_name, last) = _children(module)
            below = self._product(body, path)
            inner = self.split(last, _join(path, last_name))
            return HeadSplit(upward.product(below, inner.body_bound), inner.head)
        if self._is_leaf(module):
            return HeadSplit(self.bound(module, path), None)
        return self._split_traced(module, path)

    def _split_traced(self, module: nn.Module, path: str) -> HeadSplit:
        traced = self._traced(module, path)
        last = _output(traced[0][0]).args[0]
        if isinstance(last, fx.Node) and last.op == "call_module":
            name = str(last.target)
            below = max(bounds[last.all_input_nodes[0]] for _, bounds in traced)
            inner = self.split(module.get_submodule(name), _join(path, name))
            return HeadSplit(upward.product(below, inner.body_bound), inner.head)
        return HeadSplit(max(bounds[_output(graph)] for graph, bounds in traced), None)


def is_changed(module: nn.Module) -> bool:
    """Whether something beside its class's forward has a say in what it computes."""
    everywhere = torch.nn.modules.module
    hooked = module._forward_hooks or module._forward_pre_hooks
    hooked = hooked or everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks
    return bool(hooked) or "forward" in vars(module) or type(module).__call__ is not nn.Module.__call__


def _check_unchanged(module: nn.Module) -> None:
    if is_changed(module):
        raise UnknownBoundError("a forward hook, or a replaced forward or __call__, may change what it computes")


def _covers_forward(module: nn.Module, rule: str) -> bool:
    """Whether the class that states the bound is the one that defines forward, or derives from it.

    A subclass that overrides forward alone may compute something else.
    """
    order = type(module).__mro__
    states = next(cls for cls in order if rule in vars(cls))
    computes = next(cls for cls in order if "forward" in vars(cls))
    return issubclass(states, computes)


def _located(error: UnknownBoundError, module: nn.Module, path: str) -> UnknownBoundError:
    """The error with path and type of the innermost module that it is about."""
    if getattr(error, "located", False):
        return error
    reason = str(error)
    if not any(mend in reason for mend in ("pass input_shape", "model.eval()", ": write x")):
        reason += (
            "; replace it, give it a lipschitz_bound() by deriving from LipschitzModule, "
            "or state its bound with liplayers.register_bound"
        )
    located = UnknownBoundError(f"{path or 'the model'} ({type(module).__name__}): {reason}")
    located.located = True  # type: ignore[attr-defined]
    return located


def _is_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The children by name, one that occurs twice listed twice (`named_children` lists it once)."""
    return [(name, child) for name, child in module._modules.items() if child is not None]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def _output(graph: fx.Graph) -> fx.Node:
    return next(iter(reversed(graph.nodes)))


def _check_finite(module: nn.Module, path: str) -> None:
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NonFiniteError(f"{_join(path, name)}: contains NaN or infinity; the weights cannot be certified")


def _like(model: nn.Module) -> Tensor:
    """A tensor of the dtype and device that the model runs in."""
    return next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))


def _record_shapes(model: nn.Module, input_shape: Shape) -> dict[nn.Module, set]:
    """The input shapes, without the batch, that each module sees when the model runs on zeros."""
    shapes: dict[nn.Module, set] = {}

    def hook(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        given = next(iter((*args, *kwargs.values())), None)
        if isinstance(given, Tensor):
            shapes.setdefault(module, set()).add(tuple(given.shape[1:]))

    handles = [m.register_forward_hook(hook, with_kwargs=True) for m in model.modules()]
    like = _like(model)
    try:
        with evaluating(model):
            model(torch.zeros(1, *input_shape, dtype=like.dtype, device=like.device))
    except ShapeError:
        raise
    except Exception as error:  # the model's own code: anything may come out
        raise ShapeError(
            f"the model does not accept inputs of shape {input_shape} ({' '.join(str(error).split())}); "
            f"pass the shape of one input without the batch dimension"
        ) from None
    finally:
        for handle in handles:
            handle.remove()
    return shapes
