"""One job: one method on one set, every fold and seed trained and certified."""

from __future__ import annotations

import json
import os
import time
import zlib
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

import liplayers
from benchmarks.uci.data import UCISet
from benchmarks.uci.methods import METHODS, count_parameters, matched_width
from benchmarks.uci.train import Recipe, shuffled_batches, train_together
from liplayers.certification import CertifiedNetwork, certify, parse_radius
from liplayers.core.checks import check_positive
from liplayers.errors import DataError

RADII = (36, 72, 108, 255)
METRICS = ("clean", *(f"c{radius}" for radius in RADII))
CERTIFY_BATCH = 2048
Result = dict[str, Any]


@dataclass(frozen=True)
class Configuration:
    """What results must share to be compared.

    Args:
        recipe: of the training.
        depth: layers before the head.
        width: of AOL's model, which sets the budget.
        seeds: models for each fold, with seeds 0, 1, ….
        rows: "test" trains on all rows that are not test rows and certifies those; "validation" trains on the rows
            that are neither and certifies the validation rows.
    """

    recipe: Recipe = field(default_factory=Recipe)
    depth: int = 4
    width: int = 48
    seeds: int = 3
    rows: Literal["test", "validation"] = "test"

    def __post_init__(self) -> None:
        check_positive(self, depth=self.depth, width=self.width, seeds=self.seeds)

    def record(self) -> dict[str, Any]:
        """As it is written beside the results, with the version of the library."""
        return json.loads(json.dumps(asdict(self) | {"liplayers": liplayers.__version__}))


def run_job(data: UCISet, method: str, configuration: Configuration) -> Result:
    """Train `method` for all folds and seeds of a set, certify each model on its fold's rows; the content of the file.

    Initial weights depend on the seed alone, batches on set, fold and seed: every method sees the same ones.
    """
    start = time.perf_counter()
    recipe, depth = configuration.recipe, configuration.depth
    features, classes = data.features.shape[1], len(data.class_names)
    width = matched_width(method, features, classes, configuration.width, depth)
    runs = [(fold, seed) for fold in range(data.test.shape[1]) for seed in range(configuration.seeds)]
    splits = [_split(data, fold, configuration.rows) for fold, _ in runs]
    size = min(recipe.batch_size, *(len(training) for training, _ in splits))
    models, batches = [], []
    for (fold, seed), (training, _) in zip(runs, splits, strict=True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            models.append(METHODS[method](features, classes, width, depth))
        generator = torch.Generator().manual_seed(zlib.crc32(f"{data.name} {fold} {seed}".encode()))
        batches.append(shuffled_batches(training, size, recipe.steps, generator))
    train_together(models, data.features.float(), data.labels, torch.stack(batches, 1), recipe)
    certified = [
        {"fold": fold, "seed": seed} | _certified(model, data, rows)
        for (fold, seed), (_, rows), model in zip(runs, splits, models, strict=True)
    ]
    return {
        "configuration": configuration.record(),
        "set": data.name,
        "method": method,
        "samples": len(data.labels),
        "features": features,
        "classes": classes,
        "width": width,
        "parameters": count_parameters(method, features, classes, width, depth),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "seconds": round(time.perf_counter() - start, 1),
        "models": certified,
    }


def _split(data: UCISet, fold: int, rows: str) -> tuple[Tensor, Tensor]:
    """Row numbers to train on and to certify."""
    test, validation = data.test[:, fold], data.validation[:, fold]
    training, held_out = (~test, test) if rows == "test" else (~(test | validation), validation)
    for kind, mask in (("training", training), (rows, held_out)):
        if not mask.any():
            raise DataError(f"{data.name}: fold {fold} has no {kind} rows; leave the set out with --sets")
    return training.nonzero()[:, 0], held_out.nonzero()[:, 0]


def _certified(model: torch.nn.Module, data: UCISet, rows: Tensor) -> dict[str, Any]:
    network = CertifiedNetwork(model, (data.features.shape[1],), len(data.class_names))
    batches = [(data.features[part], data.labels[part]) for part in rows.split(CERTIFY_BATCH)]
    certificates = certify(network, batches, input_range=None)
    accuracies = [certificates.accuracy(parse_radius(f"{radius}/255")) for radius in RADII]
    return {
        **dict(zip(METRICS, [certificates.clean_accuracy, *accuracies], strict=True)),
        "n_test": len(rows),
        "not_finite": certificates.not_finite,
        "bound": network.bounds.split.body_bound,
    }
