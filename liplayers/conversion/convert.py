"""`convert`: a walk over a model that puts certifiable parts in the place of its own, and names all obstacles.

The model runs once, to see what each module is given. Layers of torch's are swapped by type. A forward method that is
Python code is traced, and what it does by functions is swapped, too: sums become convex ones, concatenations are
scaled. What has changed runs the code of the new graph; what has not keeps its class.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from liplayers.bounds.composition import layer_bounds
from liplayers.conversion.operations import Rewriting
from liplayers.conversion.program import Parts, Rewritten, Traced, traced
from liplayers.conversion.report import Conversion, Report, Row
from liplayers.conversion.survey import Seen, survey
from liplayers.conversion.swaps import (
    Layer,
    Place,
    Replacement,
    Settings,
    Swap,
    core,
    folds,
    hint,
    swapped,
    swaps,
)
from liplayers.core.module import LipschitzModule
from liplayers.core.parametrized import without_parametrizations
from liplayers.core.weights import ParametrizedModule
from liplayers.errors import ArgumentError, Obstacle, UnknownBoundError
from liplayers.modules.containers import Container

__all__ = ["convert"]


def convert(
    model: nn.Module,
    input_shape: tuple[int, ...],
    conv: Layer = "aoc",
    linear: Layer = "bjorck",
    *,
    fallback: Layer | None = "rescaled",
    activation: str = "maxmin",
    weights: str = "project",
    learned_sums: bool = False,
    replace: Mapping[str | type[nn.Module], Replacement] | None = None,
) -> Conversion:
    """A certifiably Lipschitz twin of a model, and a report of what became of each of its modules.

    Linear and convolutional layers become those of a family; batch normalization becomes centering by the mean; pooling
    is scaled to norm 1; dropout is left out; a sum x + f(x) becomes (1 − α)x + αf(x), and a concatenation of n values
    is divided by √n. The twin is a module of its own, which trains, copies, freezes and exports as any.

    A module keeps its name, and its class where its forward needs no change; elsewhere the twin runs the code of a
    rewritten graph (`Rewritten.code`).

    Args:
        model: of modules that run on one tensor. Pretrained weights are loaded before.
        input_shape: of one input, without the batch dimension.
        conv: a family's name, or a class or function with the arguments of nn.Conv2d.
        linear: likewise, of nn.Linear.
        fallback: for convolutions that `conv` refuses: transposed or grouped ones that it does not have, and depthwise
            ones, of which an orthogonal family has mere shifts. The report names them. None makes them obstacles.
        activation: "maxmin", or "keep": divided by its largest slope where that is above 1.
        weights: "project" starts from the nearest member that each family finds, batch normalization folded in, and
            takes seconds for each layer of families that search (AOC, BCOP); "fresh" from new weights.
        learned_sums: whether the α of each sum is learned, from ½; else it is ½.
        replace: what to put in the place of a module, by its path or exact type: a function of the module.

    Raises:
        UnknownBoundError: parts that cannot be converted, all of them named, also as `error.obstacles`.
        ArgumentError: an argument that is none of its values.
        ShapeError: the model does not run on inputs of that shape.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    >>> twin, report = convert(model, (4,))
    >>> twin
    Sequential(
      (0): BjorckLinear(in_features=4, out_features=8, bias=True, iterations=13)
      (1): BatchCentering(channels=8, momentum=0.1, bias=True)
      (2): MaxMin(dim=1)
      (3): BjorckLinear(in_features=8, out_features=2, bias=True, iterations=13)
    )
    >>> report.bound
    1.0
    """
    settings = Settings(conv, linear, fallback, activation, weights, learned_sums, dict(replace or {}))
    shape = tuple(input_shape)
    own = without_parametrizations(copy.deepcopy(model).eval())
    converter = _Converter(own, survey(own, shape), settings)
    twin = converter.converted("", own)
    converter.raise_obstacles()
    bounds = layer_bounds(twin.eval(), shape)
    report = Report(tuple(converter.rows), bounds[""], shape).bounded(bounds)
    return Conversion(twin.train(model.training), report)


class _Converter:
    """One walk. `done` holds what became of each module, so that what is shared stays shared."""

    def __init__(self, model: nn.Module, seen: dict[nn.Module, Seen], settings: Settings) -> None:
        self.seen = seen
        self.settings = settings
        self.rows: list[Row] = []
        self.obstacles: list[Obstacle] = []
        self.done: dict[nn.Module, nn.Module] = {}
        self.tied: dict[int, nn.Module] = {}
        self.uses = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
        self.norms = self._pairs()

    def raise_obstacles(self) -> None:
        if self.obstacles:
            raise UnknownBoundError.of(self.obstacles)

    def converted(self, path: str, module: nn.Module) -> nn.Module:
        """What takes the place of a module."""
        if module not in self.done:
            self.done[module] = module
            try:
                self.done[module] = self._new(path, module)
            except UnknownBoundError as error:
                self.obstacles.append(Obstacle(path, type(module).__name__, str(error)))
        return self.done[module]

    def _new(self, path: str, module: nn.Module) -> nn.Module:
        rule = self.settings.replace.get(path) or self.settings.replace.get(type(module))
        if rule is not None:
            return self._replaced(path, module, rule)
        if isinstance(module, LipschitzModule):
            return self._kept(path, module)
        reason, instead = hint(module)
        if reason:
            self.obstacles.append(Obstacle(path, type(module).__name__, reason, instead))
            return module
        if swaps(module):
            swap = swapped(module, self.settings, self._place(module))
            self._note(path, module, swap)
            return self._tied(module, swap.module)
        if isinstance(module, Container) or type(module).forward is nn.Sequential.forward:
            return self._with_parts(path, module)
        if type(module).__module__.startswith("torch.nn."):
            raise UnknownBoundError("nothing is known to take its place")
        return self._traced(path, module)

    def _place(self, module: nn.Module) -> Place:
        seen = self.seen.get(module, Seen())
        last = [isinstance(source, nn.Linear) or type(source) is nn.LayerNorm for source in seen.sources]
        folded = module in self.norms.values()
        return Place(seen.shapes, -1 if last and all(last) else 1, self.norms.get(module), folded)

    def _pairs(self) -> dict[nn.Module, nn.Module]:
        """The normalization that follows each layer directly, where both run once."""
        pairs = {}
        for norm, seen in self.seen.items():
            layer = next(iter(seen.sources), None)
            if layer is not None and folds(layer, norm, self.settings) and seen.calls == self.seen[layer].calls == 1:
                follows = [m for m, other in self.seen.items() if layer in other.sources and not any(m.children())]
                channels_last = isinstance(layer, nn.Linear) and any(len(shape) > 1 for shape in seen.shapes)
                if follows == [norm] and self.uses[id(layer.weight)] == 1 and not channels_last:
                    pairs[layer] = norm
        return pairs

    def _replaced(self, path: str, module: nn.Module, rule: Replacement) -> nn.Module:
        new = rule(module)
        if not isinstance(new, nn.Module):
            raise ArgumentError(f"convert: replace gave {type(new).__name__} for {path}; expected a module")
        self._note(path, module, Swap(new, note="by replace"))
        return new

    def _kept(self, path: str, module: nn.Module) -> nn.Module:
        self._note(path, module, Swap(module))
        return module

    def _note(self, path: str, module: nn.Module, swap: Swap) -> None:
        became = "" if type(swap.module) is nn.Identity else _names(swap.module)
        self.rows.append(Row(path, type(module).__name__, became, distance=swap.distance, note=swap.note))

    def _tied(self, module: nn.Module, new: nn.Module) -> nn.Module:
        """Layers that held the same weight hold the same raw parameters."""
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or self.uses[id(weight)] < 2:
            return new
        layer = core(new)
        first = self.tied.setdefault(id(weight), layer)
        if not isinstance(layer, ParametrizedModule) or type(first) is not type(layer):
            raise UnknownBoundError("it shares its weight with a layer of another kind: give each its own")
        for name in layer.raw_names:
            if getattr(first, name).shape != getattr(layer, name).shape:
                raise UnknownBoundError("it shares its weight with a layer of other settings: give each its own")
            setattr(layer, name, getattr(first, name))
        return new

    def _with_parts(self, path: str, module: nn.Module) -> nn.Module:
        for name, child in list(module._modules.items()):
            if child is not None:
                module._modules[name] = self.converted(_join(path, name), child)
        return module

    # forward methods that are Python code

    def _traced(self, path: str, module: nn.Module) -> nn.Module:
        seen = self.seen.get(module)
        if seen is None or not seen.calls:
            self.rows.append(Row(path, type(module).__name__, "", note="not called in evaluation"))
            return nn.Identity()
        if not seen.single or seen.example is None:
            raise UnknownBoundError("it takes or returns something other than one tensor")
        program = traced(module, self.seen, self._is_leaf)
        if _is_linear(module, program):
            plain = swapped(_plain_linear(module), self.settings, self._place(module))
            self._note(path, module, plain)
            return self._tied(module, plain.module)
        if program.result is program.input:
            self.rows.append(Row(path, type(module).__name__, "", note="no effect in evaluation"))
            return nn.Identity()
        rewriting = Rewriting(module, program, self.seen, self.settings)
        self.obstacles += [Obstacle(path, type(module).__name__, *refused) for refused in rewriting.refused]
        inlined = self._inlined(module, program)
        for name in program.calls():
            if name not in rewriting.parts:
                owner, _, own_name = name.rpartition(".")
                parent = module.get_submodule(owner)
                parent._modules[own_name] = self.converted(_join(path, name), module.get_submodule(name))
        for name, (was, swap) in rewriting.swaps.items():
            became = "" if swap is None else _names(swap.module)
            self.rows.append(Row(f"{path}:{name}", was, became, note="" if swap is None else swap.note))
        if rewriting.changed or inlined:
            return self._with_code(path, module, program, rewriting.parts, inlined)
        return module

    def _is_leaf(self, module: nn.Module) -> bool:
        """Whether a trace takes a module as a single call; the forward methods of others become part of it."""
        if isinstance(module, LipschitzModule | Container) or swaps(module) or hint(module)[0]:
            return True
        replaced = type(module) in self.settings.replace
        return replaced or (module in self.seen and self.seen[module].single)

    def _inlined(self, module: nn.Module, program: Traced) -> set[str]:
        """The paths of the parts whose forward methods are in the program."""
        parts = dict(module.named_modules())
        owners = {".".join(name.split(".")[:i]) for name in program.calls() for i in range(1, name.count(".") + 1)}
        return {owner for owner in owners if parts[owner] in self.seen}

    def _with_code(
        self, path: str, module: nn.Module, program: Traced, parts: dict[str, nn.Module], inlined: set[str]
    ) -> nn.Module:
        """What runs the program, with the parts that it calls."""
        used = {str(n.target) for n in program.graph.nodes if n.op in ("call_module", "get_attr")}
        for name in sorted(inlined, key=len, reverse=True):
            owner, _, own_name = name.rpartition(".")
            part = module.get_submodule(name)
            module.get_submodule(owner)._modules[own_name] = Parts(part)
        children: dict[str, nn.Module | None] = {}
        for name, child in module._modules.items():
            if any(target == name or target.startswith(f"{name}.") for target in used):
                children[name] = child
            elif child is not None:
                self.rows.append(Row(_join(path, name), type(child).__name__, "", note="not called in evaluation"))
        buffers = dict(module._buffers)
        held = {
            *dict(module.named_parameters(remove_duplicate=False)),
            *dict(module.named_buffers(remove_duplicate=False)),
        }
        constants = program.program.constants
        buffers |= {name: constants[name] for name in used & constants.keys() - held}
        return Rewritten(type(module).__name__, program.graph, {**children, **parts}, dict(module._parameters), buffers)


def _is_linear(module: nn.Module, program: Traced) -> bool:
    """Whether a subclass of nn.Linear computes what that does."""
    calls = [node for node in program.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    if not isinstance(module, nn.Linear) or len(calls) != 1 or calls[0].target is not F.linear:
        return False
    x, *tensors = [argument for argument in calls[0].args if argument is not None]
    names = [node.target for node in tensors if isinstance(node, fx.Node)]
    return x is program.input and names == (["weight"] if module.bias is None else ["weight", "bias"])


def _plain_linear(module: Any) -> nn.Linear:
    plain = nn.Linear(module.in_features, module.out_features, device="meta")
    plain.weight, plain.bias = module.weight, module.bias
    return plain


def _names(module: nn.Module) -> str:
    """What a row calls a module."""
    if type(module) is nn.Sequential:
        return " → ".join(map(_names, module))
    return type(module).__name__


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name
