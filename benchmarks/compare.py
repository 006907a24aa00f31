"""Every family of convolutions in one small network on one set of images, trained with one recipe, and certified.

    python -m benchmarks.compare --root DIR              # DIR/{train,test}/<class>/<image>; goes on where it stopped
    python -m benchmarks.compare --root DIR --family aol sll --steps 2000
    python -m benchmarks.compare --quick                 # generated images, two steps: does it run?

Families come from liplayers' registry; one that has a convolution or a residual block for images takes part, and needs
no line here. The images, made 16 × 16, pass a stage of two layers on 8 × 8 and one on 4 × 4. Before each stage 2 × 2
pixels become channels, after it half of the channels are dropped, so that no layer needs strides. MaxMin follows every
convolution, and every block without an activation of its own; the head has unit rows.

The loss, the number of steps and the batches are the same for all. The learning rate is the best on validation rows, of
shorter trainings: from 0.01 on the search takes steps of √10, three at most, until both neighbours are no better. The
test rows are certified with rounding counted, as `certify.py` does it.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from inspect import signature
from itertools import count, product
from pathlib import Path
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from rich.console import Console
from torch import Tensor, nn

import liplayers
from benchmarks.report import FOLDER
from benchmarks.runs import Images, Result, Results, Tick, certified, exit_status, generated_images, progress
from benchmarks.timing import peak_memory
from benchmarks.uci.train import shuffled_batches
from liplayers import FAMILIES, MaxMin, Normalize, NormalizedLinear, PadChannels, Patchify2d, get_layer
from liplayers.certification import parse_radius
from liplayers.certification.report import figure_writer, text_writer, write_outputs
from liplayers.core.checks import check_positive
from liplayers.data import DataModule, ImageFolder
from liplayers.errors import ArgumentError, NonFiniteError, UnknownNameError
from liplayers.losses import OffsetCrossEntropy
from liplayers.training import ManifoldAdamW, warmup_cosine

RADII = range(0, 145, 4)  # /255, of the curve
SHOWN = (36, 72, 108)  # /255, of the table; the mean over them chooses the learning rate
STAGES = 2
FARTHEST = 3  # steps of √10 from the first learning rate


@dataclass(frozen=True)
class Recipe:
    """What results must share to be compared.

    Args:
        steps, search_steps: of the training, and of those that try a learning rate.
        batch_size: images in each.
        channels: of the first stage, even; the next one has twice as many.
        image_size: height and width, divisible by four.
        rate: learning rate that the search begins with.
        offset, temperature: of the loss, `liplayers.losses.OffsetCrossEntropy`.
        warmup: share of the steps; then a half cosine down to 0.

    Raises:
        ArgumentError: a value out of its range.
    """

    steps: int = 400
    search_steps: int = 100
    batch_size: int = 128
    channels: int = 24
    image_size: int = 16
    rate: float = 0.01
    offset: float = 1.0
    temperature: float = 0.25
    warmup: float = 0.1

    def __post_init__(self) -> None:
        check_positive(self, steps=self.steps, search_steps=self.search_steps, batch_size=self.batch_size)
        check_positive(self, channels=self.channels, image_size=self.image_size)
        for name, value, divisor in (("channels", self.channels, 2), ("image_size", self.image_size, 2**STAGES)):
            if value % divisor:
                raise ArgumentError(f"Recipe: {name}={value}; expected a multiple of {divisor}")

    def record(self) -> dict[str, Any]:
        """As it is written beside the results, with the version of the library."""
        return json.loads(json.dumps(asdict(self) | {"liplayers": liplayers.__version__}))


def read_images(root: Path, image_size: int) -> Images:
    """The images of a folder, a tenth of the training images set apart for validation."""
    data = DataModule(ImageFolder(root, image_size))
    return Images(data.name, data.split("train"), data.split("val"), data.split("test"), data.num_classes)


# The networks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A family in one of its roles: "conv", or "conv_block" for its residual block."""

    family: str
    role: str

    @property
    def name(self) -> str:
        return getattr(get_layer(self.family, self.role), "__name__", f"{self.family} {self.role}")

    def layers(self, channels: int) -> list[nn.Module]:
        """One layer that keeps the shape, with its activation.

        >>> Method("aol", "conv").layers(4)[1]
        MaxMin(dim=1)
        """
        make = get_layer(self.family, self.role)
        layer = make(channels, channels, 3, padding=1) if self.role == "conv" else make(channels)
        return [layer] if "activation" in signature(make).parameters else [layer, MaxMin()]

    def network(self, input_shape: Sequence[int], num_classes: int, channels: int) -> nn.Sequential:
        """Stages of two layers, each on a quarter of the pixels of what it gets; then the head."""
        colours, height, width = input_shape
        found: list[nn.Module] = [Normalize([0.5] * colours, [1.0] * colours)]
        for stage in range(STAGES):
            wide = channels * 2**stage
            found += [Patchify2d(2), PadChannels(wide), *self.layers(wide), *self.layers(wide), PadChannels(wide // 2)]
        features = wide // 2 * (height // 2**STAGES) * (width // 2**STAGES)
        return nn.Sequential(*found, nn.Flatten(), NormalizedLinear(features, num_classes))


def all_methods(families: Sequence[str] | None = None) -> list[Method]:
    """Those of these families, all for None, in the order of the registry.

    Raises:
        UnknownNameError: no family of that name.
        ArgumentError: a family without layers for images.
    """
    found = [Method(f.name, role) for f in FAMILIES.values() for role in ("conv", "conv_block") if getattr(f, role)]
    for name in families or ():
        if name not in FAMILIES:
            raise UnknownNameError.of("family", name, FAMILIES)
        if name not in {method.family for method in found}:
            raise ArgumentError(f"family {name!r}: has no layer for images; leave it out")
    return [method for method in found if families is None or method.family in families]


# Training and certification -------------------------------------------------------------------------------------------


class Training:
    """A new network and its training, a step at a time; `seed` draws the initial weights and the batches."""

    def __init__(self, method: Method, images: Images, recipe: Recipe, rate: float, steps: int, seed: int) -> None:
        self.images = images
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = method.network(images.input_shape, images.num_classes, recipe.channels)
        self.loss = OffsetCrossEntropy(recipe.offset, recipe.temperature)
        self.optimizer = ManifoldAdamW(self.network.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
        self.schedule = warmup_cosine(self.optimizer, steps, recipe.warmup)
        rows = torch.arange(len(images.train))
        self.batches = shuffled_batches(rows, recipe.batch_size, steps, torch.Generator().manual_seed(seed))

    def step(self, rows: Tensor) -> None:
        inputs, labels = self.images.train[rows]
        self.optimizer.zero_grad()
        self.loss(self.network(inputs), labels).backward()
        self.optimizer.step()

    def run(self, tick: Tick) -> list[float]:
        """All steps; the processor seconds of each, which other work on the machine changes least."""
        seconds = []
        for rows in self.batches:
            start = time.process_time()
            self.step(rows)
            self.schedule.step()
            seconds.append(time.process_time() - start)
            tick()
        return seconds


def validation_score(method: Method, images: Images, recipe: Recipe, rate: float, tick: Tick) -> float:
    """The mean certified accuracy on validation rows after a short training, from float32; 0 where it diverged."""
    try:
        training = Training(method, images, recipe, rate, recipe.search_steps, seed=0)
        training.run(tick)
        certificates = certified(training.network, images, images.val, "fast")
    except (NonFiniteError, torch.linalg.LinAlgError):
        return 0.0
    return statistics.mean(certificates.accuracy(parse_radius(f"{radius}/255")) for radius in SHOWN)


def search_rate(start: float, score: Callable[[float], float]) -> Result:
    """Climb from `start` in steps of √10 until both neighbours are no better, at most three steps away; all scores.

    >>> search_rate(0.01, lambda rate: -rate)["rate"]
    0.000316
    """
    scores: dict[int, float] = {}
    best = 0
    while True:
        near = [power for power in (best, best - 1, best + 1) if abs(power) <= FARTHEST]
        scores |= {power: score(_rate(start, power)) for power in near if power not in scores}
        here, best = best, max(near, key=scores.__getitem__)  # of equals the first, which is `here`
        if best == here:
            return {"rate": _rate(start, best), "scores": {f"{_rate(start, p):g}": scores[p] for p in sorted(scores)}}


def _rate(start: float, power: int) -> float:
    return float(f"{start * 10 ** (power / 2):.3g}")


def try_rates(method: Method, images: Images, recipe: Recipe, tick: Tick) -> Result:
    """The learning rate for a method, with the scores of all that were tried."""
    return search_rate(recipe.rate, partial(validation_score, method, images, recipe, tick=tick))


def train_and_certify(method: Method, images: Images, recipe: Recipe, rate: float, seed: int, tick: Tick) -> Result:
    """One full training, and the proofs of its network on the test rows.

    Raises:
        NonFiniteError: the training diverged, though at this rate the shorter one did not.
    """
    training = Training(method, images, recipe, rate, recipe.steps, seed)
    try:
        seconds = training.run(tick)
        certificates = certified(training.network, images, images.test, "proof")
    except (NonFiniteError, torch.linalg.LinAlgError) as error:
        raise NonFiniteError(
            f"{method.name}, seed {seed}, rate {rate:g}: the training diverged ({error}); leave its family out, or "
            "change the recipe"
        ) from None
    memory = peak_memory(lambda: training.step(training.batches[-1]), torch.device("cpu"))  # trains on, after the proof
    return {
        "rate": rate,
        "clean": certificates.clean_accuracy,
        "certified": {str(radius): certificates.accuracy(parse_radius(f"{radius}/255")) for radius in RADII},
        "parameters": sum(p.numel() for p in training.network.parameters()),
        "seconds_per_1000": statistics.median(seconds) * 1000 / recipe.batch_size,
        "memory": memory,
    }


# The run --------------------------------------------------------------------------------------------------------------


class Runs(Results):
    """The results of a recipe, in a folder.

    Args:
        folder: where they are.
        recipe: of all of them.
        load: reads the images; called when the first result is missing.
    """

    def __init__(self, folder: Path, recipe: Recipe, load: Callable[[], Images]) -> None:
        super().__init__(folder, load)
        self.recipe = recipe

    def rows(self, methods: Sequence[Method], seeds: int, console: Console | None) -> list[Result]:
        """The results of every method and seed, those of seed 0 first.

        Raises:
            DataError: a file that is no result, or results of another recipe or of different data.
        """
        recipe, record = self.recipe, self.recipe.record()
        rows: list[Result] = []
        with progress(console, len(methods) * seeds) as named:
            for seed, method in product(range(seeds), methods):
                tick = named(f"{method.name}, seed {seed}")
                name = f"{method.family}.{method.role}"
                search = partial(try_rates, method, recipe=recipe, tick=tick)
                rate = self.result(f"{name}.rates", record, search)["rate"]
                training = partial(train_and_certify, method, recipe=recipe, rate=rate, seed=seed, tick=tick)
                rows.append({"layer": method.name, "seed": seed} | self.result(f"{name}.{seed}", record, training))
        self.check_same_data(rows, "layer")
        return rows


# The report -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """Means over the seeds of a layer; times are the least over them, which the machine disturbed least."""

    layer: str
    seeds: int
    rate: float
    clean: float
    certified: dict[int, float]
    parameters: int
    seconds_per_1000: float
    memory: int | None


def summaries(rows: Iterable[Result]) -> list[Summary]:
    """One for each layer, the best mean certified accuracy first."""
    by_layer: dict[str, list[Result]] = {}
    for row in rows:
        by_layer.setdefault(row["layer"], []).append(row)
    found = []
    for layer, same in by_layer.items():
        values = {radius: [row["certified"][str(radius)] for row in same] for radius in RADII}
        found.append(
            Summary(
                layer=layer,
                seeds=len(same),
                rate=same[0]["rate"],
                clean=statistics.mean(row["clean"] for row in same),
                certified={radius: statistics.mean(each) for radius, each in values.items()},
                parameters=same[0]["parameters"],
                seconds_per_1000=min(row["seconds_per_1000"] for row in same),
                memory=same[0]["memory"],
            )
        )
    return sorted(found, key=lambda each: -sum(each.certified[radius] for radius in SHOWN))


def undominated(found: Sequence[Summary], radius: int) -> list[Summary]:
    """The layers that none trains faster than and is certified as well as at a radius, the fastest first."""
    best: list[Summary] = []
    for each in sorted(found, key=lambda each: (each.seconds_per_1000, -each.certified[radius])):
        if not best or each.certified[radius] > best[-1].certified[radius]:
            best.append(each)
    return best


def _cells(each: Summary) -> list[str]:
    memory = "–" if each.memory is None else f"{each.memory / 1e6:.0f}"
    accuracies = [each.clean, *(each.certified[radius] for radius in SHOWN)]
    return [
        *(f"{100 * value:.1f}" for value in accuracies),
        f"{each.seconds_per_1000:.2f}",
        memory,
        f"{each.parameters}",
        f"{each.rate:g}",
    ]


def markdown(found: Sequence[Summary], row: Result) -> str:
    """What was done, the table, and what follows from it by rule; `row` is any of the results."""
    recipe, data, computer = row["recipe"], row["data"], row["machine"]
    seeds = found[0].seeds
    error = 100 * max((each.clean * (1 - each.clean) / data["test"]) ** 0.5 for each in found)
    side, passes = recipe["image_size"], recipe["steps"] * recipe["batch_size"] / data["train"]
    headings = ["layer", "clean", *(f"{radius}/255" for radius in SHOWN), "s per 1000", "MB", "parameters", "rate"]
    lines = [
        "# Layers for images in one small network",
        "",
        (__doc__ or "").split("\n\n", 2)[2].strip(),
        "",
        f"Data: {data['name']}, {side} × {side}; {data['train']} images to train on, {data['val']} to validate, "
        f"{data['test']} to test. {recipe['steps']} steps of {recipe['batch_size']} images ({passes:.2g} epochs), "
        f"{recipe['search_steps']} to try a learning rate; "
        f"{recipe['channels']} and {2 * recipe['channels']} channels; offset {recipe['offset']:g}, temperature "
        f"{recipe['temperature']:g}. Means over {seeds} seed{'s' if seeds > 1 else ''}.",
        "",
        f"Machine: {computer['cpu']}, threads: {computer['threads']}, torch {computer['torch']}.",
        "",
        "Accuracies in %, clean and certified at ℓ2 radii of pixels in [0, 1], in the order of the mean over the "
        f"radii. The standard error of one, from {data['test']} test images, is up to {error:.1f}; how far seeds "
        "differ is in the csv file. s per 1000: processor time of training on 1000 images (of a step, the median), the "
        "least over the seeds. MB: the most that a training step holds at a time. One network and one short training: "
        "another may put the layers in another order.",
        "",
        f"| {' | '.join(headings)} |",
        "|---" + "|--:" * (len(headings) - 1) + "|",
        *(f"| {' | '.join([each.layer, *_cells(each)])} |" for each in found),
        "",
        "Pareto-optimal layers (no other trains faster and is certified as well), the fastest first:",
        "",
        *(f"- at {radius}/255: {', '.join(each.layer for each in undominated(found, radius))}" for radius in SHOWN),
    ]
    return "\n".join(lines) + "\n"


def _styles() -> Iterator[dict[str, Any]]:
    """Different ones for 40 layers."""
    for i in count():
        yield {"color": colormaps["tab10"](i % 10), "marker": "osv^DP*X"[i % 8], "markersize": 5}


def curves(found: Sequence[Summary]) -> Figure:
    """Certified accuracy over the radius."""
    figure = Figure(figsize=(8.2, 5.2), layout="constrained")
    axes = figure.add_subplot()
    for each, style in zip(found, _styles(), strict=False):
        accuracies = [100 * each.certified[radius] for radius in RADII]
        axes.plot(RADII, accuracies, **style, markevery=9, linewidth=1, label=each.layer)
    axes.set(xlabel="ε · 255 (ℓ2)", ylabel="certified accuracy in %", xlim=(0, RADII[-1]), xticks=range(0, 145, 36))
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    return figure


def costs(found: Sequence[Summary]) -> Figure:
    """Certified accuracy over the training time, a panel for each of two radii; the undominated ones on a line."""
    figure = Figure(figsize=(10.5, 5.2), layout="constrained")
    for axes, radius in zip(figure.subplots(1, 2), (SHOWN[0], SHOWN[-1]), strict=True):
        for each, style in zip(found, _styles(), strict=False):
            place = (each.seconds_per_1000, 100 * each.certified[radius])
            axes.plot(*place, **style, linestyle="none", label=each.layer)
        best = undominated(found, radius)
        axes.plot(
            [each.seconds_per_1000 for each in best],
            [100 * each.certified[radius] for each in best],
            color="black",
            linewidth=0.8,
            zorder=0,
        )
        axes.set(xscale="log", xlabel="training, processor s per 1000 images", ylabel=f"certified at {radius}/255 in %")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


def write_report(folder: Path, name: str, rows: Sequence[Result]) -> list[Path]:
    """Write <name>.md, <name>.csv with a row for each network, <name>.png and <name>_time.png."""
    found = summaries(rows)

    def write_csv(path: Path) -> None:
        columns = ("layer", "seed", "rate", "clean", "parameters", "seconds_per_1000", "memory")
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow([*columns, *(f"c{radius}" for radius in RADII)])
            table.writerows([*(row[c] for c in columns), *row["certified"].values()] for row in rows)

    return write_outputs(
        folder,
        {
            f"{name}.md": text_writer(markdown(found, rows[0])),
            f"{name}.csv": write_csv,
            f"{name}.png": figure_writer(curves(found)),
            f"{name}_time.png": figure_writer(costs(found)),
        },
    )


# The command ----------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    recipe = Recipe()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description="Compare every family's layers for images in one network."
    )
    add = parser.add_argument
    add("--root", type=Path, metavar="DIR", help="the folder that holds train/ and test/")
    add("--family", nargs="+", metavar="NAME", help="default: every one with layers for images")
    add("--steps", type=int, default=recipe.steps, metavar="N", help="of each training; default %(default)s")
    add("--channels", type=int, default=recipe.channels, metavar="N", help="of the first stage; default %(default)s")
    add("--seeds", type=int, default=1, metavar="N", help="networks for each layer; default %(default)s")
    add("--quick", action="store_true", help="generated images, two steps: does it run?")
    add("--output", type=Path, default=FOLDER, metavar="DIR", help="default: benchmarks/results")
    return parser


def _run(options: argparse.Namespace) -> list[Path]:
    check_positive(_run, seeds=options.seeds)
    if options.quick:
        recipe = Recipe(steps=2, search_steps=1, batch_size=4, channels=8, image_size=8)
        load, name = partial(generated_images, recipe.image_size), "compare_quick"
    elif options.root is None:
        raise ArgumentError("--root is missing; give the folder that holds train/<class>/ and test/<class>/")
    else:
        recipe = Recipe(options.steps, max(1, options.steps // 4), channels=options.channels)
        load, name = partial(read_images, options.root, recipe.image_size), "compare"
    runs = Runs(options.output / f"{name}_runs", recipe, load)
    rows = runs.rows(all_methods(options.family), options.seeds, Console(stderr=True))
    return write_report(options.output, name, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    return exit_status(partial(_run, _parser().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
