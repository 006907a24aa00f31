"""What became of each module of a converted model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from torch import nn

from liplayers.text import printable

__all__ = ["Conversion", "Report", "Row"]


@dataclass(frozen=True)
class Row:
    """One module or operation of the model.

    Attributes:
        path: of the module; of an operation, the path of its module, ":" and its name in the module's code.
        was: what it was.
        became: what is in its place; empty for what is gone.
        bound: proven, in the converted model; None for what is not bounded by itself.
        distance: ‖W′ − W‖_F/‖W‖_F of the new weight W′ and the old W, batch normalization folded in; None for what has
            no weight or starts fresh.
        note: what else there is to know.
    """

    path: str
    was: str
    became: str
    bound: float | None = None
    distance: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What `convert` did: `str(report)` is a table, `records()` the same as data.

    Attributes:
        rows: one for each module that computes, and each operation that was rewritten, in the model's order.
        bound: the proven Lipschitz bound of the converted model.
        input_shape: for which it was converted.
    """

    rows: tuple[Row, ...]
    bound: float
    input_shape: tuple[int, ...]

    def records(self) -> list[dict[str, Any]]:
        """One dictionary for each row."""
        return [asdict(row) for row in self.rows]

    def bounded(self, bounds: dict[str, float]) -> Report:
        """With the bounds of modules by path."""
        found = (bounds.get(row.path.replace(":", ".").lstrip(".")) for row in self.rows)
        return replace(self, rows=tuple(replace(row, bound=bound) for row, bound in zip(self.rows, found, strict=True)))

    def __str__(self) -> str:
        head = ("module", "was", "became", "bound", "distance", "note")
        cells = ((r.path, r.was, r.became, _number(r.bound), _number(r.distance), r.note) for r in self.rows)
        lines = [[printable(cell) for cell in line] for line in (head, *cells)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
        return f"{text}\nLipschitz bound for inputs of shape {self.input_shape}: {self.bound:.9g}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


class Conversion(NamedTuple):
    """The certifiable twin of a model, and what became of each of its modules."""

    model: nn.Module
    report: Report
