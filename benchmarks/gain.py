"""How much of a signal deep networks pass on as they are initialised: `python -m benchmarks.gain`, a table and a plot.

The gain is the mean of ‖f(x + h) − f(x)‖/‖h‖ for Gaussian x and a short Gaussian h: the share of a margin that a new
network of Lipschitz constant 1 has left. All sizes are equal; the depth is the number of hidden layers.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from rich.progress import track
from torch import nn

from liplayers import FAMILIES, LBDN, LDLTBlock, LDLTSequential, MaxMin
from liplayers.certification.report import figure_writer, write_outputs
from liplayers.core.checks import check_positive
from liplayers.errors import LipschitzError
from liplayers.layers.ldlt import SCALE

FOLDER = Path(__file__).parent / "results"
DEPTHS = (1, 2, 5, 10, 15, 30)
STEP = 1e-3
SAMPLES = 64
PLOTTED = (
    "cayley, MaxMin",
    "rescaled, MaxMin",
    "cpl",
    "sll",
    "sandwich",
    "gershgorin",
    "ldlt_sequential, ReLU",
    "ldlt_sequential, ReLU, shifted by 1",
    "ldlt_sequential, MaxMin",
    "ldlt",
    "ldlt, V_A = 3 I, V_1 = 0.1 Q",
    "ldlt, V_A = 3 I, V_1 = 1 Q",
    "ldlt, V_A = 10 I, V_1 = 1 Q",
    "ldlt, V_A = 10 I, V_1 = 10 Q",
)

Make = Callable[[int, int], nn.Module]


def _linear(layer: Callable[[int, int], nn.Module], width: int, depth: int) -> nn.Module:
    return nn.Sequential(*(part for _ in range(depth) for part in (layer(width, width), MaxMin())))


def _blocks(block: Callable[[int], nn.Module], width: int, depth: int) -> nn.Module:
    return nn.Sequential(*(block(width) for _ in range(depth)))


def _whole(net: Callable[..., nn.Module], activation: Callable[[], nn.Module], width: int, depth: int) -> nn.Module:
    return net(width, (width,) * depth, activation=activation())


def _ldlt(skip: float, inner: float, width: int) -> nn.Module:
    """A block with V_A = skip·I, V_1 = inner·Q, V_B = 0."""
    block = LDLTBlock(width)
    with torch.no_grad():
        block.raw.mul_(inner / (torch.linalg.matrix_norm(block.raw, 2) * SCALE))
        nn.init.eye_(block.get_parameter("raw_out")).mul_(skip / SCALE)
    return block


def _shifted(shift: float, width: int, depth: int) -> nn.Module:
    """An LDLT-L network whose units are `shift` above their kink for x = 0: b_1 = s, b_l = s − C_l s."""
    network = LDLTSequential(width, (width,) * depth)
    with torch.no_grad():
        assert network.hidden_bias is not None
        inner = network.explicit_weights().inner
        network.hidden_bias.copy_(torch.cat([shift - (i > 0) * shift * C.sum(1) for i, C in enumerate(inner)]))
    return network


def networks() -> dict[str, Make]:
    """By name: every dense family as it comes, and LDLT with other activations and initial sizes."""
    found: dict[str, Make] = {}
    for family in FAMILIES.values():
        if family.linear is not None:
            found[f"{family.name}, MaxMin"] = partial(_linear, family.linear)
        elif family.dense_block in (LBDN, LDLTSequential):
            found[f"{family.name}, ReLU"] = partial(_whole, family.dense_block, nn.ReLU)
        elif family.dense_block is not None:
            found[family.name] = partial(_blocks, family.dense_block)
    found["ldlt_sequential, MaxMin"] = partial(_whole, LDLTSequential, MaxMin)
    found["ldlt, MaxMin"] = partial(_blocks, lambda width: LDLTBlock(width, activation=MaxMin()))
    for shift in (0.5, 1.0, 2.0):
        found[f"ldlt_sequential, ReLU, shifted by {shift:g}"] = partial(_shifted, shift)
    for skip in (1, 3, 10, 30):
        for inner in (0.1, 0.3, 1, 3, 10):
            found[f"ldlt, V_A = {skip} I, V_1 = {inner} Q"] = partial(_blocks, partial(_ldlt, skip, inner))
    return found


@torch.no_grad()
def gain(make: Make, width: int, depth: int) -> float:
    """Of a network with seed 0, in float64.

    >>> round(gain(partial(_linear, FAMILIES["cayley"].linear), width=8, depth=3), 6)
    1.0
    """
    torch.manual_seed(0)
    network = make(width, depth).double().eval()
    x = torch.randn(SAMPLES, width, dtype=torch.float64)
    h = STEP * torch.randn_like(x)
    return ((network(x + h) - network(x)).norm(dim=1) / h.norm(dim=1)).mean().item()


def _plot(table: dict[str, list[float]], depths: Sequence[int], width: int) -> Figure:
    figure = Figure(figsize=(8.2, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for i, name in enumerate(PLOTTED):
        axes.plot(
            depths,
            table[name],
            label=name,
            color=colormaps["tab20"](i),
            marker="osv^DP*X"[i % 8],
            markersize=4,
            linestyle=":" if "V_A" in name else "-",
        )
    axes.set(
        xlabel="hidden layers",
        ylabel="‖f(x + h) − f(x)‖ / ‖h‖",
        yscale="log",
        ylim=(1e-6, 2),
        title=f"signal gain at initialisation, width {width}",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    return figure


def _markdown(table: dict[str, list[float]], depths: Sequence[int], width: int) -> str:
    lines = ["# Signal gain at initialisation", "", (__doc__ or "").split("\n\n", 1)[1].strip(), ""]
    lines += [f"Width {width}, seed 0, float64: `python -m benchmarks.gain`", ""]
    lines += ["| network | " + " | ".join(map(str, depths)) + " |", "|---|" + "--:|" * len(depths)]
    lines += [f"| {name} | " + " | ".join(f"{g:.3g}" for g in gains) + " |" for name, gains in table.items()]
    return "\n".join(lines) + "\n"


def run(width: int, depths: Sequence[int], folder: Path) -> list[Path]:
    """Measure every network and write gain.{md,csv,png}."""
    check_positive(run, width=width)
    table = {
        name: [gain(make, width, depth) for depth in depths]
        for name, make in track(networks().items(), "measuring", transient=True)
    }

    def write_csv(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(["network", *depths])
            rows.writerows([name, *gains] for name, gains in table.items())

    return write_outputs(
        folder,
        {
            "gain.md": lambda path: _write(path, _markdown(table, depths, width)),
            "gain.csv": write_csv,
            "gain.png": figure_writer(_plot(table, depths, width)),
        },
    )


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gain", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--width", type=int, default=64, metavar="N", help="default %(default)s")
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="DIR", help="default: benchmarks/results")
    options = parser.parse_args(arguments)
    try:
        for path in run(options.width, DEPTHS, options.output):
            print(path)
    except LipschitzError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
