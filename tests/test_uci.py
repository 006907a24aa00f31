"""The UCI benchmark: files and folds, training in batches, budgets, results that do not mix, statistics."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from scipy import stats
from torch import Tensor, nn

from benchmarks.uci import jobs as uci_jobs
from benchmarks.uci import run as uci_run
from benchmarks.uci import selection, statistics
from benchmarks.uci.__main__ import main
from benchmarks.uci.data import UCI, UCISet, read_uci, uci_names
from benchmarks.uci.jobs import METRICS, Configuration, run_job
from benchmarks.uci.methods import METHODS, count_parameters, matched_width
from benchmarks.uci.report import critical_difference_plot, scores_of, write_report
from benchmarks.uci.results import FIELDS, read_results
from benchmarks.uci.run import Job, plan_jobs, run_jobs
from benchmarks.uci.train import Recipe, shuffled_batches, train_together
from liplayers import cli
from liplayers.certification import CertifiedNetwork, certify
from liplayers.cli.configuration import build_data, check_config
from liplayers.data import DataModule
from liplayers.errors import ArgumentError, ConfigError, DataError, DataNotFoundError, LipschitzError, UnknownNameError
from liplayers.losses import OffsetCrossEntropy
from liplayers.training.schedules import warmup_cosine

CONFIGS = Path(__file__).parent.parent / "configs"
SMALL = ["model.width=8", "model.depth=1", "model.mean=null", "trainer.max_epochs=1", "trainer.accelerator=cpu"]
SMALL += ["trainer.enable_progress_bar=false"]
QUICK = Configuration(Recipe(steps=3), depth=2, width=6, seeds=2)


def write_set(root: Path, name: str, samples: int = 24, features: int = 3, seed: int = 0) -> None:
    """Three classes around three points, two folds."""
    random = np.random.default_rng(seed)
    labels = np.arange(samples) % 3
    values = random.normal(size=(samples, features)) + 2 * random.normal(size=(3, features))[labels]
    order = np.stack([random.permutation(samples) for _ in range(2)], 1)
    tables = {name: values, "labels": labels, "folds": order < samples // 4}
    tables["validation_folds"] = order >= samples - samples // 6
    (root / name).mkdir(parents=True)
    for key, table in tables.items():
        np.savetxt(root / name / f"{key}_py.dat", table, delimiter=",", fmt="%.6g")


@pytest.fixture
def root(tmp_path) -> Path:
    for seed, name in enumerate(("flowers", "stones", "wells")):
        write_set(tmp_path / "data", name, seed=seed)
    return tmp_path / "data"


def run(
    root: Path, output: Path, configuration: Configuration = QUICK, methods: tuple[str, ...] = ("aol", "sll")
) -> int:
    """How many jobs there were to run."""
    jobs = plan_jobs(root, output, None, methods, configuration)
    run_jobs(jobs, processes=1, console=None)
    return len(jobs)


def command(root: Path, output: Path, *arguments: str) -> int:
    small = ("--steps", "3", "--depth", "2", "--width", "6", "--seeds", "2")
    return main(["--root", str(root), "--output", str(output), *small, *arguments])


def fails(kind: type[Exception], call: Callable[[], object], *parts: object) -> None:
    """`call` raises `kind` with one line that has every part."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, f"{part!r} not in {message!r}"


def compose(name: str, *overrides: str) -> Any:
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose(name, list(overrides))


# The files ------------------------------------------------------------------------------------------------------------

ROWS = 12


def uci_files() -> dict[str, list[list[object]]]:
    draw = np.random.default_rng(0)
    test = np.arange(ROWS)[:, None] % 4 == np.arange(2)
    validation = np.arange(ROWS)[:, None] % 4 == np.arange(2) + 2
    return {
        "toy_py": draw.normal(size=(ROWS, 3)).round(4).tolist(),
        "labels_py": [[row % 3] for row in range(ROWS)],
        "folds_py": test.astype(int).tolist(),
        "validation_folds_py": validation.astype(int).tolist(),
    }


def write_uci(root: Path, files: dict[str, list[list[object]]]) -> Path:
    (root / "toy").mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (root / "toy" / f"{name}.dat").write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    return root


def test_uci_set_is_read_as_written_from_the_folder_or_its_parent(tmp_path: Path) -> None:
    files = uci_files()
    write_uci(tmp_path / "uci121", files)
    (tmp_path / "uci121" / "notes").mkdir()
    for root in (tmp_path, tmp_path / "uci121", str(tmp_path)):
        assert uci_names(root) == ("toy",)
        data = read_uci(root, "toy")
        assert (data.name, data.class_names) == ("toy", ("0", "1", "2"))
        assert torch.equal(data.features, torch.tensor(files["toy_py"], dtype=torch.float64))
        assert torch.equal(data.labels, torch.arange(ROWS) % 3)
        assert torch.equal(data.test, torch.tensor(files["folds_py"], dtype=torch.bool))
        assert torch.equal(data.validation, torch.tensor(files["validation_folds_py"], dtype=torch.bool))


def test_uci_labels_and_folds_may_be_written_as_floats(tmp_path: Path) -> None:
    files = uci_files()
    plain = read_uci(write_uci(tmp_path / "a", files), "toy")
    for name in ("labels_py", "folds_py", "validation_folds_py"):
        files[name] = [[f"{cell}.0" for cell in row] for row in files[name]]
    floats = read_uci(write_uci(tmp_path / "b", files), "toy")
    for field in ("labels", "test", "validation"):
        assert torch.equal(getattr(plain, field), getattr(floats, field))


@pytest.mark.parametrize(
    ("file", "row", "column", "value", "said"),
    [
        ("toy_py", 3, 1, "abc", "'abc' is not a number"),
        ("toy_py", 3, 1, "", "'' is not a number"),
        ("toy_py", 3, 1, "nan", "nan is not a finite number"),
        ("toy_py", 3, 1, "-inf", "-inf is not a finite number"),
        ("toy_py", 3, 1, "1e39", "1e+39 is not within the range of float32"),
        ("labels_py", 3, 0, "1.5", "1.5 is not a class number"),
        ("labels_py", 3, 0, "-1", "-1.0 is not a class number"),
        ("labels_py", 3, 0, "1e15", "below the number of rows, 12"),
        ("folds_py", 3, 1, "2", "2.0 is not 0 or 1"),
        ("validation_folds_py", 3, 0, "0.5", "0.5 is not 0 or 1"),
    ],
)
def test_bad_uci_cell_is_named(tmp_path: Path, file: str, row: int, column: int, value: str, said: str) -> None:
    files = uci_files()
    files[file][row][column] = value
    write_uci(tmp_path, files)
    place = f"{tmp_path / 'toy' / file}.dat, row {row + 1}, column {column + 1}: "
    fails(DataError, partial(read_uci, tmp_path, "toy"), place, said)


def relabel(files: dict, label: Callable[[int], int]) -> None:
    files["labels_py"] = [[label(row)] for row in range(ROWS)]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda f: f["toy_py"][4].pop(), ("toy_py.dat, row 5 has 2 columns, row 1 has 3",)),
        (lambda f: f["toy_py"].insert(4, []), ("toy_py.dat, row 5 has 1 columns",)),
        (lambda f: f["toy_py"].clear(), ("toy_py.dat is empty",)),
        (lambda f: f["labels_py"].pop(), ("labels_py.dat has 11 rows, the features 12",)),
        (lambda f: [row.append(0) for row in f["labels_py"]], ("labels_py.dat has 2 columns; expected one",)),
        (lambda f: f["folds_py"].pop(), ("/folds_py.dat has 11 rows",)),
        (lambda f: [row.pop() for row in f["validation_folds_py"]], ("has 1 columns", "/folds_py.dat has 2")),
        (lambda f: relabel(f, lambda row: 0), ("labels_py.dat, column 1", "class 0 only")),
        (lambda f: relabel(f, lambda row: 2 * (row % 2)), ("labels_py.dat, column 1", "no row of class 1")),
        (lambda f: f["folds_py"][2].__setitem__(0, 1), ("row 3, column 1 is 1 in", "/folds_py.dat and in")),
        (lambda f: [row.__setitem__(1, 0) for row in f["folds_py"]], ("column 2: no test rows", "fold 1")),
        (
            lambda f: f.update(folds_py=[[1 - cell for cell in row] for row in f["validation_folds_py"]]),
            ("folds_py.dat, column 1: no training rows", "fold 0"),
        ),
    ],
)
def test_bad_uci_files_are_named(tmp_path: Path, change: Callable[[dict], object], parts: tuple[str, ...]) -> None:
    files = uci_files()
    change(files)
    fails(DataError, partial(read_uci, write_uci(tmp_path, files), "toy"), *parts)


def test_absent_uci_folders_and_files_are_named(tmp_path: Path) -> None:
    fails(DataNotFoundError, partial(read_uci, tmp_path / "no", "toy"), tmp_path / "no", "data.root")
    fails(DataNotFoundError, partial(uci_names, tmp_path), tmp_path, "data.root")
    write_uci(tmp_path, uci_files())
    for name in ("toi", "../toy", "", "toy/"):
        fails(UnknownNameError, partial(read_uci, tmp_path, name), tmp_path, repr(name), "toy")
    labels = tmp_path / "toy/labels_py.dat"
    text = labels.read_bytes()
    labels.write_bytes(b"\xff\xfe\x00")
    fails(DataError, partial(read_uci, tmp_path, "toy"), "labels_py.dat", "as text")
    labels.write_bytes(text)
    for name in ("validation_folds", "folds", "labels"):
        (tmp_path / f"toy/{name}_py.dat").unlink()
        fails(DataNotFoundError, partial(read_uci, tmp_path, "toy"), f"/{name}_py.dat")


@pytest.mark.parametrize("fold", [0, 1])
def test_uci_splits_are_the_official_ones(tmp_path: Path, fold: int) -> None:
    files = uci_files()
    data = DataModule(UCI("toy", write_uci(tmp_path, files), fold))
    merged = DataModule(UCI("toy", tmp_path, fold, validation=False))
    features = torch.tensor(files["toy_py"], dtype=torch.float64)
    kind = torch.arange(ROWS) % 4 - fold
    for module, which, rows in (
        (data, "test", kind == 0),
        (data, "val", kind == 2),
        (data, "train", (kind != 0) & (kind != 2)),
        (merged, "test", kind == 0),
        (merged, "train", kind != 0),
    ):
        assert torch.equal(module.split(which).inputs, features[rows])
        assert torch.equal(module.split(which).labels, (torch.arange(ROWS) % 3)[rows])
    assert (data.name, data.input_shape, data.num_classes, data.input_range) == ("toy", (3,), 3, None)
    assert (data.has_validation, merged.has_validation, merged.val_dataloader()) == (True, False, [])
    assert data.scaling is not None
    assert (data.scaling.names, data.scaling.std) == (("1", "2", "3"), None)
    fails(ArgumentError, partial(merged.split, "val"), "validation=false", "data.validation=true")


def test_uci_folds_that_are_not_there(tmp_path: Path) -> None:
    files = uci_files()
    files["validation_folds_py"] = [[0, mark] for _, mark in files["validation_folds_py"]]
    write_uci(tmp_path, files)
    data = DataModule(UCI("toy", tmp_path))
    fails(DataError, data.setup, "fold 0 of toy has no validation rows", "data.validation=false")
    assert len(UCI("toy", tmp_path, validation=False).load().train) == 9
    fails(ArgumentError, DataModule(UCI("toy", tmp_path, fold=2)).setup, "fold=2", "0 … 1")
    bad: list[Any] = [-1, 1.0, True, "0"]
    for fold in bad:
        fails(ArgumentError, partial(UCI, "toy", tmp_path, fold), "fold", repr(fold))
    answer: Any = "no"
    fails(ArgumentError, partial(UCI, "toy", tmp_path, validation=answer), "validation", "'no'")


@pytest.mark.parametrize(
    "choice", [["data=uci", "data.validation=true"], ["data=uci", "data.validation=false"], ["experiment=uci_ldlt"]]
)
def test_uci_trains_and_certifies(tmp_path: Path, choice: list[str]) -> None:
    write_uci(tmp_path / "uci121", uci_files())
    cli.train(compose("train", *choice, *SMALL, f"output={tmp_path}/run", "data.name=toy", f"data.root={tmp_path}"))
    ckpt = tmp_path / "run/checkpoints/best.ckpt"
    results = cli.certify(compose("certify", f"ckpt={ckpt}", f"output={tmp_path}/out"))
    assert results["run"]["samples"] == 3
    written = json.loads((tmp_path / "out/report.json").read_text())
    assert written["data"]["unit"] == "standardised features"
    assert "in the norm of standardised features," in written["statement"]
    assert "units" not in written


def with_data(path: Path, data: dict[str, Any]) -> Path:
    """The checkpoint with another config of its data."""
    content = torch.load(path, weights_only=True)
    content["liplayers"]["config"]["data"] = data
    torch.save(content, path.with_name("older.ckpt"))
    return path.with_name("older.ckpt")


@pytest.mark.parametrize("validation", [True, False])
def test_a_checkpoint_with_the_earlier_name_is_certified_alike(tmp_path: Path, validation: bool) -> None:
    write_uci(tmp_path, uci_files())
    own = {"name": "toy", "root": str(tmp_path), "fold": 1, "validation": validation, "batch_size": 4, "augment": []}
    settings = [*SMALL, f"output={tmp_path}/run", "data=uci", *(f"data.{key}={value}" for key, value in own.items())]
    cli.train(compose("train", *settings))
    now = tmp_path / "run/checkpoints/best.ckpt"
    older = with_data(now, own | {"_target_": "liplayers.data.UCIData", "eval_batch_size": 5, "seed": 0})
    for split in ("test", "train"):
        first, second = (
            cli.certify(compose("certify", f"ckpt={path}", f"data.split={split}", f"output={tmp_path}/{path.stem}"))
            for path in (now, older)
        )
        assert first == second
        assert first["run"]["samples"] == {"test": 3, "train": 6 if validation else 9}[split]


def test_a_command_without_the_benchmarks_says_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "benchmarks.uci.data", None)
    for name in ("benchmarks.uci.data.UCI", "liplayers.data.UCIData"):
        settings: Any = {"_target_": name, "name": "toy", "root": "x"}
        said = ("benchmarks.uci.data.UCI", "a clone of the repository")
        fails(ConfigError, partial(build_data, OmegaConf.create(settings)), *said)
        read: Any = None  # from no file
        fails(ConfigError, partial(check_config, read, {"data": settings}, []), *said)


# Training -------------------------------------------------------------------------------------------------------------


def train_alone(model: nn.Module, features: Tensor, labels: Tensor, batches: Tensor, recipe: Recipe) -> None:
    loss = OffsetCrossEntropy(recipe.offset, recipe.temperature)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr, betas=recipe.betas)
    schedule = warmup_cosine(optimizer, recipe.steps, recipe.warmup)
    for rows in batches:
        optimizer.zero_grad()
        loss(model(features[rows]), labels[rows]).backward()
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("features", [3, 9], ids=["padded", "stem"])
def test_training_together_gives_the_weights_of_training_alone(method, features):
    recipe = Recipe(steps=6, lr=0.05)
    torch.manual_seed(0)
    x, y = torch.randn(20, features, dtype=torch.float64), torch.randint(3, (20,))
    together = [METHODS[method](features, 3, 6, 2).double() for _ in range(3)]
    alone = [METHODS[method](features, 3, 6, 2).double() for _ in range(3)]
    for a, b in zip(together, alone, strict=True):
        for p in a.parameters():
            nn.init.normal_(p, std=0.3)
        b.load_state_dict(a.state_dict())
    initial = [p.clone() for p in together[0].parameters()]
    batches = torch.randint(20, (recipe.steps, 3, 8))
    train_together(together, x, y, batches, recipe)
    for i, (a, b) in enumerate(zip(together, alone, strict=True)):
        train_alone(b, x, y, batches[:, i], recipe)
        for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
            # a dead unit's gradients are rounding errors of 1e-16, and Adam multiplies them by lr/1e-8 at each step
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-7, msg=f"model {i}, {name}")
    assert any((p - q).abs().max() > 0.1 for p, q in zip(together[0].parameters(), initial, strict=True))


def test_every_row_is_seen_once_in_each_epoch_and_short_sets_wrap_round():
    rows = torch.tensor([2, 3, 5, 7, 11])
    seen = shuffled_batches(rows, 4, 5, torch.Generator().manual_seed(0))
    assert seen.shape == (5, 4)
    epochs = seen.flatten().view(4, 5)
    assert all(sorted(epoch) == rows.tolist() for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > 1
    assert shuffled_batches(rows[:1], 3, 2, torch.Generator()).tolist() == [[2, 2, 2], [2, 2, 2]]


def test_training_rows_are_never_the_rows_that_are_certified(root, monkeypatch):
    data = read_uci(root, "flowers")
    seen: list[Tensor] = []
    monkeypatch.setattr(uci_jobs, "train_together", lambda models, x, y, batches, recipe: seen.append(batches))
    run_job(data, "aol", Configuration(Recipe(steps=40), 1, 4, 1, "test"))
    run_job(data, "aol", Configuration(Recipe(steps=40), 1, 4, 1, "validation"))
    for fold in range(2):
        final, tuning = (set(batches[:, fold].flatten().tolist()) for batches in seen)
        test, validation = (set(m[:, fold].nonzero()[:, 0].tolist()) for m in (data.test, data.validation))
        assert final == set(range(24)) - test
        assert tuning == set(range(24)) - test - validation


def test_methods_see_the_same_batches_and_folds_and_seeds_others(root, monkeypatch):
    data = read_uci(root, "flowers")
    seen: list[Tensor] = []
    starts: list[list[Tensor]] = []

    def record(models, x, y, batches, recipe):
        seen.append(batches)
        starts.append([next(m.parameters()).clone() for m in models])

    monkeypatch.setattr(uci_jobs, "train_together", record)
    for method in ("aol", "sll"):
        run_job(data, method, QUICK)
    assert torch.equal(*seen)
    assert len({tuple(batches.flatten().tolist()) for batches in seen[0].unbind(1)}) == 4
    fold0_seed0, fold0_seed1, fold1_seed0, _ = starts[0]
    assert torch.equal(fold0_seed0, fold1_seed0)
    assert not torch.equal(fold0_seed0, fold0_seed1)


def test_the_result_is_what_certify_says_of_the_trained_model(root):
    data = read_uci(root, "flowers")
    recipe, method = Recipe(steps=30, lr=0.05), "cayley"
    result = run_job(data, method, Configuration(recipe, depth=2, width=6, seeds=1))
    rows = (~data.test[:, 1]).nonzero()[:, 0]
    torch.manual_seed(0)
    model = METHODS[method](3, 3, 6, 2)
    generator = torch.Generator().manual_seed(uci_jobs.zlib.crc32(b"flowers 1 0"))
    train_alone(model, data.features.float(), data.labels, shuffled_batches(rows, 18, 30, generator), recipe)
    test = data.test[:, 1]
    network = CertifiedNetwork(model, (3,), 3)
    certificates = certify(network, [(data.features[test], data.labels[test])], input_range=None)
    found = result["models"][1]
    assert (found["fold"], found["seed"], found["n_test"]) == (1, 0, 6)
    assert found["bound"] == pytest.approx(network.bounds.split.body_bound, rel=1e-6)
    assert found["clean"] == certificates.clean_accuracy
    for radius in (36, 72, 108, 255):
        assert found[f"c{radius}"] == certificates.accuracy(radius / 255)
    assert found["clean"] > 0.5
    assert found["c36"] > 0


# The budget -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("features", "classes"), [(4, 3), (60, 2), (17, 40)])
def test_no_other_width_is_nearer_to_the_budget(method, features, classes):
    budget = features * 16 + 16 + 2 * (16 * 16 + 16) + 16 * classes + classes
    assert count_parameters("aol", features, classes, 16, 3) == budget
    width = matched_width(method, features, classes, 16, 3)

    def distance(w: int) -> int:
        return abs(sum(p.numel() for p in METHODS[method](features, classes, w, 3).parameters()) - budget)

    assert distance(width) == min(distance(w) for w in range(1, 33))
    assert distance(width) <= 0.1 * budget


def test_features_are_padded_or_mapped_orthogonally_but_never_cut_off():
    x = torch.randn(5, 7)
    for width in (12, 3):
        first = METHODS["sll"](7, 2, width, 1).body[0]
        assert first(x).shape == (5, width)
        matrix = first(torch.eye(7)) - first(torch.zeros(1, 7))
        singular = torch.linalg.svdvals(matrix)
        torch.testing.assert_close(singular, torch.ones(min(7, width)))


# Results --------------------------------------------------------------------------------------------------------------


def test_only_what_is_missing_runs_again(root, tmp_path):
    output = tmp_path / "out"
    assert run(root, output) == 6
    files = sorted((output / "jobs").iterdir())
    assert [f.name for f in files][:2] == ["flowers.aol.json", "flowers.sll.json"]
    before = {f.name: f.read_bytes() for f in files}
    (output / "jobs" / "stones.sll.json").unlink()
    times = {f.name: f.stat().st_mtime_ns for f in (output / "jobs").iterdir()}
    assert run(root, output) == 1
    assert all((output / "jobs" / name).stat().st_mtime_ns == time for name, time in times.items())
    again, first = (
        json.loads(text) for text in ((output / "jobs/stones.sll.json").read_bytes(), before["stones.sll.json"])
    )
    assert again["models"] == first["models"]
    assert run(root, output, methods=("aol", "sll", "cayley")) == 3


def test_an_interrupt_keeps_what_is_finished_and_is_one_line(root, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    done: list[str] = []

    def interrupted(self: Job) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(self.name)
        original(self)

    original = Job.run
    monkeypatch.setattr(Job, "run", interrupted)
    assert command(root, output, "--methods", "aol") == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("stopped; finished results are kept")
    assert len(list((output / "jobs").iterdir())) == 2
    monkeypatch.setattr(Job, "run", original)
    assert len(plan_jobs(root, output, None, ("aol",), QUICK)) == 1


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (Configuration(Recipe(steps=4), 2, 6, 2), "steps 3, not 4"),
        (Configuration(Recipe(steps=3), 3, 6, 2), "depth 2, not 3"),
        (Configuration(Recipe(steps=3), 2, 6, 2, "validation"), "rows test, not validation"),
    ],
)
def test_results_of_another_configuration_are_refused(root, tmp_path, other, named):
    run(root, tmp_path / "out", methods=("aol",))
    before = sorted(p.name for p in (tmp_path / "out" / "jobs").iterdir())
    with pytest.raises(DataError, match=named) as caught:
        run(root, tmp_path / "out", other, methods=("aol", "sll"))
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in (tmp_path / "out" / "jobs").iterdir()) == before


def test_the_report_refuses_mixed_and_broken_files(root, tmp_path):
    output = tmp_path / "out"
    run(root, output, methods=("aol",))
    path = output / "jobs" / "wells.aol.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"configuration": content["configuration"] | {"liplayers": "0.0.9"}}))
    with pytest.raises(DataError, match=r"liplayers 0.0.9, not"):
        write_report(output)
    for broken in ("{", "[]", "{}", '"set"'):
        path.write_text(broken)
        with pytest.raises(DataError, match=r"wells\.aol\.json: not a result"):
            write_report(output)
    assert not (output / "uci.md").exists()


def test_worker_processes_give_the_same_results(root, tmp_path):
    jobs = plan_jobs(root, tmp_path / "two", ["stones"], ("aol", "sll"), QUICK)
    run_jobs(jobs, processes=2, console=None)
    run(root, tmp_path / "one")
    for method in ("aol", "sll"):
        one, two = (json.loads((tmp_path / n / "jobs" / f"stones.{method}.json").read_text()) for n in ("one", "two"))
        assert one["models"] == two["models"]


def test_workers_start_with_one_thread_and_deaf_to_interrupts(monkeypatch):
    handler = signal.getsignal(signal.SIGINT)
    for threads in (None, "3"):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if threads is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", threads)
        with uci_run._as_workers_shall_start():
            assert os.environ["OMP_NUM_THREADS"] == "1"
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert os.environ.get("OMP_NUM_THREADS") == threads
        assert signal.getsignal(signal.SIGINT) is handler


def test_an_error_in_a_worker_is_the_error_of_the_run(root, tmp_path):
    jobs = plan_jobs(root, tmp_path / "out", ["stones"], ("aol",), QUICK)
    (root / "stones" / "labels_py.dat").write_text("x\n")
    with pytest.raises(LipschitzError, match="labels_py"):
        run_jobs(jobs, processes=2, console=None)


# The command ----------------------------------------------------------------------------------------------------------


def test_unknown_names_and_bad_values_are_one_line_before_anything_runs(root, tmp_path, capsys):
    output = tmp_path / "out"
    wrong = [
        (["--sets", "flower"], "unknown UCI set 'flower': did you mean flowers?"),
        (["--methods", "aoll"], "unknown method 'aoll': did you mean aol"),
        (["--seeds", "0"], "seeds=0"),
        (["--temperature", "0"], "temperature=0.0"),
        (["--lr", "nan"], "lr=nan"),
        (["--report-only"], "no set has results of every method"),
    ]
    for arguments, message in wrong:
        assert command(root, output, *arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert message in line
    assert main(["--output", str(output)]) == 2
    assert command(tmp_path / "nowhere", output) == 2
    assert not list(output.glob("jobs/*"))


def test_the_command_runs_and_reports(root, tmp_path, capsys):
    output = tmp_path / "out"
    assert command(root, output, "--sets", "flowers, wells", "--methods", "sll,aol") == 0
    names = {p.name for p in output.iterdir()}
    assert names == {"jobs", "results.csv", "uci.md", "mean.png", *(f"cd_{metric}.png" for metric in METRICS)}
    first = {p.name: p.read_bytes() for p in output.glob("*.*") if p.suffix != ".png"}
    assert main(["--report-only", "--output", str(output)]) == 0
    assert {p.name: p.read_bytes() for p in output.glob("*.*") if p.suffix != ".png"} == first
    assert str(tmp_path) not in b"".join(first.values()).decode()
    assert all(str(tmp_path) not in p.read_text() for p in (output / "jobs").iterdir())


def test_the_recipe_is_chosen_on_validation_rows_for_all_methods(root, tmp_path, capsys, monkeypatch):
    def fake(data: UCISet, method: str, configuration: Configuration) -> dict:
        assert configuration.rows == "validation"
        recipe = configuration.recipe
        value = {"aol": recipe.lr * 10, "sll": 0.5 - recipe.lr}[method] + 0.1 * (recipe.offset == 1.0)
        model = {"fold": 0, "seed": 0, **dict.fromkeys(METRICS, value), "c255": -100.0 * value}
        result = dict.fromkeys(FIELDS, 0) | {"set": data.name, "method": method, "models": [model]}
        return result | {"configuration": configuration.record()}

    monkeypatch.setattr(uci_run, "run_job", fake)
    grid = {"LEARNING_RATES": (0.005, 0.02), "OFFSETS": (1.0, 2.0), "TEMPERATURES": (0.25, 1.0)}
    for name, values in grid.items():
        monkeypatch.setattr(selection, name, values)
    assert command(root, tmp_path / "out", "--select", "--sets", "wells,stones", "--methods", "aol,sll") == 0
    assert "lr=0.02, offset=1.0, temperature=0.25" in capsys.readouterr().out
    text = (tmp_path / "out" / "recipes.md").read_text()
    (best,) = (line for line in text.splitlines() if "**" in line)
    assert best == "| 0.02 | 1.0 | 0.25 | **44.00** | 30.00 | 58.00 |"


# The report -----------------------------------------------------------------------------------------------------------


def write_results(folder: Path, table: dict[str, dict[str, list[float]]], samples: int = 100) -> None:
    """Files of {set: {method: clean accuracy of each model}}; certified accuracies are a tenth less at each radius."""
    (folder / "jobs").mkdir(parents=True)
    for name, methods in table.items():
        for method, values in methods.items():
            models = [
                {"fold": i, "seed": 0, "n_test": 7, "not_finite": 0, "bound": 1.0}
                | {metric: value - 0.1 * k for k, metric in enumerate(METRICS)}
                for i, value in enumerate(values)
            ]
            content = {"configuration": QUICK.record(), "set": name, "method": method, "samples": samples, "width": 6}
            content |= {"features": 3, "classes": 3, "parameters": 99 + len(method), "torch": "2", "cores": 2}
            content |= {"seconds": 1.0, "models": models}
            (folder / "jobs" / f"{name}.{method}.json").write_text(json.dumps(content))


TABLE = {
    "a": {"aol": [0.9, 0.7], "cayley": [0.7, 0.8], "sll": [0.6, 0.8]},
    "b": {"aol": [0.5, 0.5], "cayley": [0.5, 0.6], "sll": [0.5, 0.5]},
    "c": {"aol": [0.6, 0.6], "cayley": [0.9, 0.9], "sll": [0.8, 0.8]},
}


def test_the_report_has_the_means_the_ranks_and_the_rows(tmp_path):
    write_results(tmp_path, TABLE | {"d": {"aol": [1.0]}})
    write_report(tmp_path)
    lines = (tmp_path / "uci.md").read_text().splitlines()
    assert "- left out, for want of a method: d" in lines
    clean = lines[lines.index("## Comparison: clean accuracy") :]
    (aol,) = (line for line in clean[:12] if line.startswith("| aol"))
    assert aol.startswith("| aol | 63.33 | 2.17 | 1 / 1 / 1 | -3.33 | – |")
    assert "| a | 80.00 | 75.00 | 70.00 |" in lines
    assert "| a | 70.00 | 65.00 | 60.00 |" in lines
    assert "| **mean** | 63.33 | 73.33 | 66.67 |" in lines
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 19
    assert list(rows[0]) == [
        *("set", "method", "fold", "seed", "clean", "c36", "c72", "c108", "c255", "n_test", "parameters", "bound")
    ]
    assert [(row["fold"], float(row["clean"])) for row in rows if (row["set"], row["method"]) == ("a", "sll")] == [
        ("0", 0.6),
        ("1", 0.8),
    ]


def test_small_sets_and_logits_that_are_not_finite_are_listed(tmp_path):
    write_results(tmp_path, TABLE, samples=49)
    path = tmp_path / "jobs" / "b.sll.json"
    content = json.loads(path.read_text())
    content["models"][1]["not_finite"] = 3
    path.write_text(json.dumps(content))
    write_report(tmp_path)
    text = (tmp_path / "uci.md").read_text()
    assert "- sets with fewer than 50 rows: a (49), b (49), c (49)" in text
    assert "- models with logits that are not finite: b, sll" in text


def test_one_method_alone_is_reported_without_comparison_plots(tmp_path):
    write_results(tmp_path, {"a": {"aol": [0.5]}})
    assert [p.name for p in write_report(tmp_path)] == ["results.csv", "uci.md", "mean.png"]


def test_scores_need_one_set_with_all_methods():
    with pytest.raises(DataError, match="no set has results of every method"):
        scores_of([])
    assert read_results(Path("no such folder")) == []


# Statistics -----------------------------------------------------------------------------------------------------------

# AUC of C4.5 and C4.5+m on 14 sets, Demšar 2006, Table 2
C45 = [0.763, 0.599, 0.954, 0.628, 0.882, 0.936, 0.661, 0.583, 0.775, 1.000, 0.940, 0.619, 0.972, 0.957]
C45_M = [0.768, 0.591, 0.971, 0.661, 0.888, 0.931, 0.668, 0.583, 0.838, 1.000, 0.962, 0.666, 0.981, 0.978]


def test_ranks_share_ties_and_ignore_rounding():
    scores = np.array([[0.3, 0.1 + 0.2, 0.1], [0.5, 0.4, 0.6]])
    assert statistics.average_ranks(scores).tolist() == [1.75, 2.25, 2.0]
    assert statistics.wins_ties_losses(scores[:, 0], scores[:, 1]) == (1, 1, 0)


def test_wilcoxon_splits_equal_scores_as_in_demsars_example():
    a, b = np.array(C45_M), np.array(C45)
    rank = stats.rankdata(np.abs(a - b).round(10))
    plus = rank[a > b].sum() + rank[a == b].sum() / 2
    assert plus == 93.0
    n = len(a)
    z = (min(plus, n * (n + 1) / 2 - plus) - n * (n + 1) / 4) / math.sqrt(n * (n + 1) * (2 * n + 1) / 24)
    assert statistics.wilcoxon(a, b) == pytest.approx(2 * stats.norm.cdf(z), rel=0.1)
    assert statistics.wilcoxon(a, b) == statistics.wilcoxon(b, a)
    assert statistics.wilcoxon(a, a) == 1.0


def test_wilcoxon_of_six_wins_is_exact():
    assert statistics.wilcoxon(np.arange(1.0, 7) * 1.1, np.arange(1.0, 7)) == pytest.approx(2 / 2**6)


def test_holm_is_monotone_and_keeps_the_order():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.6]) == [1.0, 1.0]


def test_pairwise_tests_are_symmetric_and_corrected_for_their_number():
    random = np.random.default_rng(0)
    scores = random.random((12, 3)) + np.array([0, 0.05, 0.6])
    table = statistics.pairwise(scores)
    raw = [statistics.wilcoxon(scores[:, i], scores[:, j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert np.array_equal(table, table.T)
    assert np.diag(table).tolist() == [1.0] * 3
    assert table[[0, 0, 1], [1, 2, 2]].tolist() == pytest.approx(statistics.holm(raw))
    assert statistics.friedman(scores) == pytest.approx(stats.friedmanchisquare(*scores.T).pvalue)
    assert math.isnan(statistics.friedman(scores[:, :2]))


@pytest.mark.parametrize(("methods", "q"), [(2, 1.960), (3, 2.343), (5, 2.728), (7, 2.949), (10, 3.164)])
def test_the_critical_difference_has_demsars_constants(methods, q):
    expected = q * math.sqrt(methods * (methods + 1) / (6 * 116))
    assert statistics.critical_difference(methods, 116) == pytest.approx(expected, rel=5e-4)


def test_bars_join_what_is_not_told_apart():
    assert statistics.groups([3.0, 1.0, 1.9, 2.8], 1.0) == [(1.0, 1.9), (1.9, 2.8), (2.8, 3.0)]
    assert statistics.groups([1.0, 2.0], 1.0) == []
    assert statistics.groups([2.0, 2.0], 0.5) == [(2.0, 2.0)]
    figure = critical_difference_plot(["x", "y", "z"], [1.0, 1.5, 3.0], 1.0, "title")
    assert isinstance(figure, Figure)
    (bar,) = (line for line in figure.axes[0].lines if line.get_linewidth() > 3)
    assert np.asarray(bar.get_xdata()).tolist() == pytest.approx([1.0, 1.5], abs=0.1)
    assert {"x  1.00", "y  1.50", "3.00  z"} <= {text.get_text() for text in figure.axes[0].texts}


def test_a_recipe_refuses_what_cannot_train():
    for wrong in ({"steps": 0}, {"batch_size": 0}, {"lr": 0.0}, {"lr": math.inf}, {"warmup": 1.0}, {"offset": -1.0}):
        with pytest.raises(ArgumentError):
            Recipe(**wrong)
