"""Every registered family against torch's plain layers and, with --peers, against the same layers of other libraries.

    python -m benchmarks.layers                         # every family, CPU and, if there is one, CUDA
    python -m benchmarks.layers --quick                 # tiny sizes: does it run?
    python -m benchmarks.layers --family aol bro --role conv --peers

Families and roles come from liplayers' registry; a family that is registered is measured, and needs no line here.
Measured for each family, role and size, always as a ratio to torch's plain layer in the same run:

- *training step*: weight, forward and backward pass in train mode, gradients with respect to input and parameters;
- *evaluation*: forward pass in eval mode under no_grad, the weight cached by an earlier one;
- *memory*: the most bytes that a training step holds at one time beyond parameters, input and output gradient
  (`benchmarks.timing.peak_memory` says what is counted).

The plain layer has the same arguments (nn.Linear, nn.Conv2d with the same padding mode, nn.ConvTranspose2d) or, for
blocks, is a plain residual block with as many multiply-adds as ours runs (`benchmarks.plain.plain_block`).

Rounds run all layers of a size one after another, plain ones first; a ratio is the median over rounds of the ratio
within a round, so what slows the machine for a while slows both sides. Parameters are moved at random by 10 % of their
norm first: no layer profits from its special initial state. Threads and precision are as torch has them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.peers import PEERS, Peer, missing_packages
from benchmarks.plain import PLAIN, plain_block
from benchmarks.report import FOLDER, results_tables, write_results
from benchmarks.sizes import QUICK_SIZES, SIZES, Size, build
from benchmarks.timing import interleaved, machine, peak_memory, quartiles
from liplayers import FAMILIES
from liplayers.certification.report import write_outputs
from liplayers.core.registry import ROLES
from liplayers.errors import ArgumentError, LipschitzError, ShapeError, UnknownNameError

Row = dict[str, Any]


REPEATS, QUICK_REPEATS = 15, 5
PERTURBATION = 0.1


@torch.no_grad()
def perturb_(layer: nn.Module) -> None:
    """Move each parameter in a random direction by a tenth of its norm."""
    for p in layer.parameters():
        if p.requires_grad:
            noise = torch.randn_like(p)
            p.add_(noise * (PERTURBATION * torch.linalg.vector_norm(p) / torch.linalg.vector_norm(noise)))


class Contender:
    """A layer on its device with what its two steps need; the constructor runs both once.

    Args:
        layer: the module to train, in its initial state.
        x: the input batch, which requires a gradient.
        export: from the trained layer to what runs in evaluation.
    """

    def __init__(self, layer: nn.Module, x: Tensor, export: Callable[[nn.Module], nn.Module] = lambda m: m) -> None:
        self.x = x
        self.layer = layer.to(x.device).train()
        perturb_(self.layer)
        self.inputs = [x, *(p for p in self.layer.parameters() if p.requires_grad)]
        self.gradient = torch.randn_like(self.layer(x).detach())
        self.train_step()
        self.deployed = export(self.layer).to(x.device).eval()
        self.eval_step()
        self.layer.train()

    def train_step(self) -> None:
        """Weight, forward and backward pass."""
        with parametrize.cached():  # for the peers; ours compute their weight once as they are
            y = self.layer(self.x)
            torch.autograd.grad(y, self.inputs, self.gradient, allow_unused=True)

    @torch.no_grad()
    def eval_step(self) -> None:
        """Forward pass."""
        self.deployed(self.x)


# What is measured -----------------------------------------------------------------------------------------------------

Tick = Callable[[], object]


class Contest:
    """All layers of one role and size: torch's plain ones, ours, and the peers', with who is compared with whom."""

    def __init__(self, role: str, size: Size, device: torch.device) -> None:
        self.role, self.size = role, size
        self.device = device
        self.x = torch.randn(size.input_shape, device=device, requires_grad=True)
        self.plain: dict[str, Contender] = {}
        self.others: dict[str, Contender] = {}
        self.pairs: list[tuple[Row, str, str]] = []  # row to fill, key of ours, key of the other
        self.rows: list[Row] = []

    def enter(self, family: str, peers: Sequence[Peer]) -> None:
        """Add a family's layer, the plain layer that it is compared with, and the peers' layers of the same kind."""
        torch.manual_seed(0)
        try:
            layer = build(family, self.role, self.size)
            ours = self.others[family] = Contender(layer, self.x)
        except (ArgumentError, ShapeError, torch.OutOfMemoryError) as error:
            self._row(family, "torch", refused=_one_line(error))
            return
        plain = self._plain_for(layer)
        self.pairs.append((self._row(family, plain), family, plain))
        for peer in peers:
            key = f"{family} {peer.label}"
            try:
                theirs = Contender(peer.build(*self.size.arguments, **self.size.options), self.x, peer.export)
                if theirs.gradient.shape != ours.gradient.shape:
                    raise ShapeError(f"its output has the shape {tuple(theirs.gradient.shape)}")
            except Exception as error:  # not our code: whatever it raises, it cannot be measured
                self._row(family, peer.label, peer=True, refused=_one_line(error))
                continue
            self.others[key] = theirs
            self.pairs.append((self._row(family, peer.label, peer=True), family, key))

    def _plain_for(self, layer: nn.Module) -> str:
        """What the plain layer to compare with is called, which is also its key."""
        plain: nn.Module
        if self.role in PLAIN:
            plain = PLAIN[self.role](*self.size.arguments, **self.size.options)
            label = f"nn.{type(plain).__name__}"
        else:
            plain = block = plain_block(layer, self.x.detach(), self.size.options.get("padding_mode", "zeros"))
            label = block.describe()
        if label not in self.plain:
            self.plain[label] = Contender(plain, self.x)
        return label

    def _row(self, family: str, against: str, *, peer: bool = False, refused: str | None = None) -> Row:
        row: Row = {"role": self.role, "size": self.size.name, "family": family, "against": against}
        row |= {"peer": peer, "refused": refused}
        for what in ("train", "eval", "memory"):
            unit = "bytes" if what == "memory" else "ms"
            row |= {f"{what}_{unit}": None, f"{what}_against_{unit}": None, f"{what}_ratio": None}
            if what != "memory":
                row[f"{what}_ratio_quartiles"] = None
        self.rows.append(row)
        return row

    def run(self, rounds: int, tick: Tick) -> list[Row]:
        """Time and weigh all layers; the rows, filled."""
        contenders = self.plain | self.others
        self._record(contenders, "train", [c.train_step for c in contenders.values()], rounds, tick)
        weights = {key: peak_memory(c.train_step, self.device) for key, c in contenders.items()}
        for contender in contenders.values():
            contender.layer.eval()
        with parametrize.cached():  # keeps the peers' weights from call to call, as ours are kept
            self._record(contenders, "eval", [c.eval_step for c in contenders.values()], rounds, tick)
        for row, key, other in self.pairs:
            ours, theirs = weights[key], weights[other]
            row |= {"memory_bytes": ours, "memory_against_bytes": theirs}
            row["memory_ratio"] = ours / theirs if ours is not None and theirs else None
        return self.rows

    def _record(
        self, names: Iterable[str], what: str, steps: list[Callable[[], object]], rounds: int, tick: Tick
    ) -> None:
        times = dict(zip(names, interleaved(steps, rounds, self.device, tick), strict=True))
        for row, key, other in self.pairs:
            low, middle, high = quartiles([a / b for a, b in zip(times[key], times[other], strict=True)])
            row |= {f"{what}_ms": quartiles(times[key])[1], f"{what}_against_ms": quartiles(times[other])[1]}
            row |= {f"{what}_ratio": middle, f"{what}_ratio_quartiles": [low, high]}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# The run --------------------------------------------------------------------------------------------------------------


def _known(kind: str, names: Sequence[str] | None, known: Iterable[str]) -> list[str]:
    known = list(known)
    for name in names or ():
        if name not in known:
            raise UnknownNameError.of(kind, name, known)
    return [name for name in known if names is None or name in names]


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("device='cuda': torch finds no CUDA device here; use cpu")
    return torch.device(name)


def _available_peers(console: Console | None) -> dict[tuple[str, str], tuple[Peer, ...]]:
    missing = missing_packages()
    if console is not None:
        for message in missing.values():
            console.print(message, highlight=False, soft_wrap=True)
    return {key: tuple(p for p in peers if p.package not in missing) for key, peers in PEERS.items()}


@contextmanager
def _progress(console: Console | None, total: int) -> Iterator[Callable[[str], Tick]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=console is None) as progress:
        task = progress.add_task("", total=total)

        def named(name: str) -> Tick:
            progress.update(task, description=name)
            return lambda: progress.advance(task)

        yield named


def run(
    families: Sequence[str] | None = None,
    roles: Sequence[str] | None = None,
    *,
    quick: bool = False,
    repeats: int | None = None,
    device: str = "cpu",
    peers: bool = False,
    console: Console | None = None,
) -> list[Row]:
    """Measure families against torch's plain layers, and against other libraries'.

    Args:
        families, roles: names of the registry; default all.
        quick: tiny sizes, whose times mean little.
        repeats: rounds; default 15, quick 5.
        device: "cpu" or "cuda".
        peers: compare with deel-torchlip and orthogonium as well, as far as they are installed.
        console: where the progress and remarks go; none by default.

    Returns:
        One dict for each family, role, size and layer compared with. `train_ratio`, `eval_ratio` and `memory_ratio`
        are ours divided by the other's; where the family or the peer refuses the configuration they are None, and
        `refused` says why.

    Raises:
        UnknownNameError: a family or role of that name is not registered.
        ArgumentError: no CUDA device, no round, or nothing that is asked for exists.
    """
    rounds = (QUICK_REPEATS if quick else REPEATS) if repeats is None else repeats
    if rounds < 1:
        raise ArgumentError(f"repeats={rounds}; expected an integer of at least 1")
    place = _device(device)
    chosen = _known("family", families, FAMILIES)
    wanted = _known("layer role", roles, ROLES)
    sizes = QUICK_SIZES if quick else SIZES
    plan = [(role, size) for role in sizes if role in wanted for size in sizes[role] if _having(chosen, role)]
    if not plan:
        raise ArgumentError(f"families={chosen}, roles={wanted}: none of these families has such a layer")
    known_peers = _available_peers(console) if peers else {}
    rows: list[Row] = []
    with _progress(console, len(plan) * 2 * (rounds + 1)) as progress:
        for role, size in plan:
            tick = progress(f"{device} {role} {size.name}")
            contest = Contest(role, size, place)
            for family in _having(chosen, role):
                contest.enter(family, known_peers.get((family, role), ()))
            rows += contest.run(rounds, tick)
    return rows


def _having(families: Sequence[str], role: str) -> list[str]:
    return [name for name in families if getattr(FAMILIES[name], role, None) is not None]


# The command ----------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layers", description="Time every registered family against torch's plain layers."
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cpu and, if there is one, cuda")
    parser.add_argument("--family", nargs="+", metavar="NAME", help="default: every registered family")
    parser.add_argument("--role", nargs="+", metavar="NAME", help=f"of {', '.join(ROLES)}; default: all")
    parser.add_argument("--repeats", type=int, metavar="N", help=f"rounds; default {REPEATS}, quick {QUICK_REPEATS}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--peers", action="store_true", help="compare with deel-torchlip and orthogonium as well")
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="DIR", help="default: benchmarks/results")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; files are written only when everything asked for has been measured."""
    options = _parser().parse_args(arguments)
    devices = [options.device] if options.device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    part = options.family is not None or options.role is not None
    stderr, stdout = Console(stderr=True), Console()
    try:
        for device in devices:
            description = machine(_device(device))
            write_outputs(options.output, {})  # fails now rather than after an hour if the folder cannot be written
            rows = run(
                options.family,
                options.role,
                quick=options.quick,
                repeats=options.repeats,
                device=device,
                peers=options.peers,
                console=stderr,
            )
            for table in results_tables(rows):
                stdout.print(table)
            name = "_".join(["layers", device, *["quick"] * options.quick, *["part"] * part])
            for path in write_results(options.output, name, rows, description):
                stdout.print(str(path), highlight=False, soft_wrap=True)
    except LipschitzError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the results of an unfinished run are not written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
