"""What a forward method does, recorded as a graph of operations with stand-ins in the place of tensors.

Sizes that do not depend on the batch are plain numbers in a trace, so that a forward may loop over them or compare
them; the size of the batch stays a symbol. To know them, every operation also runs on tensors of the device "meta",
which have shapes and no entries, for two sizes of the batch: what differs between the two depends on it. Parameters and
buffers are stand-ins, too, so that what is computed from them is part of the graph. Operations in place are recorded as
what they are; `graph` counts what they change.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Argument, map_arg
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from liplayers.bounds.twin import private_copy
from liplayers.errors import UnknownBoundError

__all__ = ["IN_PLACE_OPERATORS", "Given", "Program", "trace", "written"]

BATCHES = (11, 13)  # no sizes that a forward would compare with
IN_PLACE_OPERATORS: dict[Any, Any] = {
    getattr(operator, f"i{name}"): getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
} | {operator.iand: operator.and_, operator.ior: operator.or_, operator.ixor: operator.xor}


class Given(NamedTuple):
    """A tensor without entries: its shape without the batch dimension, and its dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(eq=False)
class Program:
    """What a forward method did while it was traced, and the tensors that it met on the way.

    Attributes:
        graph: of operations, calls of modules, and tensors.
        constants: by name, the parameters and buffers under their own, as they were on the traced copy.
        held: the names of parameters and buffers.
        inputs: how the arguments are nested, (args, kwargs).
        settled: names of what depended on a value at the time of the trace; empty where weights may change.
    """

    graph: fx.Graph = field(default_factory=fx.Graph)
    constants: dict[str, Tensor] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)
    inputs: Any = None
    settled: list[str] = field(default_factory=list)

    @property
    def output(self) -> fx.Node:
        return next(iter(reversed(self.graph.nodes)))

    def calls(self) -> list[str]:
        """The paths of the modules that it calls, in order."""
        return [str(node.target) for node in self.graph.nodes if node.op == "call_module"]

    def run(self, inputs: Sequence[Any], call: Callable[..., Any]) -> dict[fx.Node, Any]:
        """The value of each node; call(path, *arguments) gives those of the modules."""
        values: dict[fx.Node, Any] = {}
        left = iter(inputs)
        for node in self.graph.nodes:
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "placeholder":
                values[node] = next(left)
            elif node.op == "get_attr":
                values[node] = self.constants[str(node.target)]
            elif node.op == "call_module":
                values[node] = call(node.target, *args, **kwargs)
            elif node.op == "output":
                values[node] = args[0]
            else:
                values[node] = _computed(node, args, kwargs)
        return values


def _computed(node: fx.Node, args: Any, kwargs: Any) -> Any:
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # type: ignore[operator]
    return getattr(args[0], str(node.target))(*args[1:], **kwargs)


def written(node: fx.Node) -> fx.Node | None:
    """What an operation writes to in place, or None."""
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node) or node.op not in ("call_function", "call_method"):
        return None
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    in_place |= node.target in IN_PLACE_OPERATORS or node.target is operator.setitem or name == "__setitem__"
    return first if in_place or node.kwargs.get("inplace") else None


def _autocast() -> tuple[bool, ...]:
    return tuple(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))


class _Value(fx.Proxy):
    """Stands for a value; `fx.Proxy` would compute x += y as x + y, and has no sizes."""

    tracer: _Tracer

    def __getattr__(self, name: str) -> Any:
        known = self.tracer.attribute(self, name)
        if known is not None:
            return known
        if name.startswith("__") or callable(getattr(Tensor, name, None)):
            return fx.proxy.Attribute(self, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def size(self, dim: int | None = None) -> Any:
        shape = self.tracer.attribute(self, "shape")
        if shape is None or not isinstance(dim, int | None):
            return self.tracer.create_proxy("call_method", "size", (self,) if dim is None else (self, dim), {})
        return shape if dim is None else shape[dim]

    def dim(self) -> Any:
        rank = self.tracer.attribute(self, "ndim")
        return self.tracer.create_proxy("call_method", "dim", (self,), {}) if rank is None else rank

    ndimension = dim

    def item(self) -> Any:
        return self.tracer.settle(self).item()

    def __float__(self) -> float:
        return float(self.tracer.settle(self))

    def __int__(self) -> int:
        return int(self.tracer.settle(self))

    def __len__(self) -> int:
        return self.tracer.length(self)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


def _in_place(operation: Any) -> Callable[[_Value, Any], Any]:
    def record(self: _Value, other: Any) -> Any:
        target = IN_PLACE_OPERATORS[operation] if self.tracer.is_number(self) else operation
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return record


for _operation in IN_PLACE_OPERATORS:
    setattr(_Value, f"__{_operation.__name__.strip('_')}__", _in_place(_operation))


class _Held(_Value):
    """A parameter or buffer, which is in the graph from its first use on."""

    def __init__(self, tracer: _Tracer, name: str) -> None:
        self.tracer = tracer
        self._name = name

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        return self.tracer.held(self._name)


class _Tracer(fx.proxy.GraphAppendingTracer):
    """Unlike fx.Tracer it replaces no method of nn.Module meanwhile, which other threads would run into."""

    def __init__(self, program: Program, device: torch.device, result: Callable[[str, Given], Given | None]) -> None:
        super().__init__(program.graph)
        self.program = program
        self.constants = program.constants
        self.device = device
        self.result = result
        self.autocast = _autocast()
        self.values: dict[fx.Node, Any] = {}  # of what does not depend on the input
        self.shadows: dict[fx.Node, tuple[Any, Any]] = {}  # without entries, for two sizes of the batch
        self.given: dict[str, Given | None] = {}

    # recording

    def proxy(self, node: fx.Node) -> fx.Proxy:
        if _autocast() != self.autocast:
            raise UnknownBoundError("its forward switches autocast, which a trace does not keep")
        target = written(node)
        if target is not None and target in self.values:
            which = f"its tensor {target.target!r}" if target.op == "get_attr" else "a tensor that it made of its own"
            raise UnknownBoundError(
                f"its forward writes in place to {which}: write out of place, or fill one of x.new_zeros(…)"
            )
        self._shadow(node)
        return _Value(node, self)

    def create_arg(self, a: Any) -> Argument:
        if not isinstance(a, Tensor):
            return super().create_arg(a)
        name = next((name for name, tensor in self.constants.items() if tensor is a), f"constant_{len(self.constants)}")
        self.constants[name] = a
        if name not in self.program.held:
            self.program.settled.append(name)
        return self.held(name)

    def held(self, name: str) -> fx.Node:
        """The node of a constant."""
        known = (node for node in self.graph.nodes if node.op == "get_attr" and node.target == name)
        node = next(known, None)
        if node is None:
            node = self.create_node("get_attr", name, (), {})
            self._shadow(node)
        return node

    def call(self, path: str, in_place: bool, *args: Any, **kwargs: Any) -> fx.Proxy:
        result = self.create_proxy("call_module", path, args, kwargs)
        given = (*args, *kwargs.values())
        if in_place and len(given) == 1 and isinstance(given[0], fx.Proxy):  # a module that writes to what it is given
            return self.create_proxy("call_method", "copy_", (given[0], result), {})
        return result

    # what is known of values

    def _shadow(self, node: fx.Node) -> None:
        given = self.given.get(str(node.target)) if node.op == "placeholder" else None
        try:
            if given is not None:
                first, second = (torch.empty(n, *given.shape, dtype=given.dtype, device="meta") for n in BATCHES)
                self.shadows[node] = first, second
            elif node.op == "get_attr":
                self.values[node] = self.constants[str(node.target)]
            elif node.op in ("call_function", "call_method") and all(n in self.values for n in node.all_input_nodes):
                args, kwargs = map_arg((node.args, node.kwargs), self.values.__getitem__)
                self.values[node] = _computed(node, args, kwargs)
            elif node.op != "placeholder":
                self.shadows[node] = self._shadowed(node, 0), self._shadowed(node, 1)
        except Exception:  # what it is stays unknown; the trial finds what does not run
            return

    def _shadowed(self, node: fx.Node, which: int) -> Any:
        def of(other: fx.Node) -> Any:
            return self.values[other] if other in self.values else self.shadows[other][which]

        args, kwargs = tree_map(_without_entries, map_arg((node.args, node.kwargs), of))
        if node.op != "call_module":
            return tree_map(_without_entries, _computed(node, args, kwargs))
        x = next(iter((*args, *kwargs.values())))
        found = self.result(str(node.target), Given(tuple(x.shape[1:]), x.dtype))
        if found is None:
            raise KeyError(node.target)
        return torch.empty(len(x), *found.shape, dtype=found.dtype, device="meta")

    def _known(self, value: _Value) -> tuple[Any, Any] | None:
        node = value.node
        return (self.values[node],) * 2 if node in self.values else self.shadows.get(node)  # type: ignore[return-value]

    def attribute(self, value: _Value, name: str) -> Any:
        """The shape, rank, dtype or device of a value, or None where it is not known."""
        if name not in ("shape", "ndim", "dtype", "device"):
            return None
        first, second = self._known(value) or (None, None)
        if not isinstance(first, Tensor) or not isinstance(second, Tensor) or first.dim() != second.dim():
            return None
        if name == "shape":
            return tuple(self._size(value, d, *sizes) for d, sizes in enumerate(zip(first.shape, second.shape)))  # noqa: B905
        if name == "dtype" and any(self.autocast):
            return None  # tensors without entries do not know of it
        return {"ndim": first.dim(), "dtype": first.dtype, "device": self.device}[name]

    def _size(self, value: _Value, dim: int, first: int, second: int) -> Any:
        return first if first == second else self.create_proxy("call_method", "size", (value, dim), {})

    def is_number(self, value: _Value) -> bool:
        first, _ = self._known(value) or (None, None)
        return isinstance(first, (int, float))

    def length(self, value: _Value) -> int:
        first, second = self._known(value) or ((), ())
        if isinstance(first, (tuple, list, Tensor)) and len(first) == len(second) > 0:
            return len(first)
        raise UnknownBoundError("its forward asks for the length of a value that depends on the batch")

    def settle(self, value: _Value) -> Tensor:
        """The value of what does not depend on the input, on which the rest of the trace may depend."""
        if value.node not in self.values:
            raise UnknownBoundError("its forward makes a Python number of a value that depends on its input")
        self.program.settled.append(value.node.name)
        return self.values[value.node]

    def iter(self, obj: Any) -> Iterator[Any]:
        first, _ = self._known(obj) or (None, None)
        if isinstance(first, (tuple, list, Tensor)):
            return iter([obj[i] for i in range(self.length(obj))])
        return super().iter(obj)

    def to_bool(self, obj: Any) -> bool:
        if obj.node in self.values:
            return bool(self.settle(obj))
        # sizes that agree for two sizes of the batch are the same
        expected = {operator.eq: True, operator.ne: False}.get(obj.node.target)
        if expected is not None and self.shadows.get(obj.node) == (expected, expected):
            return expected
        return super().to_bool(obj)


def _without_entries(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.to("meta")
    return torch.device("meta") if isinstance(x, torch.device) else x


def trace(
    module: nn.Module,
    is_leaf: Callable[[nn.Module], bool],
    inputs: Any = None,
    result: Callable[[str, Given], Given | None] = lambda path, given: None,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> Program:
    """The program of `module.forward`, with the modules for which `is_leaf` as single calls.

    It is traced on a copy, since that runs the user's code, which may keep what it was given.

    Args:
        module: with a forward that takes tensors only.
        is_leaf: whether a module within it is taken as one call.
        inputs: (args, kwargs) with a `Given` for each tensor, or None where the shapes are not known, of one argument.
        result: (path of a leaf, what it is given) → what it returns, or None where that is not known.
        device: of the inputs.

    Raises:
        UnknownBoundError: it cannot be traced.
    """
    copied, program = private_copy(module), Program()
    tracer = _Tracer(program, device, result)
    for path, part in copied.named_modules():
        if part is not copied and is_leaf(part):
            in_place = bool(getattr(part, "inplace", False))
            part._compiled_call_impl = partial(tracer.call, path, in_place)  # what nn.Module calls where there is one
    for path, part in copied.named_modules():
        if _reads_its_tensors(part, copied, is_leaf):
            _hold(tracer, path, part)
    try:
        with torch.no_grad():
            args, kwargs = _placeholders(tracer, ((None,), {}) if inputs is None else inputs)
            output = copied.forward(*args, **kwargs)
            program.graph.output(tracer.create_arg(output))
    except UnknownBoundError:
        raise
    except Exception as error:  # anything may come out of the user's code
        raise UnknownBoundError(f"its forward cannot be traced ({' '.join(str(error).split())})") from None
    return program


def _reads_its_tensors(part: nn.Module, root: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> bool:
    """Whether a traced forward may read the tensors of a module: of what is traced itself, and of torch's layers."""
    return part is root or not is_leaf(part) or type(part).__module__.startswith("torch.nn.")


def _hold(tracer: _Tracer, path: str, part: nn.Module) -> None:
    for tensors in (part._parameters, part._buffers):
        for name, tensor in tensors.items():
            if tensor is not None:
                full = f"{path}.{name}" if path else name
                tracer.constants[full] = tensor.detach()
                tracer.program.held.add(full)
                tensors[name] = _Held(tracer, full)  # type: ignore[assignment]


def _placeholders(tracer: _Tracer, inputs: Any) -> Any:
    leaves, structure = tree_flatten(inputs, is_leaf=lambda x: x is None or isinstance(x, Given))
    tracer.program.inputs = structure
    names = [f"x{i}" if i else "x" for i in range(len(leaves))]
    tracer.given = dict(zip(names, leaves, strict=True))
    return tree_unflatten([tracer.create_proxy("placeholder", name, (), {}) for name in names], structure)
