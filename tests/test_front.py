"""The front of a sweep: which runs are on it, which are left out, what is written, and a real sweep end to end."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from liplayers import cli
from liplayers.certification import parse_radius
from liplayers.checkpoint import load_checkpoint
from liplayers.cli import front
from liplayers.cli.front import differing, main, non_dominated, read_run
from liplayers.errors import DataError
from liplayers.training import CertifiedClassifier
from liplayers.training.module import certified_name

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["model.width=16", "model.depth=1", "trainer.enable_progress_bar=false", "trainer.accelerator=cpu"]
CERTIFIED = "certified_0.423529"

few_values = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])  # makes ties likely
accuracies = st.one_of(few_values, st.floats(0, 1))


def write_run(
    folder: Path, epochs: list[tuple[float, float]], split: str = "val", select: str = "108/255", **changed: Any
) -> Path:
    """A finished run as training leaves it: (clean, certified at `select`) of each epoch; `changed` are settings."""
    config = {"seed": 0, "eps": ["36/255", select], "select_eps": select, "resume": None, "output": str(folder)}
    config |= {"trainer": {"max_epochs": len(epochs), "max_steps": -1}, **changed}
    columns = [f"{split}/{name}" for name in ("accuracy", "certified_0.141176", certified_name(parse_radius(select)))]
    rows = []
    for epoch, (clean, certified) in enumerate(epochs):
        rows.append(
            {"epoch": epoch, "step": 10 * epoch + 9} | dict(zip(columns, (clean, clean, certified), strict=True))
        )
        rows.append({"epoch": epoch, "step": 10 * epoch + 9, "train/loss": 1.0})
    (folder / "csv/version_0").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    pd.DataFrame(rows).to_csv(folder / "csv/version_0/metrics.csv", index=False)
    return folder


def edit(folder: Path, **changed: Any) -> None:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changed))


def shown(folder: Path, *arguments: str) -> pd.DataFrame:
    """The table that the command writes."""
    assert main([str(folder), *arguments]) == 0
    return pd.read_csv(folder / "front.csv", dtype={"run": str}, keep_default_na=False)


def left_out(capsys) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out: ")]


def error(folder: Path, capsys, *arguments: str) -> str:
    assert main([str(folder), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert not list(folder.glob("front.*"))
    return line


@given(st.lists(st.tuples(accuracies, accuracies), min_size=1, max_size=30))
def test_no_point_of_the_front_is_dominated_and_every_other_point_is(points):
    for point, on_front in zip(points, non_dominated(np.array(points)), strict=True):
        dominated = any(a >= point[0] and b >= point[1] and (a, b) != point for a, b in points)
        assert on_front != dominated


def test_dominated_runs_are_marked_and_the_best_comes_first(tmp_path):
    for name, point in {"0": (0.9, 0.5), "1": (0.8, 0.7), "2": (0.8, 0.6), "3": (0.95, 0.1)}.items():
        write_run(tmp_path / name, [point])
    table = shown(tmp_path)
    assert table["run"].tolist() == ["1", "2", "0", "3"]
    assert table["front"].tolist() == [True, False, True, True]


def test_runs_that_tie_are_on_the_front_together_and_share_a_label(tmp_path):
    for seed in range(3):
        write_run(tmp_path / str(seed), [(0.9, 0.5)], seed=seed)
    result = front.sweep_front(tmp_path, None)
    assert result.table["front"].all()
    (axes,) = front.front_figure(result, "ties").axes
    assert [text.get_text() for text in axes.texts] == ["seed=0\nseed=1\nseed=2"]


@pytest.mark.parametrize(("others", "labelled"), [(11, 12), (12, 1)])
def test_of_many_points_only_the_front_is_labelled(tmp_path, others, labelled):
    write_run(tmp_path / "best", [(1.0, 1.0)], seed=99)
    for seed in range(others):
        write_run(tmp_path / str(seed), [(seed / 20, seed / 20)], seed=seed)
    (axes,) = front.front_figure(front.sweep_front(tmp_path, None), "many").axes
    assert len(axes.texts) == labelled
    assert axes.texts[0].get_text() == "seed=99"


def test_the_epoch_is_the_first_with_most_certified_accuracy(tmp_path):
    write_run(tmp_path / "0", [(0.99, 0.2), (0.8, 0.6), (0.9, 0.6), (0.95, 0.3)])
    row = shown(tmp_path).iloc[0]
    assert (row["val/accuracy"], row[f"val/{CERTIFIED}"]) == (0.8, 0.6)


def test_another_radius_shows_the_same_epoch(tmp_path):
    write_run(tmp_path / "0", [(0.99, 0.2), (0.8, 0.6)])
    assert shown(tmp_path, "--eps", "36/255").iloc[0]["val/certified_0.141176"] == 0.8


def test_only_settings_that_differ_are_columns(tmp_path):
    for seed in (0, 1):
        loss = {"_target_": "liplayers.losses.EMMA", "epsilon": [0.5, 1.5][seed], "same": 3}
        write_run(tmp_path / str(seed), [(0.9, 0.5)], loss=loss, overwrite=bool(seed))
    assert set(shown(tmp_path)) == {"run", "front", "val/accuracy", f"val/{CERTIFIED}", "loss.epsilon"}


def test_a_setting_named_like_a_column_has_another_name(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / str(seed), [(0.9, 0.5)], run=f"try {seed}", setting={"run": seed})
    table = shown(tmp_path)
    settings = {"setting.run", "setting.setting.run"}
    assert set(table) == {"run", "front", "val/accuracy", f"val/{CERTIFIED}", *settings}
    assert table["run"].tolist() == ["0", "1"]
    assert table["setting.run"].tolist() == ["try 0", "try 1"]


def test_folders_whose_names_are_no_utf8(tmp_path, capsys):
    sweep = tmp_path / "sweep\udcff"
    write_run(sweep / "a\udcfe", [(0.9, 0.5)])
    (sweep / "b\udcfe").mkdir()
    (sweep / "b\udcfe/config.yaml").touch()
    write_run(sweep / "a\udcfd", [(0.8, 0.4)], note="\udcfc")
    table = shown(sweep)
    assert table["run"].tolist() == ["a\\udcfe", "a\\udcfd"]
    assert table["note"].tolist()[1] == "\\udcfc"
    (line,) = left_out(capsys)
    assert "b\\udcfe" in line


def test_another_part_is_one_column_and_its_own_settings_are_none():
    offset = {"loss": "OffsetCrossEntropy", "loss.offset": "1", "loss.temperature": "0.25"}
    emma = {"loss": "EMMA", "loss.epsilon": "0.5"}
    assert differing([offset, emma]) == ["loss"]
    assert differing([offset, emma, emma | {"loss.epsilon": "1"}]) == ["loss", "loss.epsilon"]
    assert differing([offset, offset | {"loss.offset": "2"}, emma]) == ["loss", "loss.offset"]


def test_the_output_says_which_split_it_shows(tmp_path, capsys):
    write_run(tmp_path / "with/0", [(0.9, 0.5)])
    write_run(tmp_path / "without/0", [(0.9, 0.5)], split="train")
    assert f"val/{CERTIFIED}" in shown(tmp_path / "with")
    assert "validation split" in (tmp_path / "with/front.md").read_text()
    assert f"train/{CERTIFIED}" in shown(tmp_path / "without")
    assert "training samples (no validation split)" in (tmp_path / "without/front.md").read_text()
    capsys.readouterr()
    assert shown(tmp_path)["run"].tolist() == ["with/0"]
    (line,) = left_out(capsys)
    assert "without/0" in line
    assert "validation" in line


def break_config(run: Path) -> None:
    (run / "config.yaml").write_text("trainer: [1,")


def break_metrics(run: Path) -> None:
    (run / "csv/version_0/metrics.csv").write_bytes(b"epoch,step\n0,\xff\xfe")


def truncate_header(run: Path) -> None:
    (run / "csv/version_0/metrics.csv").write_text("epoch,step,val/acc")


def no_logs(run: Path) -> None:
    (run / "csv/version_0/metrics.csv").unlink()


def no_config(run: Path) -> None:
    """What hydra leaves of a job that failed before it began."""
    for path in sorted(run.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (run.parent / "multirun.yaml").touch()


def impossible_accuracy(run: Path) -> None:
    path = run / "csv/version_0/metrics.csv"
    path.write_text(path.read_text().replace("0.5", "inf"))


def more_epochs(run: Path) -> None:
    edit(run, trainer={"max_epochs": 2, "max_steps": -1})


def more_steps(run: Path) -> None:
    edit(run, trainer={"max_epochs": -1, "max_steps": 11})


def code_in_config(run: Path) -> None:
    (run / "config.yaml").write_text("!!python/object/apply:os.system ['touch ran']")


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (break_config, "cannot be read"),
        (break_metrics, "cannot be read"),
        (truncate_header, "lacks"),
        (no_logs, "no epoch has ended"),
        (no_config, "has no config.yaml"),
        (impossible_accuracy, "outside [0, 1]"),
        (more_epochs, "unfinished, 1 of 2 epochs"),
        (more_steps, "unfinished, 10 of 11 steps"),
        (lambda run: edit(run, eps=["many"]), "'many'"),
        (lambda run: edit(run, trainer=None), "cannot be read"),
        (code_in_config, "cannot be read"),
    ],
)
def test_a_broken_run_is_named_in_one_line_and_left_out(tmp_path, monkeypatch, capsys, harm, says):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "0", [(0.9, 0.5)])
    harm(write_run(tmp_path / "1", [(0.9, 0.5)]))
    assert shown(tmp_path)["run"].tolist() == ["0"]
    (line,) = left_out(capsys)
    assert line.startswith(f"left out: {tmp_path / '1'}: ")
    assert says in line
    assert not (tmp_path / "ran").exists()


def test_steps_finish_a_run_without_epochs(tmp_path):
    edit(write_run(tmp_path / "0", [(0.9, 0.5)]), trainer={"max_epochs": -1, "max_steps": 10})
    assert len(shown(tmp_path)) == 1


def test_a_radius_that_was_not_evaluated_is_an_error_that_names_those_that_were(tmp_path, capsys):
    write_run(tmp_path / "0", [(0.9, 0.5)])
    assert error(tmp_path, capsys, "--eps", "0.3").endswith("evaluated: 36/255, 108/255")
    assert "not a radius" in error(tmp_path, capsys, "--eps", "much")


def test_runs_without_the_radius_are_left_out(tmp_path, capsys):
    write_run(tmp_path / "0", [(0.9, 0.5)])
    write_run(tmp_path / "1", [(0.9, 0.5)], select="1")
    assert "108/255, 1)" in error(tmp_path, capsys)  # no default: they select at different radii
    assert shown(tmp_path, "--eps", "1")["run"].tolist() == ["1"]
    (line,) = left_out(capsys)
    assert line.endswith("evaluated at 108/255, 36/255, not at 1")
    assert len(shown(tmp_path, "--eps", "36/255")) == 2


def test_nothing_to_show_is_an_error(tmp_path, capsys):
    assert "no finished run" in error(tmp_path, capsys)
    assert "no such folder" in error(tmp_path / "nowhere", capsys)
    more_epochs(write_run(tmp_path / "0", [(0.9, 0.5)]))
    assert "no finished run" in error(tmp_path, capsys)


def test_special_characters_in_settings_break_no_table(tmp_path, capsys):
    values = ["[bold]a|b[/]", "$x", None, ["a", 1]]
    for seed, value in enumerate(values):
        write_run(tmp_path / str(seed), [(0.9, 0.5)], name=value)
    assert shown(tmp_path)["name"].tolist() == ["[bold]a|b[/]", "$x", "null", '["a", 1]']
    assert "[bold]a|b[/]" in capsys.readouterr().out
    lines = [line for line in (tmp_path / "front.md").read_text().splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in lines} == {6}
    front.front_figure(front.sweep_front(tmp_path, None), "$").canvas.draw()


def test_the_files_are_complete_and_nothing_else_is_left(tmp_path):
    write_run(tmp_path / "0", [(0.9, 0.5)])
    before = {path.name for path in tmp_path.iterdir()}
    shown(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} - before == {"front.csv", "front.md", "front.png"}
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert "| ★ | 90.00 | 50.00 | 0 |" in (tmp_path / "front.md").read_text()


def train(output: Path, *overrides: str) -> dict[str, float]:
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return cli.train(hydra.compose("train", [f"output={output}", *SMALL, *overrides]))


def test_a_resumed_run_counts_from_its_first_epoch(tmp_path, monkeypatch):
    train(tmp_path, "trainer.max_epochs=3", "optimizer.lr=0.02")
    resume = ["train.py", f"resume={tmp_path}/checkpoints/last.ckpt", "trainer.max_epochs=5"]
    monkeypatch.setattr(sys, "argv", resume)
    cli.train_command()
    logged = pd.concat([pd.read_csv(tmp_path / f"csv/version_{n}/metrics.csv") for n in (0, 1)])
    best = logged[logged["epoch"] == load_checkpoint(tmp_path / "checkpoints/best.ckpt").epoch]
    metrics = read_run(tmp_path, "resumed").metrics
    assert metrics["accuracy"] == best["val/accuracy"].max()
    assert metrics[CERTIFIED] == best[f"val/{CERTIFIED}"].max() == logged[f"val/{CERTIFIED}"].max()


def test_what_an_overwritten_run_logged_is_not_taken_for_the_new_one(tmp_path, monkeypatch):
    train(tmp_path, "trainer.max_epochs=1")

    def fail(*arguments: Any) -> None:
        raise RuntimeError("first step")

    monkeypatch.setattr(CertifiedClassifier, "training_step", fail)
    with pytest.raises(RuntimeError, match="first step"):
        train(tmp_path, "trainer.max_epochs=1", "overwrite=true", "seed=1")
    with pytest.raises(DataError, match="no epoch has ended"):
        read_run(tmp_path, "overwritten")


def test_a_sweep_from_training_to_its_front(tmp_path, monkeypatch, capsys):
    """The figures are those of best.ckpt, evaluated again on the validation split."""
    monkeypatch.chdir(tmp_path)
    sweep = ["optimizer.lr=0.003,0.02", "trainer.max_epochs=3"]
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", *SMALL, *sweep])
    cli.train_command()
    (folder,) = Path("runs/sweep").iterdir()  # where a sweep goes without output=
    table = shown(folder, "--eps", "108/255")
    assert "validation split" in capsys.readouterr().out
    assert set(table) == {"run", "front", "val/accuracy", f"val/{CERTIFIED}", "optimizer.lr"}
    assert dict(zip(table["run"], table["optimizer.lr"], strict=True)) == {"0": 0.003, "1": 0.02}
    for row in table.to_dict("records"):
        ckpt, again = folder / row["run"] / "checkpoints/best.ckpt", tmp_path / f"again-{row['run']}"
        with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            overrides = [f"ckpt={ckpt}", f"output={again}", "data.split=val", "mode=fast"]
            cli.certify(hydra.compose("certify", overrides))
        results = json.loads((again / "report.json").read_text())["results"]
        assert row["val/accuracy"] == pytest.approx(results["clean_accuracy"], abs=1e-6)
        (certified,) = (c["accuracy"] for c in results["certified_accuracy"] if c["eps"] == "108/255")
        assert row[f"val/{CERTIFIED}"] == pytest.approx(certified, abs=1e-6)
