"""Tables: CSV and parquet files, standardisation by the training rows, and what a radius means."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pyarrow import parquet
from rich.console import Console
from torch import nn

from liplayers import cli
from liplayers.certification import Certificates, CertifiedNetwork, certify, report
from liplayers.data import DataModule, Loaded, Source, Split, Table, validate_inputs
from liplayers.errors import (
    ArgumentError,
    CheckpointError,
    ConfigError,
    DataError,
    DataNotFoundError,
    ShapeError,
    UnknownNameError,
)
from liplayers.models import lipconvnet, mlp

CONFIGS = Path(__file__).parent.parent / "configs"


def fails(kind: type[Exception], call: Callable[[], object], *parts: object) -> None:
    """`call` raises `kind` with one line that has every part."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, f"{part!r} not in {message!r}"


# --- CSV and parquet ------------------------------------------------------------------------------------------------


def frame(rows: int = 40) -> pd.DataFrame:
    draw = np.random.default_rng(1)
    return pd.DataFrame(
        {
            "mass": draw.normal(70, 12, rows),
            "legs": draw.integers(0, 9, rows),
            "tame": draw.random(rows) < 0.5,
            "kind": [("ox", "cat", "emu")[row % 3] for row in range(rows)],
        }
    )


def save(table: pd.DataFrame, path: Path) -> Path:
    table.to_parquet(path) if path.suffix == ".parquet" else table.to_csv(path, index=False)
    return path


def table_data(*files: Any, val_fraction: float = 0.1, seed: int = 0, **options: Any) -> DataModule:
    return DataModule(Table(*files, **options), val_fraction=val_fraction, seed=seed)


def scaling(data: DataModule) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    assert data.scaling is not None
    return data.scaling.names, np.array(data.scaling.mean), np.array(data.scaling.std)


def numbers(table: pd.DataFrame) -> np.ndarray:
    return table[["mass", "legs", "tame"]].to_numpy(np.float64)


@pytest.mark.parametrize("ending", [".csv", ".parquet", ".CSV"])
def test_scaling_is_that_of_the_training_rows_alone(tmp_path: Path, ending: str) -> None:
    train, test = frame(40), frame(65)[40:]
    path = save(train, tmp_path / f"pets{ending}")
    # The order of columns in the test file is its own.
    data = table_data(path, "kind", save(test[["kind", "tame", "mass", "legs"]], tmp_path / "b.csv"), val_fraction=0.25)
    assert (data.split("val").inputs.dtype, len(data.split("val")), data.input_shape) == (torch.float64, 10, (3,))
    assert (data.name, data.class_names, data.unit) == ("pets", ("cat", "emu", "ox"), "standardised features")
    names, mean, std = scaling(data)
    assert names == ("mass", "legs", "tame")
    original = {which: data.split(which).inputs.numpy() * std + mean for which in ("train", "val", "test")}
    assert np.allclose(original["test"], numbers(test), rtol=1e-12, atol=1e-12)
    together = np.sort(np.concatenate([original["train"], original["val"]])[:, 0])
    assert np.allclose(together, np.sort(train["mass"]), rtol=1e-5)
    inside = np.isin(train["mass"].round(3), original["train"][:, 0].round(3))
    assert inside.sum() == 30
    assert np.allclose(mean, numbers(train[inside]).mean(0), rtol=1e-12)
    assert np.allclose(std, np.sqrt(((numbers(train[inside]) - mean) ** 2).mean(0)), rtol=1e-12)


def test_test_rows_are_the_same_for_every_seed_and_apart_from_training(tmp_path: Path) -> None:
    path = save(frame().assign(mass=np.arange(40.0)), tmp_path / "a.csv")
    drawn = []
    for seed in (0, 1):
        data = table_data(path, "kind", test_fraction=0.25, seed=seed)
        _, mean, std = scaling(data)
        rows: dict[str, list[int]] = {}
        for which in ("train", "val", "test"):
            masses = data.split(which).inputs[:, 0].numpy() * std[0] + mean[0]
            rows[which] = masses.round().astype(int).tolist()
            labels = [data.class_names[label] for label in data.split(which).labels]
            assert labels == [("ox", "cat", "emu")[row % 3] for row in rows[which]]
        assert sorted([*rows["train"], *rows["val"], *rows["test"]]) == list(range(40))
        drawn.append(rows)
    assert drawn[0]["test"] == drawn[1]["test"]
    assert len(drawn[0]["test"]) == 10
    assert drawn[0]["val"] != drawn[1]["val"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arrays(np.float64, (12, 2), elements=st.floats(-1e6, 1e6), unique=True), st.floats(1e-3, 1e3))
def test_standardised_table_comes_back_from_a_csv_file(tmp_path: Path, values: np.ndarray, scale: float) -> None:
    """Standardising twice, or in another unit, changes nothing but rounding."""
    std = values.std(0)
    assume((std > 1e-3).all())
    standardised = (values - values.mean(0)) / std
    labels = np.arange(12) % 2
    path, other = tmp_path / "a.csv", tmp_path / "b.csv"
    for table, file in ((standardised, path), (values * scale, other)):
        pd.DataFrame({"a": table[:, 0], "b": table[:, 1], "y": labels}).to_csv(file, index=False)
    for file in (path, other):
        data = table_data(file, "y", path, val_fraction=0)
        inputs = data.split("train").inputs
        assert np.allclose(inputs, standardised, atol=1e-5)
        assert data.split("train").labels.tolist() == labels.tolist()


@pytest.mark.parametrize(
    ("target", "classes", "labels"),
    [
        ([10, 9, 2, 10], ("2", "9", "10"), [2, 1, 0, 2]),
        ([True, False, True, True], ("False", "True"), [1, 0, 1, 1]),
        ([1.0, 0.0, 1.0, 0.0], ("0.0", "1.0"), [1, 0, 1, 0]),
        (["b", "a", "a", "b"], ("a", "b"), [1, 0, 0, 1]),
        (pd.Categorical(["b", "a", "a", "b"], ["c", "b", "a"]), ("a", "b"), [1, 0, 0, 1]),
        (pd.array([3, 1, 3, 1], "Int64"), ("1", "3"), [1, 0, 1, 0]),
    ],
)
@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_classes_are_the_sorted_labels(
    tmp_path: Path, target: Any, classes: tuple[str, ...], labels: list[int], ending: str
) -> None:
    path = save(pd.DataFrame({"x": [1.0, 2.0, 3.0, 4.0], "y": target}), tmp_path / f"a.{ending}")
    data = table_data(path, "y", path, val_fraction=0)
    assert data.split("train").labels.tolist() == labels
    assert data.class_names == classes


def test_features_are_taken_in_the_order_given(tmp_path: Path) -> None:
    path = save(frame().assign(note="a word"), tmp_path / "a.csv")
    test = save(frame().drop(columns="tame"), tmp_path / "b.csv")
    data = table_data(path, "kind", test, features=["legs", "mass"], val_fraction=0)
    names, mean, _ = scaling(data)
    assert names == ("legs", "mass")
    assert np.allclose(mean, frame()[["legs", "mass"]].mean())


def test_nullable_columns_without_nulls_are_numbers(tmp_path: Path) -> None:
    table = frame().convert_dtypes().astype({"mass": "float32"})
    data = table_data(save(table, tmp_path / "a.parquet"), "kind")
    plain = table_data(save(frame().astype({"mass": "float32"}), tmp_path / "b.parquet"), "kind")
    assert data.fingerprint("test") == plain.fingerprint("test")


def holed(column: str, value: object) -> pd.DataFrame:
    table = frame().astype({column: object})
    table.loc[7, column] = value
    return table


BAD_TABLES: dict[str, tuple[pd.DataFrame, tuple[str, ...]]] = {
    "missing": (holed("mass", None), ("row 8, column 'mass' is missing", "data.features")),
    "missing boolean": (holed("tame", None), ("row 8, column 'tame' is missing",)),
    "infinite": (holed("mass", math.inf).astype({"mass": float}), ("row 8, column 'mass' is inf",)),
    "text": (frame().assign(note="word"), ("column 'note' holds string values", "one-hot", "data.features")),
    "text in numbers": (holed("legs", "many").astype({"legs": str}), ("column 'legs' holds string values",)),
    "constant": (frame().assign(one=0.1), ("40 training rows", "'one' (0)", "data.features")),
    "immense": (frame().assign(far=np.arange(40) * 1e200), ("'far' (inf)",)),
    "unlabelled": (holed("kind", None), ("target column 'kind' is missing in row 8",)),
    "one class": (frame().assign(kind="ox"), ("the class 'ox' only",)),
    "fraction": (frame().assign(kind=np.arange(40) / 2), ("target column 'kind' is 0.5 in row 2", "no class")),
    "no rows": (frame()[:0], ("has no rows",)),
    "target only": (frame()[["kind"]], ("no column but the target 'kind'",)),
}


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_tables_are_named(tmp_path: Path, name: str, ending: str) -> None:
    table, parts = BAD_TABLES[name]
    path = save(table, tmp_path / f"bad.{ending}")
    fails(DataError, table_data(path, "kind", path, val_fraction=0).setup, path, *parts)


@pytest.mark.parametrize("name", ["missing", "infinite", "text in numbers", "unlabelled", "fraction", "no rows"])
def test_bad_test_tables_are_named(tmp_path: Path, name: str) -> None:
    table, parts = BAD_TABLES[name]
    path = save(table, tmp_path / "bad.csv")
    fails(DataError, table_data(save(frame(), tmp_path / "good.csv"), "kind", path).setup, path, *parts)


def test_only_parquet_holds_dates_and_lists(tmp_path: Path) -> None:
    for name, value in (("dates", pd.Timestamp("2020-01-01")), ("lists", [1, 2])):
        table = frame().assign(odd=[value] * 40)
        fails(DataError, table_data(save(table, tmp_path / f"{name}.parquet"), "kind").setup, "column 'odd' holds")
        fails(DataError, table_data(tmp_path / f"{name}.parquet", "odd", features=["mass"]).setup, "'odd' holds values")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ("cannot be read",)),
        (b"a,b,a,y\n1,2,3,0\n", ("columns 1 and 3 are both called 'a'",)),
        (b",a,y\n0,1,0\n1,2,1\n", ("column 1 has no name", "index=False")),
        (b"a,y\n5,1,0\n6,2,1\n7,2,1\n", ("more columns than its header",)),
        (b"a,y\n0,1,0\n1,2,1\n2,2,1\n", ("more columns than its header",)),
        (b"a,y\n1,0\n1,2,1\n", ("row 2 has more columns than its header", "decimals with a point")),
        (b"a,y\n1,0\n2\n", ("'y' is missing in row 2",)),
        (b"a,y\n1,0\n,1\n", ("row 2, column 'a' is missing",)),
        (b"a,y\n\xff,0\n", ("cannot be read",)),
        (b"a,y\n", ("has no rows",)),
    ],
)
def test_bad_csv_files_are_named(tmp_path: Path, content: bytes, parts: tuple[str, ...]) -> None:
    (tmp_path / "bad.csv").write_bytes(content)
    data = table_data(tmp_path / "bad.csv", "y", test_fraction=0.5, val_fraction=0)
    fails(DataError, data.setup, tmp_path / "bad.csv", *parts)


def test_bad_parquet_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.parquet"
    whole = save(frame(), path).read_bytes()
    for content in (b"", b"a,y\n1,2\n", whole[:-20], whole[: len(whole) // 2]):
        path.write_bytes(content)
        fails(DataError, table_data(path, "kind").setup, path, "cannot be read")
    parquet.write_table(pa.table([[1, 2], [3, 4], [0, 1]], names=["a", "a", "kind"]), path)
    fails(DataError, table_data(path, "kind").setup, path, "columns 1 and 2 are both called 'a'")


def test_absent_files_and_columns_are_named(tmp_path: Path) -> None:
    good = save(frame(), tmp_path / "good.csv")
    fails(DataNotFoundError, table_data(tmp_path / "no.csv", "kind").setup, tmp_path / "no.csv", "data.train")
    fails(DataNotFoundError, table_data(good, "kind", tmp_path).setup, tmp_path, "data.test")
    (tmp_path / "good.txt").write_bytes(good.read_bytes())
    fails(DataError, table_data(tmp_path / "good.txt", "kind").setup, "good.txt", ".csv", ".parquet")
    fails(UnknownNameError, table_data(good, "kinds").setup, good, "'kinds'", "did you mean kind?")
    fails(UnknownNameError, table_data(good, "kind", features=["mas"]).setup, good, "'mas'", "did you mean mass?")
    other = save(frame().rename(columns={"legs": "arms"}), tmp_path / "other.csv")
    fails(DataError, table_data(good, "kind", other).setup, other, "no legs", "also arms", good)
    more = save(frame().replace("emu", "elk"), tmp_path / "more.csv")
    fails(DataError, table_data(good, "kind", more).setup, more, "'elk' in row 3", "no class", good)


def test_bad_table_arguments_are_named(tmp_path: Path) -> None:
    good = save(frame(), tmp_path / "good.csv")
    fractions: list[Any] = [0, 1, -0.5, math.nan, True, "half"]
    for fraction in fractions:
        fails(ArgumentError, partial(Table, good, "kind", test_fraction=fraction), "test_fraction", repr(fraction))
    for features in ("mass", [], ["mass", "mass"]):
        fails(ArgumentError, partial(Table, good, "kind", features=features), "features", repr(features))
    fails(ArgumentError, partial(Table, good, "kind", features=["mass", "kind"]), "'kind' is the target")
    fails(ArgumentError, table_data(good, "kind", test_fraction=0.001).setup, "test_fraction=0.001", "40")
    fails(ArgumentError, table_data(good, "kind", val_fraction=0.001).setup, "val_fraction=0.001", "data.val_fraction")


def test_test_value_beyond_float32_is_named(tmp_path: Path) -> None:
    good = save(frame(), tmp_path / "a.csv")
    far = save(holed("mass", 1e300).astype({"mass": float}), tmp_path / "b.csv")
    fails(
        DataError,
        table_data(good, "kind", far).setup,
        "a test inputs",
        "sample 7",
        "at (0,)",
        "beyond the range of float32",
    )


# --- the generic base -----------------------------------------------------------------------------------------------


class Cubes(Source):
    """Inputs with four axes; official validation samples."""

    name, unit = "cubes", "cubes"

    def __init__(self, inputs: torch.Tensor) -> None:
        self.inputs = inputs

    def load(self) -> Loaded:
        split = Split(self.inputs, torch.arange(len(self.inputs)) % 2, tuple("abcdefgh"))
        return Loaded(split, split.subset(torch.tensor([0, 1])), ("0", "1"), val=split.subset(torch.tensor([5, 2])))


def test_inputs_of_any_shape_with_given_validation_samples() -> None:
    inputs = torch.randn(8, 2, 3, 4, 5)
    data = DataModule(Cubes(inputs), batch_size=3, val_fraction=0.5)
    assert [len(data.split(which)) for which in ("train", "val", "test")] == [8, 2, 2]
    assert torch.equal(data.split("val").inputs, inputs[[5, 2]])
    (batch,) = data.val_dataloader()
    assert torch.equal(batch[0], inputs[[5, 2]])
    assert (data.input_shape, data.input_range, data.scaling) == ((2, 3, 4, 5), None, None)
    inputs[5, 1, 2, 3, 4] = math.nan
    fails(DataError, DataModule(Cubes(inputs)).setup, "cubes train inputs: sample 5 (f) has nan at (1, 2, 3, 4)")


def test_bad_inputs_and_labels() -> None:
    inputs, labels = torch.randn(3, 2), torch.tensor([0, 1, 2])
    validate_inputs(inputs, labels, 3, "ok")
    for bad_inputs, bad_labels, parts in (
        (inputs[0], labels, ("one feature", "(2,)")),
        (inputs[:0], labels[:0], ("at least one sample", "(0, 2)")),
        (inputs.long(), labels, ("floating point", "torch.int64")),
        (inputs, labels[:2], ("3 inputs", "2 labels", "each input")),
        (inputs, labels + 1, ("sample 2", "label 3", "0 … 2")),
    ):
        fails(DataError, partial(validate_inputs, bad_inputs, bad_labels, 3, "X"), "X: ", *parts)


# --- what a radius means --------------------------------------------------------------------------------------------


def test_radius_along_a_feature_is_the_distance_to_the_boundary_in_its_own_unit(tmp_path: Path) -> None:
    """An affine classifier that looks at one feature: the boundary is where that feature crosses a threshold."""
    table = frame(60)
    data = table_data(
        save(table, tmp_path / "a.csv"), "tame", save(table, tmp_path / "b.csv"), features=["legs", "mass"]
    )
    names, mean, std = scaling(data)
    threshold = 66.0
    head = nn.Linear(2, 2).double()
    head.weight.data = torch.tensor([[0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    at = (threshold - mean[1]) / std[1]
    head.bias.data = torch.tensor([-at, at], dtype=torch.float64)
    certificates = certify(CertifiedNetwork(head, (2,), 2), data.eval_loader("test"), input_range=data.input_range)
    distance = np.abs(table["mass"].to_numpy() - threshold)
    assert np.allclose(certificates.radius.numpy() * std[1], distance, rtol=1e-4, atol=1e-4)
    right = (table["mass"] < threshold).to_numpy() == table["tame"].to_numpy()
    units = report.original_units(names, mean.tolist(), std.tolist(), certificates.mean_radius)
    assert [unit["name"] for unit in units["units"]] == ["legs", "mass"]
    assert units["units"][1]["mean_radius_along"] == pytest.approx((distance * right).mean(), rel=1e-4)


def test_l2_factor_is_safe_in_original_units() -> None:
    """No change of original norm R·min std leaves the certified ball of standardised radius R."""
    std = [3.0, 0.2, 11.0]
    factor = report.original_units(["a", "b", "c"], [0.0] * 3, std, 1.0)["radius_factor_original_l2"]
    directions = np.concatenate([np.eye(3), np.random.default_rng(0).normal(size=(200, 3))])
    moves = factor * directions / np.linalg.norm(directions, axis=1, keepdims=True)
    norms = np.linalg.norm(moves / std, axis=1)
    assert norms.max() == pytest.approx(1)
    assert norms.argmax() == 1


@pytest.mark.parametrize(("features", "said"), [(20, ""), (27, "7 more features are in report.json")])
def test_table_of_units_stops_at_twenty_features(features: int, said: str) -> None:
    names = [f"[feature] {number}" for number in range(features)]
    units = report.original_units(names, [0.0] * features, [617.0] * features, 2.0)["units"]
    output = StringIO()
    Console(file=output, width=200).print(report.units_table(units, "t"))
    shown = " ".join(output.getvalue().split())
    assert "[feature] 19" in shown
    assert "[feature] 20" not in shown
    assert shown.count(" 1234 ") == 20
    assert ("more features" in shown) == bool(said)
    assert said in shown


def test_tables_and_plots_name_the_unit() -> None:
    certificates = Certificates(torch.zeros(2), torch.zeros(2), torch.ones(2), torch.ones(2))
    caption = report.results_table({"a": certificates}, [0.5], "t", "standardised features").caption
    assert "ε of standardised features;" in str(caption)
    axes = report.curve({"a": certificates}, "t", "standardised features").axes[0]
    assert "standardised features" in axes.get_xlabel()
    assert "in the norm of standardised features," in report.statement("proof", "standardised features")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_certify_without_a_range_refuses_only_what_is_not_finite(value: float) -> None:
    inputs, labels = torch.full((4, 3), -1e6), torch.zeros(4, dtype=torch.long)
    model = mlp((3,), 2, linear="aol", width=4, depth=1, mean=None)
    check = partial(certify, CertifiedNetwork(model, (3,), 2), input_range=None)
    assert len(check([(inputs, labels)]).radius) == 4
    inputs[2, 1] = value
    fails(DataError, partial(check, [(inputs, labels)]), "sample 2, feature (1,)", f"{value}", "a finite number")
    fails(ShapeError, partial(check, [(inputs[:, :2], labels)]), "inputs have shape (2,)", "(3,); use the data set")


def test_mlp_takes_any_shape_and_leaves_out_the_centering() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 6)
    plain = mlp((6,), 3, linear="aol", width=8, depth=2, mean=None)
    assert [name for name, _ in plain.named_children()] == ["flatten", "body", "head"]
    shifted = mlp((6,), 3, linear="aol", width=8, depth=2, mean=0.5)
    shifted.load_state_dict({**shifted.state_dict(), **plain.state_dict()})
    assert torch.allclose(plain(x), shifted(x + 0.5), atol=1e-6)
    deep = mlp((1, 2, 1, 3), 3, linear="aol", width=8, depth=2, mean=None)
    deep.load_state_dict(plain.state_dict())
    assert torch.equal(deep(x.reshape(5, 1, 2, 1, 3)), plain(x))
    fails(ArgumentError, partial(lipconvnet, (6,), 3), "input_shape=(6,)", "(channels, height, width)", "mlp")
    for shape in ((), (0,), (3, -1)):
        fails(ArgumentError, partial(mlp, shape, 3), f"input_shape={shape}")


# --- the commands ---------------------------------------------------------------------------------------------------


def compose(name: str, *overrides: str) -> Any:
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose(name, list(overrides))


def train(output: Path, *overrides: str) -> Path:
    settings = ["model.width=8", "model.depth=1", "model.mean=null", "trainer.max_epochs=1", "trainer.accelerator=cpu"]
    cli.train(compose("train", f"output={output}", "trainer.enable_progress_bar=false", *settings, *overrides))
    return output / "checkpoints/best.ckpt"


class Rings(Source):
    """A source of someone's own: points on two circles."""

    name, unit = "rings", "units of the plane"

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def load(self) -> Loaded:
        label = torch.arange(self.samples) % 2
        angle = torch.linspace(0, 6, self.samples)
        split = Split((1 + label)[:, None] * torch.stack([angle.sin(), angle.cos()], 1), label)
        return Loaded(split, split.subset(torch.arange(12)), ("inner", "outer"))


def test_a_source_of_ones_own_trains_and_certifies_where_it_is_allowed(tmp_path: Path) -> None:
    ckpt = train(tmp_path / "run", f"data._target_={__name__}.Rings", "+data.samples=50")
    given = [f"ckpt={ckpt}", f"output={tmp_path}/out"]
    fails(CheckpointError, lambda: cli.certify(compose("certify", *given)), f"{__name__}.Rings", "allow")
    assert cli.certify(compose("certify", *given, f"allow=[{__name__}]"))["run"]["samples"] == 12
    written = json.loads((tmp_path / "out/report.json").read_text())["data"]
    assert (written["name"], written["unit"]) == ("rings", "units of the plane")
    assert written["sha256"] == Rings(50).load().test.fingerprint()


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_table_trains_and_certifies_in_original_units(tmp_path: Path, ending: str, capsys: Any) -> None:
    path = save(frame(), tmp_path / f"pets.{ending}")
    ckpt = train(tmp_path / "run", "data=table", f"data.train={path}", "data.target=kind")
    cli.certify(compose("certify", f"ckpt={ckpt}", f"output={tmp_path}/out"))
    assert "in original units" in capsys.readouterr().out
    written = json.loads((tmp_path / "out/report.json").read_text())
    names, _, stds = scaling(table_data(path, "kind"))
    assert [unit["name"] for unit in written["units"]] == list(names)
    for unit, std in zip(written["units"], stds, strict=True):
        assert unit["std"] == pytest.approx(std)
        assert unit["mean_radius_along"] == pytest.approx(written["results"]["mean_radius"] * std)
    assert written["radius_factor_original_l2"] == min(unit["std"] for unit in written["units"])


def test_certifying_a_table_that_changed_is_refused(tmp_path: Path) -> None:
    path = save(frame(), tmp_path / "pets.csv")
    ckpt = train(tmp_path / "run", "data=table", f"data.train={path}", "data.target=kind")
    check = partial(cli.certify, compose("certify", f"ckpt={ckpt}", f"output={tmp_path}/out"))
    save(frame().drop(columns="legs"), path)
    fails(ShapeError, check, "(2,)", "(3,)")
    save(frame().replace("emu", "elk"), path)
    fails(ConfigError, check, "pets has the classes ['cat', 'elk', 'ox']")
    assert not (tmp_path / "out").exists()
