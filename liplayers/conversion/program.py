"""The forward method of a module as a graph that can be rewritten, and a module that runs such a graph."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Argument, map_arg
from torch.utils._pytree import tree_leaves

import liplayers
from liplayers.conversion.survey import Seen
from liplayers.errors import UnknownBoundError

__all__ = ["Parts", "Rewritten", "Traced", "traced"]


class Rewritten(nn.Module):
    """A module with the parts of another, whose forward is the code of a graph; `code` shows it.

    It copies, pickles and prints as any module, under the name of the class that it stands for.

    Args:
        name: of that class.
        graph: its targets are the paths of parts.
        modules: the children by name.
        parameters: by name.
        buffers: by name.
    """

    def __init__(
        self,
        name: str,
        graph: fx.Graph,
        modules: dict[str, nn.Module | None],
        parameters: dict[str, nn.Parameter | None],
        buffers: dict[str, Tensor | None],
    ) -> None:
        super().__init__()
        self.name = name
        self.graph = graph
        self._modules.update(modules)
        for key, parameter in parameters.items():
            self.register_parameter(key, parameter)
        for key, buffer in buffers.items():
            self.register_buffer(key, buffer)
        self._compile()

    def _compile(self) -> None:
        python = self.graph.python_code("self")
        self.code = python.src
        names = dict(python.globals)
        exec(compile(self.code, f"<{self.name}.forward of liplayers.convert>", "exec"), names)
        self._run = names["forward"]

    def forward(self, x: Tensor) -> Tensor:
        return self._run(self, x)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("_run", "code")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._compile()

    def _get_name(self) -> str:
        return self.name


class Parts(nn.Module):
    """The parts of a module whose forward is in the code of the one that it is in."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.name = type(module).__name__
        for held in ("_modules", "_parameters", "_buffers"):
            getattr(self, held).update(getattr(module, held))

    def _get_name(self) -> str:
        return self.name


@dataclass(eq=False)
class Traced:
    """What a module did with one example.

    Attributes:
        graph: of operations, calls of modules by path, and tensors by name.
        constants: the tensors by name: parameters and buffers under their own.
        values: of each node, for the example.
        depends: the nodes that depend on the input, other than on its shape.
    """

    graph: fx.Graph = field(default_factory=fx.Graph)
    constants: dict[str, Tensor] = field(default_factory=dict)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    depends: set[fx.Node] = field(default_factory=set)

    @property
    def input(self) -> fx.Node:
        return next(iter(self.graph.nodes))

    @property
    def output(self) -> fx.Node:
        return next(iter(reversed(self.graph.nodes)))

    def calls(self) -> list[str]:
        """The paths of the modules that it calls, in order, each once."""
        return list(dict.fromkeys(str(node.target) for node in self.graph.nodes if node.op == "call_module"))

    def run(self, x: Tensor, module: nn.Module) -> Tensor:
        """Its result, with the modules of one that has the same paths; keeps the values."""
        for node in self.graph.nodes:
            args, kwargs = map_arg((node.args, node.kwargs), self.values.__getitem__)
            target: Any = node.target
            if node.op == "placeholder":
                value: Any = x
            elif node.op == "get_attr":
                value = self.constants[target]
            elif node.op == "call_function":
                value = target(*args, **kwargs)
            elif node.op == "call_method":
                value = getattr(args[0], target)(*args[1:], **kwargs)
            elif node.op == "call_module":
                value = module.get_submodule(target)(*args, **kwargs)
            else:
                value = args[0]
            self.values[node] = value
            tensors = any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))
            if node.op == "placeholder" or (tensors and not self.depends.isdisjoint(node.all_input_nodes)):
                self.depends.add(node)
        return self.values[self.output]


class _Tracer(fx.proxy.GraphAppendingTracer):
    """It replaces no method of nn.Module meanwhile, which other threads would run into."""

    def __init__(self, program: Traced) -> None:
        super().__init__(program.graph)
        self.constants = program.constants

    def create_arg(self, a: Any) -> Argument:
        if not isinstance(a, Tensor):
            return super().create_arg(a)
        known = (name for name, tensor in self.constants.items() if tensor is a)
        return self.held(next(known, f"constant_{len(self.constants)}"), a).node

    def held(self, name: str, tensor: Tensor) -> fx.Proxy:
        self.constants[name] = tensor
        return self.create_proxy("get_attr", name, (), {})

    def call(self, path: str, *args: Any, **kwargs: Any) -> fx.Proxy:
        return self.create_proxy("call_module", path, args, kwargs)


def traced(module: nn.Module, seen: dict[nn.Module, Seen], is_leaf: Callable[[nn.Module], bool]) -> Traced:
    """The program of a module that takes and returns one tensor, in evaluation mode, compared with what it computed.

    Args:
        module: of a copy that nobody else has.
        seen: of the run that it is compared with.
        is_leaf: which modules are single calls; the forward methods of the others become part of the program.

    Raises:
        UnknownBoundError: it cannot be traced, named by the line, or computes something else.
    """
    program = Traced()
    tracer = _Tracer(program)
    parts = dict(module.named_modules())
    leaves = {path: part for path, part in parts.items() if path and is_leaf(part)}
    own = {path: part for path, part in parts.items() if not any(_within(path, leaf) for leaf in leaves)}
    x = tracer.create_proxy("placeholder", "x", (), {})
    try:
        for path, part in leaves.items():
            part._compiled_call_impl = partial(tracer.call, path)  # type: ignore[assignment]
        for path, part in own.items():  # what is computed from them is part of the program, too
            for name, tensor in [*part._parameters.items(), *part._buffers.items()]:
                if tensor is not None:
                    vars(part)[name] = tracer.held(f"{path}.{name}" if path else name, tensor)
        with torch.no_grad():
            program.graph.output(tracer.create_arg(module.forward(x)))
    except Exception as error:  # anything may come out of the user's code
        raise UnknownBoundError(
            f"its forward cannot be traced at {_line(error)} ({' '.join(str(error).split())}): write it without "
            f"conditions on values and without writing into parts of tensors, or replace the module"
        ) from None
    finally:
        for part in leaves.values():
            vars(part).pop("_compiled_call_impl", None)
        for part in own.values():
            for name in [*part._parameters, *part._buffers]:
                vars(part).pop(name, None)
    for node in list(program.graph.nodes):
        if node.op == "get_attr" and not node.users:
            program.graph.erase_node(node)
    _compare(program, module, seen[module].example)
    return program


def _within(path: str, owner: str) -> bool:
    return path == owner or path.startswith(f"{owner}.")


def _line(error: Exception) -> str:
    """The line of the user's code that raised."""
    ours = tuple(str(Path(package.__file__ or "").parent) for package in (torch, liplayers))
    frames = traceback.extract_tb(error.__traceback__)
    found = next((frame for frame in reversed(frames) if not frame.filename.startswith(ours)), frames[-1])
    return f"{found.filename}:{found.lineno}: {found.line}"


def _compare(program: Traced, module: nn.Module, example: tuple[Tensor, Tensor] | None) -> None:
    """Run the program on the example."""
    assert example is not None
    x, expected = example
    with torch.no_grad():
        try:
            result = program.run(x.clone(), module)
            same = isinstance(result, Tensor) and result.shape == expected.shape
            same = same and torch.allclose(result, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        except Exception:  # whatever a program that is not this module's may do
            same = False
    if not same:
        raise UnknownBoundError(
            "its forward computes something else than its trace: it may change a tensor in place that it uses again, "
            "or ask for the type of its input: write it as a function of one tensor, or replace the module"
        )
