"""Small versions of the recipes, trained by `train.py`'s own path and certified, beside the authors' figures.

    python -m benchmarks.recipes --root DIR             # DIR/{train,test}/<class>/<image>; goes on where it stopped
    python -m benchmarks.recipes --root DIR --only convnet --steps 80 --seeds 1
    python -m benchmarks.recipes --quick                # generated images, two steps: does it run?

Each recipe is its experiment of `configs/`, with fewer and narrower layers (about 32 channels and four convolutions),
on the first 1000 training and 200 test images of each class, none held out. All else is the recipe's: augmentation,
loss, optimizer, schedule over the steps. What counts epochs, as the ramp of a radius does, takes ten steps for one;
Lookahead takes 5 steps in place of 6, so that they are whole rounds. The network of the last step is certified with
rounding counted.

The authors' figures are of their public code at about this size, on the same images, with one seed. Their networks are
not 1-Lipschitz where "divided out" is not said: the constant is learned, and estimated from below.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

import liplayers
from benchmarks.report import FOLDER
from benchmarks.runs import Images, Result, Results, certified, exit_status, generated_images, progress
from liplayers.bounds import lipschitz_bound
from liplayers.certification import parse_radius
from liplayers.certification.report import json_writer, text_writer, write_outputs
from liplayers.checkpoint import load_checkpoint
from liplayers.cli import train
from liplayers.cli.configuration import build
from liplayers.commands.help import config_folder
from liplayers.core.checks import check_positive
from liplayers.data import DataModule, ImageFolder, Split
from liplayers.errors import ArgumentError, UnknownNameError

RADII = (36, 72, 108)  # /255
PARTS = ("model", "loss", "optimizer", "schedule", "epsilon_ramp")  # of a config, beside the augmentation


@dataclass(frozen=True)
class Published:
    """What the authors' code reached: clean accuracy in % and certified at the first of `RADII`."""

    who: str
    steps: int
    figures: tuple[float, ...]


@dataclass(frozen=True)
class Small:
    """A recipe at small size: an experiment and what is changed in it."""

    title: str
    experiment: str
    changes: tuple[str, ...]
    published: tuple[Published, ...] = ()


_BACKBONE = ("model.channels=32", "model.depth=4", "model.width=256", "model.dense=2", "optimizer.every=5")
RECIPES = {
    "bronet": Small(
        "BRONet",
        "bronet_cifar10",
        _BACKBONE,
        (
            Published("authors", 80, (40.1, 31.2, 23.9, 17.7)),
            Published("authors, constant divided out", 80, (37.4, 31.1, 25.5, 21.5)),
        ),
    ),
    "liresnet": Small(
        "LiResNet",
        "liresnet_cifar10",
        _BACKBONE,
        (
            Published("authors", 90, (41.1, 32.3, 24.1, 16.9)),
            Published("authors, constant divided out", 90, (38.8, 32.8, 27.3, 21.9)),
            Published("authors", 450, (52.8, 44.5, 37.4, 29.6)),
            Published("authors, constant divided out", 450, (47.6, 41.9, 35.6, 30.2)),
        ),
    ),
    "soc": Small(
        "SOC LipConvNet",
        "cifar10_jpeg",
        (
            "model.conv=soc",
            "model.linear=null",
            "model.channels=32",
            "model.stages=2",
            "model.convs_per_stage=1",
            "model.dense=0",
        ),
    ),
    "aol": Small(
        "AOLNet",
        "aol_cifar10",
        ("model.channels=32", "model.depth=4", "model.patch_features=8", "model.dense=2"),
    ),
    "convnet": Small(
        "ConvNet of Layers Compared, AOL",
        "convnet_cifar10",
        ("model.channels=16", "model.blocks=4", "model.convs_per_block=1"),
        (Published("authors", 80, (32.3, 9.8)),),
    ),
    "sll": Small(
        "SLLNet",
        "sll_cifar10",
        ("model.channels=32", "model.conv_blocks=4", "model.dense_blocks=2", "model.hidden_features=512"),
    ),
    "lbdn": Small("LBDN", "lbdn_cifar10", ("model.channels=32", "model.stages=2", "model.width=256")),
}


@dataclass(frozen=True)
class Extent:
    """How much is trained on.

    Args:
        train, test: images of each class.
        epoch: steps that count as one.
        changes: to each config.
    """

    train: int = 1000
    test: int = 200
    epoch: int = 10
    changes: tuple[str, ...] = ()


def read_images(root: Path, extent: Extent) -> Images:
    """The first images of each class, in the order of their names."""
    data = DataModule(ImageFolder(root), val_fraction=0)
    train, test = (_first(data.split(s), n) for s, n in (("train", extent.train), ("test", extent.test)))
    return Images(data.name, train, train.subset(torch.arange(0)), test, data.num_classes)


def _first(split: Split, count: int) -> Split:
    rows = [torch.nonzero(split.labels == label).flatten()[:count] for label in split.labels.unique()]
    return split.subset(torch.cat(rows).sort().values)


# Training -------------------------------------------------------------------------------------------------------------


def composed(recipe: Small, extent: Extent, steps: int, seed: int) -> DictConfig:
    """The config of a training; data and output are not set yet.

    Raises:
        ArgumentError: steps that are no whole number of epochs.
    """
    if steps % extent.epoch:
        raise ArgumentError(f"steps={steps}; expected a multiple of {extent.epoch}")
    overrides = [
        f"experiment={recipe.experiment}",
        "data=npz",
        "data.val_fraction=0",
        *recipe.changes,
        *extent.changes,
        f"seed={seed}",
        f"trainer.max_epochs={steps // extent.epoch}",
        f"trainer.limit_train_batches={extent.epoch}",
        "trainer.accelerator=cpu",
        "trainer.enable_progress_bar=false",
        "+trainer.limit_val_batches=0",
        "save_every_steps=null",
    ]
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        return hydra.compose("train", overrides)


def record(recipe: Small, extent: Extent, steps: int, seed: int) -> Result:
    """What two results must share to be the same: of the config, what the trained network depends on."""
    cfg = composed(recipe, extent, steps, seed)
    parts: dict[str, Any] = {part: OmegaConf.to_container(cfg[part]) if cfg[part] else None for part in PARTS}
    parts["augment"] = OmegaConf.to_container(cfg.data.augment)
    settings = {"steps": steps, "seed": seed, "batch_size": cfg.data.batch_size, "epoch": extent.epoch}
    clip = {"gradient_clip_val": cfg.trainer.gradient_clip_val}
    return {"experiment": recipe.experiment, **settings, **clip, **parts, "liplayers": liplayers.__version__}


def train_and_certify(recipe: Small, extent: Extent, steps: int, seed: int, images: Images) -> Result:
    """One training by `train`, in a folder that is removed, and the proofs of its last network on the test rows."""
    cfg = composed(recipe, extent, steps, seed)
    with tempfile.TemporaryDirectory(prefix="recipes-") as folder:
        for which, split in (("train", images.train), ("test", images.test)):
            cfg.data[which] = str(Path(folder) / f"{which}.npz")
            np.savez(cfg.data[which], images=split.inputs.numpy(), labels=split.labels.numpy())
        cfg.output = str(Path(folder) / "run")
        start = time.process_time()
        with redirect_stdout(io.StringIO()):  # its folder is gone before anyone could follow what it says
            metrics = train(cfg)
        seconds = time.process_time() - start
        checkpoint = load_checkpoint(Path(folder) / "run" / "checkpoints" / "last.ckpt")
    model = build(cfg.model, input_shape=images.input_shape, num_classes=images.num_classes)
    checkpoint.load_into(model)
    certificates = certified(model.eval(), images, images.test, "proof")
    return {
        "clean": certificates.clean_accuracy,
        "certified": {str(radius): certificates.accuracy(parse_radius(f"{radius}/255")) for radius in RADII},
        "loss": metrics["train/loss"],
        "bound": lipschitz_bound(model.body, images.input_shape),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds_per_step": seconds / steps,
    }


def run(
    results: Results, names: Sequence[str], extent: Extent, steps: Sequence[int], seeds: int, console: Console | None
) -> list[Result]:
    """The results of every recipe, length and seed, the shortest and seed 0 first.

    Raises:
        DataError: a file that is no result, or results of another recipe or of different data.
    """
    rows = []
    with progress(console, len(names) * len(steps) * seeds) as named:
        for length, seed, name in product(steps, range(seeds), names):
            recipe, label = RECIPES[name], f"{name}.{length}.{seed}"
            named(f"{recipe.title}, {length} steps, seed {seed}")
            make = partial(train_and_certify, recipe, extent, length, seed)
            found = results.result(label, record(recipe, extent, length, seed), make)
            rows.append({"name": name, "steps": length, "seed": seed} | found)
    results.check_same_data(rows, "name")
    return rows


# The report -----------------------------------------------------------------------------------------------------------


def markdown(rows: Sequence[Result]) -> str:
    """What was done, and a table with the authors' figures after ours."""
    data, computer = rows[0]["data"], rows[0]["machine"]
    headings = ["recipe", "whose", "steps", "clean", *(f"{radius}/255" for radius in RADII)]
    headings += ["seeds differ by", "bound", "parameters", "s a step"]
    lines = [
        "# Recipes at small size",
        "",
        (__doc__ or "").split("\n\n", 2)[2].strip(),
        "",
        f"Data: {data['name']}; {data['train']} images to train on, {data['test']} to test. The standard error of an "
        f"accuracy from {data['test']} images is up to {100 * (0.25 / data['test']) ** 0.5:.1f}.",
        "",
        f"Machine: {computer['cpu']}, threads: {computer['threads']}, torch {computer['torch']}.",
        "",
        "Accuracies in %, clean and certified at ℓ2 radii of pixels in [0, 1], means over the seeds. Seeds differ by: "
        "the most, over the four. Bound: proven, of the network below its head. s a step: processor time.",
        "",
        f"| {' | '.join(headings)} |",
        "|---|---" + "|--:" * (len(headings) - 2) + "|",
        *(f"| {' | '.join(cells)} |" for cells in _table(rows)),
    ]
    return "\n".join(lines) + "\n"


def _table(rows: Iterable[Result]) -> list[list[str]]:
    groups: dict[str, dict[int, list[Result]]] = {}
    for row in rows:
        groups.setdefault(row["name"], {}).setdefault(row["steps"], []).append(row)
    table = []
    for name, lengths in groups.items():
        recipe = RECIPES[name]
        table += [[recipe.title, "ours", str(steps), *_ours(same)] for steps, same in sorted(lengths.items())]
        for theirs in recipe.published:
            figures = [f"{figure:.1f}" for figure in theirs.figures]
            blank = [""] * (1 + len(RADII) - len(figures))
            table.append([recipe.title, theirs.who, str(theirs.steps), *figures, *blank, "", "", "", ""])
    return table


def _ours(same: Sequence[Result]) -> list[str]:
    """The cells of the results of all seeds."""
    figures = [[100 * value for value in (row["clean"], *row["certified"].values())] for row in same]
    columns = list(zip(*figures, strict=True))
    spread = max(max(column) - min(column) for column in columns)
    return [
        *(f"{statistics.mean(column):.1f}" for column in columns),
        f"{spread:.1f}" if len(same) > 1 else "–",
        f"{max(row['bound'] for row in same):.4f}",
        f"{same[0]['parameters']}",
        f"{min(row['seconds_per_step'] for row in same):.2f}",
    ]


def write_report(folder: Path, name: str, rows: Sequence[Result]) -> list[Path]:
    """Write <name>.md and <name>.json, which has every result."""
    return write_outputs(
        folder, {f"{name}.md": text_writer(markdown(rows)), f"{name}.json": json_writer({"results": list(rows)})}
    )


# The command ----------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recipes", description="Train the recipes at small size, beside the authors' figures."
    )
    add = parser.add_argument
    add("--root", type=Path, metavar="DIR", help="the folder that holds train/ and test/")
    add("--only", nargs="+", metavar="NAME", help=f"of {', '.join(RECIPES)}; default: all")
    add("--steps", type=int, nargs="+", default=[100, 450], metavar="N", help="of the trainings; default 100 450")
    add("--seeds", type=int, default=2, metavar="N", help="trainings of each recipe and length; default %(default)s")
    add("--quick", action="store_true", help="generated images, two steps: does it run?")
    add("--output", type=Path, default=FOLDER, metavar="DIR", help="default: benchmarks/results")
    return parser


def _run(options: argparse.Namespace) -> list[Path]:
    check_positive(_run, seeds=options.seeds)
    for name in options.only or ():
        if name not in RECIPES:
            raise UnknownNameError.of("recipe", name, RECIPES)
    names = [name for name in RECIPES if options.only is None or name in options.only]
    load: Callable[[], Images]
    if options.quick:
        extent, steps, seeds, report = Extent(epoch=2, changes=("data.batch_size=6",)), [2], 1, "recipes_quick"
        load = partial(generated_images, 32)
    elif options.root is None:
        raise ArgumentError("--root is missing; give the folder that holds train/<class>/ and test/<class>/")
    else:
        extent, steps, seeds, report = Extent(), sorted(set(options.steps)), options.seeds, "recipes"
        check_positive(_run, steps=steps[0])
        load = partial(read_images, options.root, extent)
    results = Results(options.output / f"{report}_runs", load)
    rows = run(results, names, extent, steps, seeds, Console(stderr=True))
    return write_report(options.output, report, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    return exit_status(partial(_run, _parser().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
