"""The Lipschitz bound of a whole model, composed from the bounds of its layers.

Sequential modules multiply, containers state their rule (`Container.compose_bounds`), torch's own modules are in
`torch_modules`, and any other module is traced: sums add, concatenations take the root of the sum of squares. What is
traced is compared with what runs (`trial`). A walk has two phases: first every module or operation that is not known is
found, and all of them are named by path and type in one `UnknownBoundError`; they never count as 1. Only then are norms
computed. Every number is rounded upward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, fx, nn

from liplayers.bounds.advice import advice
from liplayers.bounds.graph import Bounds, Effect, Leaf, Shapes, constant_values, graph_bounds
from liplayers.bounds.inputs import Inputs, InputShape, Seen, observed
from liplayers.bounds.torch_modules import RULES, Shape, torch_bound
from liplayers.bounds.trace import Given, Program, trace
from liplayers.bounds.trial import Trial
from liplayers.bounds.wrappers import refuse_wrapper, unwrapped
from liplayers.core.intact import is_changed, require_intact
from liplayers.core.module import LipschitzModule
from liplayers.core.parametrized import plain_type
from liplayers.core.precision import executed_dtype
from liplayers.errors import ArgumentError, LipschitzError, NonFiniteError, Obstacle, ShapeError, UnknownBoundError
from liplayers.layers.bases.dense import LipschitzLinear
from liplayers.linalg import upward
from liplayers.linalg.norms import rounded_up, row_distances
from liplayers.linalg.verified import Enclosure
from liplayers.modules.containers import Container

__all__ = [
    "ClassifierBounds",
    "HeadSplit",
    "check_finite",
    "classifier_bounds",
    "head_splitter",
    "is_container",
    "is_ours",
    "layer_bounds",
    "lipschitz_bound",
    "register_bound",
    "split_head",
]


def lipschitz_bound(model: nn.Module, input_shape: Shape | None = None) -> float:
    """A proven upper bound on the ℓ2 Lipschitz constant of `model`.

    The bound is for the mode, training or evaluation, that the model is in, and for the weights as they run: inside
    autocast, rounded to its dtype.

    Args:
        model: any module whose parts are known.
        input_shape: of one input, without the batch dimension. Needed where a bound depends on the image size, and
            where a forward method has to be traced; the model is then run once on zeros, which also shows that it
            accepts that shape, and a copy of it on random inputs where there is a trace to compare with.

    Raises:
        UnknownBoundError: parts without a known bound, or changed by a hook, or whose trace is not what they compute.
            The error names all of them by path and type, also as `error.obstacles`, before any norm is computed.
        ShapeError: the model does not accept inputs of that shape.
        NonFiniteError: the parameters contain NaN or infinity.

    >>> from liplayers import AOLLinear, MaxMin, Scale
    >>> lipschitz_bound(nn.Sequential(AOLLinear(4, 4), MaxMin(), Scale(3.0)), (4,))
    3.0
    """
    walk = _Walk(model, input_shape)
    return walk.bound(walk.root)


def layer_bounds(model: nn.Module, input_shape: Shape | None = None) -> dict[str, float]:
    """The bound of each module on the walk through `model`, by path; the empty path is the whole.

    Args:
        model: any module whose parts are known.
        input_shape: of one input, without the batch dimension; needed where a bound depends on the image size, and
            where a forward method has to be traced.

    Raises:
        UnknownBoundError: parts without a known bound, as `lipschitz_bound` finds them.
        ShapeError: the model does not accept inputs of that shape.
        NonFiniteError: the parameters contain NaN or infinity.

    >>> from liplayers import AOLLinear, Scale
    >>> layer_bounds(nn.Sequential(AOLLinear(4, 4), Scale(3.0)), (4,))
    {'0': 1.0, '1': 3.0, '': 3.0}
    """
    walk = _Walk(model, input_shape)
    walk.bound(walk.root)
    return walk.found


def register_bound(module_type: type[nn.Module], rule: Callable[[nn.Module, Shape | None], float]) -> None:
    """State the bound of a module type from outside liplayers: rule(module, input shape or None) → bound.

    The rule is trusted; it holds for that exact type, not for subclasses.

    Args:
        module_type: the exact type, without its subclasses.
        rule: (module, input shape or None) → bound.
    """
    RULES[module_type] = lambda module, shape: partial(rule, module, shape)


@dataclass(frozen=True)
class HeadSplit:
    """A classifier seen as a body with a bound and a linear head, if it ends in one.

    Attributes:
        body_bound: of everything below the head, or of the whole model where there is no linear head.
        head: the last linear layer, or None.
        scale: what else the body is multiplied by: of estimates, the product of those that are tensors.
    """

    body_bound: float
    head: nn.Module | None
    scale: float | Tensor = 1.0

    def margin_lipschitz(self, num_classes: int) -> Tensor:
        """Lipschitz constants of all logit differences f_y − f_j, (K, K), zeros on the diagonal.

        At least body_bound·‖w_y − w_j‖ with a head (differentiable in its weight), √2·body_bound without; above by
        less than 2d + 20 units of 2⁻⁵³, d the features that the head reads.
        """
        if self.head is None:
            constant = upward.product(upward.root(2), self.body_bound)
            return constant * (1 - torch.eye(num_classes, dtype=torch.float64)) * self.scale
        weight: Tensor = self.head.weight  # type: ignore[assignment]
        if weight.shape[0] != num_classes:
            raise ShapeError(f"the head has {weight.shape[0]} rows, num_classes is {num_classes}")
        distances = row_distances(weight.to(executed_dtype(weight)).double())
        return rounded_up(self.body_bound * distances) * self.scale


def split_head(model: nn.Module, input_shape: Shape | None = None) -> HeadSplit:
    """Split a classifier into a body with a bound and its linear head.

    Args:
        model: any module whose parts are known.
        input_shape: of one input, without the batch dimension; needed where a bound depends on the image size, and
            where a forward method has to be traced.

    Raises:
        UnknownBoundError: parts without a known bound, as `lipschitz_bound` finds them.
        ShapeError: the model does not accept inputs of that shape.
        NonFiniteError: the parameters contain NaN or infinity.

    >>> from liplayers import AOLLinear, NormalizedLinear
    >>> split_head(nn.Sequential(AOLLinear(4, 4), NormalizedLinear(4, 3)), (4,)).body_bound
    1.0
    """
    return head_splitter(model, input_shape)()


def head_splitter(
    model: nn.Module, input_shape: Shape | None = None, *, estimates: bool = False
) -> Callable[[], HeadSplit]:
    """`split_head` of a model whose weights change, and nothing else: its structure is understood once.

    Args:
        model: any module whose parts are known.
        input_shape: of one input, without the batch dimension; needed where a bound depends on the image size, and
            where a forward method has to be traced.
        estimates: whether layers say `lipschitz_estimate`, which proves nothing, instead of `lipschitz_bound`.

    Raises:
        UnknownBoundError: parts without a known bound, as `lipschitz_bound` finds them.
        ShapeError: the model does not accept inputs of that shape.
        NonFiniteError: the parameters contain NaN or infinity.

    >>> from liplayers import AOLLinear, ConvexResidual, NormalizedLinear
    >>> model = nn.Sequential(ConvexResidual(nn.Linear(4, 4)), NormalizedLinear(4, 3))
    >>> split = head_splitter(model, (4,))
    >>> before = split().body_bound
    >>> _ = nn.init.zeros_(model[0].branch.weight)
    >>> before > 0.5, round(split().body_bound, 6)
    (True, 0.5)
    """
    walk = _Walk(model, input_shape, estimates)

    def split() -> HeadSplit:
        nonlocal walk
        if any(program.settled for program in walk.programs.values()):  # on values that may have changed
            walk = _Walk(model, input_shape, estimates)
        walk.found.clear()
        if estimates:
            return walk.estimated_split()
        check_finite(model, "")
        return walk.split(walk.root)

    return split


@dataclass(frozen=True)
class ClassifierBounds:
    """Everything that is proven in one walk over a classifier.

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
    """`split_head` and `layer_bounds` in one walk.

    Args:
        model: any module whose parts are known.
        input_shape: of one input, without the batch dimension; needed where a bound depends on the image size, and
            where a forward method has to be traced.

    Raises:
        UnknownBoundError: parts without a known bound, as `lipschitz_bound` finds them.
        ShapeError: the model does not accept inputs of that shape.
        NonFiniteError: the parameters contain NaN or infinity.

    >>> found = classifier_bounds(nn.Sequential(nn.ReLU(), nn.Linear(4, 3)), (4,))
    >>> found.split.body_bound, found.lower["1"] <= found.upper["1"]
    (1.0, True)
    """
    walk = _Walk(model, input_shape)
    walk.bound(walk.root)
    return ClassifierBounds(walk.split(walk.root), walk.found, walk.lower)


@dataclass
class _Part:
    """What is understood of one module on the walk, and how its bound is computed from that."""

    path: str
    module: nn.Module
    compute: Callable[[], float] = lambda: math.inf
    children: list[_Part] = field(default_factory=list)  # of a sequence or container
    program: Program | None = None
    shapes: list[Shapes | None] = field(default_factory=list)  # of the program's values, for each shape of its input

    @property
    def is_sequence(self) -> bool:
        return _is_sequential(self.module)


class _Walk:
    """One walk over a model: where each bound comes from, and which input shapes each module saw.

    Raises:
        UnknownBoundError: of all obstacles.
        ShapeError: the model does not accept inputs of that shape, and nothing unknown is in the way.
    """

    def __init__(
        self, model: nn.Module, input_shape: InputShape | None, estimates: bool = False, explains: bool = False
    ) -> None:
        self.model = model = unwrapped(model)
        self.estimates = estimates
        self.found: dict[str, float] = {}
        self.lower: dict[str, float] = {}
        self.parts: dict[str, _Part] = {}
        self.refused: dict[str, list[LipschitzError]] = {}
        self.refused_nodes: dict[fx.Node, str] = {}
        self.programs: dict[nn.Module, Program] = {}
        self.effects: dict[str, Effect] = {}
        self.failure: LipschitzError | None = None
        self.shape_given = input_shape is not None
        self.blind = input_shape is None  # whether the shapes within the model are not known
        self.inputs: Inputs | None = None
        self.seen = Seen()
        try:
            if input_shape is not None:
                self.inputs, self.seen = observed(model, input_shape)
        except (ShapeError, UnknownBoundError) as error:  # what is unknown in it may be why
            self.failure, self.blind = error, True
        self.shapes = self.seen.shapes
        if not explains:
            check_finite(model, "")
        self.root = self._understand(model, "")
        if self.programs and not self.blind:
            self._try(model)
        self._check_programs()
        if not explains:
            self._raise_obstacles()
            if self.failure is not None:
                raise self.failure

    # what is unknown

    def _understand(self, module: nn.Module, path: str) -> _Part:
        if path in self.parts:
            return self.parts[path]
        part = self.parts[path] = _Part(path, module)
        try:
            _check_dimension(module, self.shapes.get(module, {None}))
            self._fill(part)
        except (UnknownBoundError, ArgumentError) as error:
            self._refuse(path, error)
        return part

    def _fill(self, part: _Part) -> None:
        module: Any = part.module
        refuse_wrapper(module)
        if is_ours(module):
            require_intact(module)
            module.check_parts()
            part.compute = (lambda: float(module.lipschitz_estimate())) if self.estimates else module.lipschitz_bound
        elif is_container(module):
            require_intact(module, parts=False)
            names = {child: name for name, child in module.named_modules()}
            for branch in module.branches():
                if branch not in names:
                    raise UnknownBoundError(
                        f"its branch {type(branch).__name__} is not among its modules: make it an attribute"
                    )
                part.children.append(self._child(part, names[branch], branch))
            part.compute = lambda: module.compose_bounds([self.bound(child) for child in part.children])
        elif _is_sequential(module):
            require_intact(module, parts=False)
            part.children = [self._child(part, name, child) for name, child in _children(module)]
            part.compute = lambda: self._product(part.children)
        else:
            require_intact(module, parts=plain_type(module) in RULES)
            rules = [torch_bound(module, shape) for shape in self.shapes.get(module, {None})]
            if None in rules:
                self._fill_program(part)
            else:
                part.compute = lambda: max(self._one_bound(part.path, rule) for rule in rules if rule is not None)

    def _fill_program(self, part: _Part) -> None:
        module = part.module
        if type(module).__module__.startswith("torch.nn."):
            raise UnknownBoundError(advice(module)[0] or "no bound is known for this type")
        if module not in self.programs:
            given = self.seen.given(module)
            inputs: Any = None if given is None else ((given,), {})
            if part.path == "" and self.inputs is not None and not self.blind:
                inputs = self.inputs.arguments
            device = self.inputs.device if self.inputs is not None else torch.device("cpu")
            self.programs[module] = trace(module, _is_leaf, inputs, partial(self._result, module), device)
        part.program = program = self.programs[module]
        for name in program.calls():
            self._child(part, name, module.get_submodule(name))
        part.compute = lambda: max(bounds.values[program.output] for bounds in self._program_bounds(part))

    def _result(self, module: nn.Module, name: str, given: Given) -> Given | None:
        """What a module within another one returned."""
        return self.seen.results.get(module.get_submodule(name), {}).get(given)

    def _child(self, part: _Part, name: str, module: nn.Module) -> _Part:
        return self._understand(module, _join(part.path, name))

    def _try(self, model: nn.Module) -> None:
        """Compare the programs with the model."""
        sequences = {path: [c.path for c in part.children] for path, part in self.parts.items() if part.is_sequence}
        programs = {path: part.program for path, part in self.parts.items() if part.program is not None}
        assert self.inputs is not None
        try:
            compared = Trial(model, self.inputs, sequences, programs)
        except UnknownBoundError as error:
            self.blind = True
            return self._refuse("", error)
        for path, reason in compared.refused.items():
            if not self._calls_refused(self.parts[path]):
                self._refuse(path, UnknownBoundError(reason))
        for path, program in programs.items():
            self.parts[path].shapes = list(compared.shapes.get(program, {}).values())
            if program not in compared.shapes and path not in compared.refused:
                self._refuse(
                    path, UnknownBoundError("the model does not call it, so that its trace cannot be compared")
                )

    def _calls_refused(self, part: _Part) -> bool:
        """Whether it calls a module that is refused in a way in which only such a module is called."""
        nodes = () if part.program is None else tuple(part.program.graph.nodes)
        calls = (node for node in nodes if node.op == "call_module" and len(node.args) + len(node.kwargs) != 1)
        return any(self.refused.get(self.child(part, str(node.target)).path) for node in calls)

    def _check_programs(self) -> None:
        """Look for operations that are not known, with a bound of 1 for each leaf."""
        for part in list(self.parts.values()):
            if part.program is None:
                continue
            errors: list[tuple[fx.Node, UnknownBoundError]] = []
            constants = self.constants(part)
            for shapes in part.shapes or [None]:
                graph_bounds(part.program, self.leaf(part), shapes, constants, errors, norms=False)
            if self.blind and not errors:
                error = UnknownBoundError("a traced forward is compared with what it computes: pass input_shape")
                errors.append((part.program.output, error))
            for node, error in errors:
                if node.op == "call_module" and self.refused.get(self.child(part, str(node.target)).path):
                    continue
                if part.shapes or self.blind or "pass input_shape" not in str(error):  # without shapes it is refused
                    self._refuse(part.path, error)
                    self.refused_nodes[node] = str(error)
        for part in list(self.parts.values()):
            if is_container(part.module) and any(self._effect(child) is Effect.WRITES for child in part.children):
                self._refuse(
                    part.path,
                    UnknownBoundError("a branch writes to its input in place: write out of place in its forward"),
                )

    def _leaf(self, part: _Part, name: str, known: bool = True) -> Leaf:
        """A module that a program calls; before anything is `known`, with a bound of 1."""
        child = self.child(part, name)
        embeds = isinstance(child.module, (nn.Embedding, nn.EmbeddingBag))
        return Leaf((lambda: self.bound(child)) if known else lambda: 1.0, self._effect(child), embeds)

    def _effect(self, part: _Part) -> Effect:
        """What a module does to the memory of its input."""
        if part.path not in self.effects:
            self.effects[part.path] = self._found_effect(part)
        return self.effects[part.path]

    def _found_effect(self, part: _Part) -> Effect:
        if part.program is not None:
            leaf, shapes = self.leaf(part), (part.shapes or [None])[0]
            found = graph_bounds(part.program, leaf, shapes, self.constants(part), [], norms=False)
            return Effect.WRITES if found.writes_to_input else Effect.MAY_SHARE
        if part.is_sequence:
            for child in part.children:
                effect = self._effect(child)
                if effect is not Effect.MAY_SHARE:
                    return effect
        return Effect.FRESH if type(part.module) in _FRESH else Effect.MAY_SHARE

    def child(self, part: _Part, name: str) -> _Part:
        """What is understood of a module within another one."""
        return self.parts[_join(part.path, name)]

    def leaf(self, part: _Part) -> Callable[[str], Leaf]:
        """The modules that a program calls, with a bound of 1."""
        return partial(self._leaf, part, known=False)

    def constants(self, part: _Part) -> dict[fx.Node, Any]:
        """The values of its program that do not depend on the input."""
        assert part.program is not None
        return constant_values(part.program, lambda name: _tensor(part.module, name))

    def _refuse(self, path: str, error: LipschitzError) -> None:
        errors = self.refused.setdefault(path, [])
        if str(error) not in map(str, errors):
            errors.append(error)

    def obstacles(self) -> list[tuple[Obstacle, LipschitzError]]:
        """All that is in the way of a bound, in the order of the model."""
        found = [(path, error) for path in self.parts for error in self.refused.get(path, ())]
        if self.blind and self.shape_given:  # what depends on the shape is no obstacle; that it does not run is one
            found = [(path, error) for path, error in found if "pass input_shape" not in str(error)]
        return [(_obstacle(path, self.parts[path].module, error), error) for path, error in found]

    def _raise_obstacles(self) -> None:
        found = self.obstacles()
        obstacles = [obstacle for obstacle, _ in found]
        if len(found) == 1 and isinstance(found[0][1], ArgumentError):
            raise ArgumentError(str(obstacles[0]))
        if obstacles:
            raise UnknownBoundError.of(obstacles)

    # bounds

    def bound(self, part: _Part) -> float:
        path, module = part.path, part.module
        if path in self.found:
            return self.found[path]
        try:
            value = part.compute()
        except (UnknownBoundError, ArgumentError) as error:
            if part.children or part.program or (isinstance(error, UnknownBoundError) and error.obstacles):
                raise  # it has the path of the part that it is about
            obstacle = Obstacle(path, type(module).__name__, str(error))
            if isinstance(error, ArgumentError):
                raise ArgumentError(str(obstacle)) from None
            raise UnknownBoundError.of([obstacle]) from None
        if not (math.isfinite(value) and value >= 0):
            raise NonFiniteError(
                f"{path or 'the model'} ({type(module).__name__}): its bound is {value}; "
                f"its parameters contain numbers too large for their dtype, or its rule is wrong"
            )
        self.found[path] = value
        return value

    def _product(self, parts: list[_Part]) -> float:
        return upward.product(*map(self.bound, parts))

    def _one_bound(self, path: str, rule: Callable[[], float | Enclosure]) -> float:
        value = rule()
        if isinstance(value, Enclosure):
            self.lower[path] = value.lower
            return value.upper
        return value

    def _program_bounds(self, part: _Part) -> list[Bounds]:
        """The bounds of its values, for each shape of input that it has seen."""
        assert part.program is not None
        constants = self.constants(part)
        return [graph_bounds(part.program, partial(self._leaf, part), shapes, constants) for shapes in part.shapes]

    def estimated_split(self) -> HeadSplit:
        """With the estimates of the layers in sequence as they are, tensors too, and no value of these read."""
        chain = list(self._chain(self.root))
        ours = [part for part in chain if is_ours(part.module)]
        self.found.update({part.path: 1.0 for part in ours})
        found = self.split(self.root)
        factors: list[Any] = [p.module.lipschitz_estimate() for p in ours if p.module is not found.head]  # type: ignore
        tensors = [factor for factor in factors if isinstance(factor, Tensor)]
        body = upward.product(found.body_bound, *(f for f in factors if not isinstance(f, Tensor)))
        return HeadSplit(body, found.head, math.prod(tensors, start=1.0))

    def _chain(self, part: _Part) -> Iterator[_Part]:
        if part.is_sequence:
            for child in part.children:
                yield from self._chain(child)
        else:
            yield part

    def split(self, part: _Part) -> HeadSplit:
        inner = self._split(part)
        if not math.isfinite(inner.body_bound):
            raise NonFiniteError(f"{part.path or 'the model'}: the bound below the head is {inner.body_bound}")
        return inner

    def _split(self, part: _Part) -> HeadSplit:
        module = part.module
        is_head = isinstance(module, LipschitzLinear) and type(module).forward is LipschitzLinear.forward
        if is_head or plain_type(module) is nn.Linear:
            return HeadSplit(1.0, module)
        if part.is_sequence and part.children:
            below = self._product(part.children[:-1])
            inner = self.split(part.children[-1])
            return HeadSplit(upward.product(below, inner.body_bound), inner.head)
        last = part.program and part.program.output.args[0]
        if isinstance(last, fx.Node) and last.op == "call_module":
            below = max(bounds.given[last] for bounds in self._program_bounds(part))
            inner = self.split(self.parts[_join(part.path, str(last.target))])
            return HeadSplit(upward.product(below, inner.body_bound), inner.head)
        return HeadSplit(self.bound(part), None)


# of torch's modules, those that never return what they are given, or a view of it
_FRESH = {
    nn.Linear,
    *(getattr(nn, f"{kind}{n}d") for kind in ("Conv", "ConvTranspose", "BatchNorm") for n in (1, 2, 3)),
}


def _obstacle(path: str, module: nn.Module, error: LipschitzError) -> Obstacle:
    reason, instead = advice(module)
    return Obstacle(path, type(module).__name__, str(error), instead if str(error) == reason else "")


def is_ours(module: nn.Module) -> bool:
    """Whether the module states its own bound, of the forward that runs."""
    return isinstance(module, LipschitzModule) and _covers_forward(module, "lipschitz_bound")


def is_container(module: nn.Module) -> bool:
    """Whether the module states how the bounds of its branches compose, for the forward that runs."""
    return isinstance(module, Container) and all(_covers_forward(module, r) for r in ("compose_bounds", "branches"))


def _is_leaf(module: nn.Module) -> bool:
    """Whether a trace takes a module as a single call."""
    known = is_ours(module) or is_container(module) or _is_sequential(module) or plain_type(module) in RULES
    return known or type(module).__module__.startswith("torch.nn.") or is_changed(module)


def _check_dimension(module: nn.Module, shapes: set) -> None:
    """What acts along dimension 0 treats the samples of a batch as one vector."""
    dim = getattr(module, "dim", None)
    if not isinstance(dim, Integral):
        return
    for shape in shapes:
        if dim == 0 or (shape is not None and dim == -1 - len(shape)):
            raise UnknownBoundError(f"dim={dim} is the batch, whose samples it mixes: choose another dimension")


def _covers_forward(module: nn.Module, rule: str) -> bool:
    """Whether the class that states the bound is the one that defines forward, or derives from it.

    A subclass that overrides forward alone may compute something else.
    """
    order = type(module).__mro__
    states = next(cls for cls in order if rule in vars(cls))
    computes = next(cls for cls in order if "forward" in vars(cls))
    return issubclass(states, computes)


def _is_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The children by name, one that occurs twice listed twice (`named_children` lists it once)."""
    return [(name, child) for name, child in module._modules.items() if child is not None]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def check_finite(module: nn.Module, path: str) -> None:
    """Raise NonFiniteError for a parameter or buffer that is not finite, named below `path`."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NonFiniteError(f"{_join(path, name)}: contains NaN or infinity; the weights cannot be certified")


def _tensor(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its path."""
    path, _, name = name.rpartition(".")
    return getattr(module.get_submodule(path), name)
