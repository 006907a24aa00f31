"""What is known of every part of a model, before any norm is computed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import fx, nn

from liplayers.bounds.advice import GENERAL, advice
from liplayers.bounds.composition import _Part, _Walk, check_finite, is_container, is_ours
from liplayers.bounds.graph import graph_bounds, name_of
from liplayers.bounds.inputs import InputShape
from liplayers.bounds.operations import operation_of
from liplayers.bounds.torch_modules import torch_rule
from liplayers.errors import LipschitzError, NonFiniteError, Obstacle

__all__ = ["Explained", "Explanation", "explain"]

LATER = "lipschitz_bound computes it"


@dataclass(frozen=True)
class Explained:
    """A module or operation of a model.

    Attributes:
        path: of the module, or of the module whose forward has the operation; empty for the model.
        name: the type of the module, or the name of the operation.
        kind: "module" or "operation".
        bound: its own, if it is known without computing the norm of a weight, or was asked for.
        how: what the bound is of, or how bounds combine in it; "" for an obstacle.
        reason: why there is no bound; "" where there is one.
        instead: what to write instead of an obstacle.
    """

    path: str
    name: str
    kind: str
    bound: float | None = None
    how: str = ""
    reason: str = ""
    instead: str = ""

    @property
    def ok(self) -> bool:
        """Whether it has a bound."""
        return not self.reason


@dataclass(frozen=True)
class Explanation:
    """All modules and operations of a model in the order that they run in, true if the model has a bound.

    Attributes:
        rows: the modules and operations.
        obstacles: all that is in the way of a bound, as the error of `lipschitz_bound` has them.
        bound: of the whole, where norms were asked for and nothing is in the way.
    """

    rows: tuple[Explained, ...]
    obstacles: tuple[Obstacle, ...]
    bound: float | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is in the way of a bound."""
        return not self.obstacles

    def __bool__(self) -> bool:
        return self.ok

    def to_frame(self) -> Any:
        """The rows as a pandas.DataFrame."""
        import pandas

        return pandas.DataFrame([asdict(row) for row in self.rows])

    def __str__(self) -> str:
        """A table in plain text, with the obstacles below it."""
        cells = [("path", "what", "bound", "")]
        for row in self.rows:
            bound = "none" if not row.ok else "" if row.bound is None else f"{row.bound:.6g}"
            cells.append((row.path or "the model", row.name, bound, row.reason or row.how))
        widths = [max(len(row[i]) for row in cells) for i in range(3)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]).rstrip() for row in cells
        ]
        count = len(self.obstacles)
        lines += ["", "nothing is in the way of a bound" if not count else f"{count} obstacle{'s' * (count > 1)}"]
        return "\n".join([*lines, *map(str, self.obstacles)])


def explain(model: nn.Module, input_shape: InputShape, *, norms: bool = False) -> Explanation:
    """Every module and operation of a model with its bound, or why it has none and what to write instead.

    It takes a few forward passes; no norm of a weight is computed unless asked for.

    Args:
        model: any module.
        input_shape: of one input, without the batch dimension; of several inputs a tuple of shapes, or a dictionary by
            the names of the arguments.
        norms: whether to compute the norms of the weights, where nothing is in the way.

    >>> found = explain(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), (4,))
    >>> bool(found), found.obstacles[0].path, [row.name for row in found.rows]
    (False, '1', ['Linear', 'LayerNorm'])
    """
    walk = _Walk(model, input_shape, explains=True)
    obstacles = [obstacle for obstacle, _ in walk.obstacles()]
    obstacles += [Obstacle("", type(walk.model).__name__, str(e)) for e in (walk.failure, _finite(walk.model)) if e]
    norms = norms and not obstacles
    rows = _rows(walk, walk.root, norms)
    known = {(row.path, row.reason) for row in rows}
    rows += [  # of what does not run as a whole
        Explained(path, kind, "module", None, "", reason, instead)
        for path, kind, reason, instead in obstacles
        if (path, reason) not in known
    ]
    return Explanation(tuple(rows), tuple(obstacles), walk.bound(walk.root) if norms else None)


def _finite(model: nn.Module) -> LipschitzError | None:
    try:
        check_finite(model, "")
    except NonFiniteError as error:
        return error
    return None


def _rows(walk: _Walk, part: _Part, norms: bool) -> list[Explained]:
    path, kind = part.path, type(part.module).__name__
    errors = [str(error) for error in walk.refused.get(path, ())]
    if part.program is not None:
        return _program(walk, part, norms)
    if errors and not part.children:
        reason, instead = advice(part.module)
        return [Explained(path, kind, "module", None, "", e, instead if e == reason else GENERAL) for e in errors]
    rows = [Explained(path, kind, "module", None, "", e, GENERAL) for e in errors]
    if is_container(part.module):
        rows.append(Explained(path, kind, "module", walk.bound(part) if norms else None, "of its branches"))
    if not part.children and not part.is_sequence:
        rows.append(_module(walk, part, norms))
    return rows + [row for child in part.children for row in _rows(walk, child, norms)]


def _module(walk: _Walk, part: _Part, norms: bool) -> Explained:
    path, module = part.path, part.module
    bound: float | None = None
    if norms:
        bound = walk.bound(part)
    elif not is_ours(module):
        found = [torch_rule(module, shape) for shape in walk.shapes.get(module, {None})]
        bound = None if any(not isinstance(b, float) for b in found) else max(found, default=None)  # type: ignore
    elif not [*module.parameters()]:
        bound = walk.bound(part)
    return Explained(path, type(module).__name__, "module", bound, "" if bound is not None else LATER)


_COMBINED = {
    "add": "sum", "sub": "sum", "rsub": "sum", "cat": "√ of the sum of squares", "stack": "√ of the sum of squares",
    "maximum": "√ of the sum of squares", "minimum": "√ of the sum of squares", "setitem": "√ of the sum of squares",
}  # fmt: skip
_PLAIN = {"getitem", "getattr"}


def _program(walk: _Walk, part: _Part, norms: bool) -> list[Explained]:
    program = part.program
    assert program is not None
    rows = [
        Explained(part.path, type(part.module).__name__, "module", None, "", str(e), GENERAL)
        for e in walk.refused.get(part.path, ())
        if str(e) not in walk.refused_nodes.values()
    ]
    shapes = (part.shapes or [None])[0]
    bounds = graph_bounds(program, walk.leaf(part), shapes, walk.constants(part), [], norms=norms)
    seen: set[str] = set()
    for node in program.graph.nodes:
        if node.op == "call_module" and str(node.target) not in seen:
            seen.add(str(node.target))
            rows += _rows(walk, walk.child(part, str(node.target)), norms)
        elif node in walk.refused_nodes:
            reason, instead = walk.refused_nodes[node], advice(operation=name_of(node))[1] or GENERAL
            rows.append(Explained(part.path, name_of(node), "operation", None, "", reason, instead))
        elif node.op in ("call_function", "call_method") and node in bounds.given:
            rows += _operation(part, node, bounds.own.get(node))
    return rows


def _operation(part: _Part, node: fx.Node, own: float | None) -> list[Explained]:
    name = operation_of(node) or name_of(node)
    if name in _PLAIN:
        return []
    if name in _COMBINED:
        return [Explained(part.path, name, "operation", None, _COMBINED[name])]
    deferred = name.startswith(("conv", "linear", "matmul"))
    return [Explained(part.path, name, "operation", None if deferred else own, LATER if deferred else "")]
