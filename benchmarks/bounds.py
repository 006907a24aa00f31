"""The proven bound of every registered family against the norm of the map: `python -m benchmarks.bounds`, a table.

Each layer is frozen in float32 and evaluated in float64, as certificates do. The norm is that of the dense Jacobian at
a random input: the norm of the map for linear layers, a lower bound of the Lipschitz constant for blocks. Upper is the
proven bound of the weights as they are stored; seconds is the time that its proof takes. Where a layer runs one matrix
or kernel, lower is proven, too; a convolution's bounds are of its supremum over images, which the image of the table
may stay below. Rounding is the proven error of the output for inputs of norm 1. Parameters are moved at random by 10 %
of their norm first.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.progress import track
from torch import nn

from benchmarks.layers import perturb_
from benchmarks.plain import PLAIN
from benchmarks.sizes import Size, build
from liplayers import FAMILIES, freeze, lipschitz_bound
from liplayers.bounds import norm_table
from liplayers.bounds.rounding import RoundingAnalysis
from liplayers.certification.report import write_outputs
from liplayers.errors import ArgumentError, LipschitzError

FOLDER = Path(__file__).parent / "results"
Row = dict[str, Any]


def _sizes(features: int, channels: int, image: int) -> dict[str, list[Size]]:
    """By role; shapes are of one input, without the batch."""
    shape, kernel = (channels, image, image), (channels, channels, 3)
    pixels = f"{channels} channels, {image}×{image}"
    return {
        "linear": [Size(f"{features} features", (features,), (features, features))],
        "dense_block": [Size(f"{features} features", (features,), (features,))],
        "conv": [Size(f"{pixels}, 3×3, stride {s}", shape, kernel, {"padding": 1, "stride": s}) for s in (1, 2)],
        "conv_transpose": [Size(f"{pixels}, 3×3, stride 1", shape, kernel, {"padding": 1})],
        "conv_block": [Size(pixels, shape, (channels,), {"padding_mode": "zeros"})],
    }


def _layers(sizes: dict[str, list[Size]]) -> Iterator[tuple[str, str, Size, nn.Module]]:
    """(family, role, size, layer); torch's own layers first, and not what a family refuses."""
    for role in ("linear", "conv"):
        for size in sizes[role]:
            yield "torch", role, size, PLAIN[role](*size.arguments, **size.options)
    for name, family in FAMILIES.items():
        for role in sizes:
            if getattr(family, role) is not None:
                for size in sizes[role]:
                    with suppress(ArgumentError):
                        yield name, role, size, build(name, role, size)


def _jacobian_norm(layer: nn.Module, shape: tuple[int, ...]) -> float:
    x = torch.randn(1, *shape, dtype=torch.float64)
    batch = x.expand(layer(x).numel(), *shape).clone().requires_grad_()
    (rows,) = torch.autograd.grad(layer(batch).flatten(1).diagonal().sum(), batch)
    return torch.linalg.matrix_norm(rows.flatten(1), 2).item()


def measure(family: str, role: str, size: Size, layer: nn.Module) -> Row:
    """The row of one layer.

    >>> row = measure("torch", "linear", Size("4 features", (4,), (4, 4)), nn.Linear(4, 4))
    >>> row["lower"] <= row["norm"] * 1.000001 and row["norm"] <= row["upper"] * 1.000001
    True
    """
    perturb_(layer.eval())
    frozen = freeze(layer, size.input_shape).double()
    row: Row = {"family": family, "role": role, "size": size.name}
    row["norm"] = _jacobian_norm(frozen, size.input_shape)
    start = time.perf_counter()
    weights = norm_table(frozen)
    if len(weights) == 1 and weights[0].path == "":
        row |= {k: getattr(weights[0], k) for k in ("lower", "upper", "method")}
    else:
        row |= {"lower": None, "upper": lipschitz_bound(frozen, size.input_shape), "method": type(frozen).__name__}
    row["seconds"] = time.perf_counter() - start
    row["rounding"] = RoundingAnalysis(frozen, size.input_shape, {"": row["upper"]}).at(1.0).error
    return row


def _markdown(table: pd.DataFrame) -> str:
    lines = ["# Proven bounds", "", (__doc__ or "").split("\n\n", 1)[1].strip()]
    for (role, size), rows in table.groupby(["role", "size"], sort=False):
        lines += [
            "",
            f"## {role}: {size}",
            "",
            "| family | norm | lower | upper | upper/norm − 1 | method | seconds | rounding |",
        ]
        lines += ["|---|--:|--:|--:|--:|---|--:|--:|"]
        for row in rows.itertuples():
            lower = "–" if pd.isna(row.lower) else f"{row.lower:.9f}"
            excess = f"{row.upper / row.norm - 1:.1e}"
            cells = [row.family, f"{row.norm:.9f}", lower, f"{row.upper:.9f}", excess, row.method, f"{row.seconds:.3g}"]
            cells.append(f"{row.rounding:.1e}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def run(sizes: dict[str, list[Size]], folder: Path, name: str = "bounds") -> list[Path]:
    """Measure every layer and write name.md and name.csv."""
    torch.manual_seed(0)
    layers = track(list(_layers(sizes)), "measuring", transient=True)
    table = pd.DataFrame([measure(*layer) for layer in layers])
    text = _markdown(table)

    def write_markdown(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    return write_outputs(
        folder, {f"{name}.md": write_markdown, f"{name}.csv": lambda path: table.to_csv(path, index=False)}
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bounds", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--features", type=int, default=256, metavar="N", help="default %(default)s")
    parser.add_argument("--channels", type=int, default=16, metavar="N", help="default %(default)s")
    parser.add_argument(
        "--image", type=int, default=12, metavar="N", help="height and width, even; default %(default)s"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="DIR", help="default: benchmarks/results")
    options = parser.parse_args(arguments)
    sizes = _sizes(16, 4, 6) if options.quick else _sizes(options.features, options.channels, options.image)
    try:
        for path in run(sizes, options.output, "bounds_quick" if options.quick else "bounds"):
            print(path)
    except LipschitzError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
