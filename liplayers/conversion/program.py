"""The forward method of a module as a graph that can be rewritten, and a module that runs such a graph."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

import liplayers
from liplayers.bounds.trace import Given, Program, trace
from liplayers.conversion.survey import Seen
from liplayers.errors import UnknownBoundError

__all__ = ["Parts", "Rewritten", "Traced", "traced"]

_LEAF = "_liplayers_single_call"


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
    """The parts of a module whose forward is in the code of the one that it is in.

    Args:
        module: whose parts they are.
    """

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
        program: of the module; rewriting changes its graph.
        values: of each node, for the example.
        depends: the nodes that depend on the input, other than on its shape.
    """

    program: Program
    values: dict[fx.Node, Any] = field(default_factory=dict)
    depends: set[fx.Node] = field(default_factory=set)

    @property
    def graph(self) -> fx.Graph:
        return self.program.graph

    @property
    def input(self) -> fx.Node:
        return next(node for node in self.graph.nodes if node.op == "placeholder")

    @property
    def result(self) -> Any:
        """The node that is returned."""
        return self.program.output.args[0]

    def calls(self) -> list[str]:
        """The paths of the modules that it calls, in order, each once."""
        return list(dict.fromkeys(self.program.calls()))

    def run(self, x: Tensor, module: nn.Module) -> Any:
        """The result for an input, with the modules of one that has the same paths."""

        def call(path: str, *args: Any, **kwargs: Any) -> Any:
            return module.get_submodule(path)(*args, **kwargs)

        self.values = self.program.run((x,), call)
        for node, value in self.values.items():
            tensors = any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))
            if node is self.input or (tensors and not self.depends.isdisjoint(node.all_input_nodes)):
                self.depends.add(node)
        return self.values[self.program.output]


def traced(module: nn.Module, seen: dict[nn.Module, Seen], is_leaf: Callable[[nn.Module], bool]) -> Traced:
    """The program of a module that takes and returns one tensor, in evaluation mode, compared with what it computed.

    Args:
        module: of a copy that nobody else has.
        seen: of the run that it is compared with.
        is_leaf: which modules are single calls; the forward methods of the others become part of the program.

    Raises:
        UnknownBoundError: it cannot be traced, named by the line, or computes something else.
    """
    example = seen[module].example
    assert example is not None
    x, expected = example

    def result(path: str, given: Given) -> Given | None:
        known = seen[module.get_submodule(path)].example
        fits = known is not None and tuple(known[0].shape[1:]) == given.shape
        return Given(tuple(known[1].shape[1:]), known[1].dtype) if known is not None and fits else None

    leaves = [part for part in module.modules() if part is not module and is_leaf(part)]
    for part in leaves:
        vars(part)[_LEAF] = True  # a trace works on a copy
    try:
        inputs: Any = ((Given(tuple(x.shape[1:]), x.dtype),), {})
        found = Traced(trace(module, lambda part: _LEAF in vars(part), inputs, result, x.device))
    except UnknownBoundError as error:
        where = "" if error.__context__ is None else f" at {_line(error.__context__)}"
        raise UnknownBoundError(
            f"{error}{where}: write it without conditions on values, or replace the module"
        ) from None
    finally:
        for part in leaves:
            del vars(part)[_LEAF]
    if not _computes(found, module, x, expected):
        raise UnknownBoundError(
            "its forward computes something else than its trace: it may ask for the type of its input, or change what "
            "it uses again: write it as a function of one tensor, or replace the module"
        )
    return found


def _computes(found: Traced, module: nn.Module, x: Tensor, expected: Tensor) -> bool:
    """Whether the program gives what the module gave."""
    with torch.no_grad():
        try:
            result = found.run(x.clone(), module)
        except Exception:  # whatever a program that is not this module's may do
            return False
    same = isinstance(result, Tensor) and result.shape == expected.shape
    return same and torch.allclose(result, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def _line(error: BaseException) -> str:
    """The line of the user's code that raised."""
    ours = tuple(str(Path(package.__file__ or "").parent) for package in (torch, liplayers))
    frames = traceback.extract_tb(error.__traceback__)
    found = next((frame for frame in reversed(frames) if not frame.filename.startswith(ours)), frames[-1])
    return f"{found.filename}:{found.lineno}: {found.line}"
