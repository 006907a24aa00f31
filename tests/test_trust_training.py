"""Runs that end early, run beside each other or on a full disk; what a command line sets; states that were damaged."""

import copy
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from liplayers import cli, commands, files
from liplayers.certification import report as reports
from liplayers.checkpoint import load_checkpoint
from liplayers.cli.composing import training_config
from liplayers.data import DataModule
from liplayers.errors import ArgumentError, CheckpointError, ConfigError, OutputError
from liplayers.training import CertifiedClassifier, Lookahead, Stopped, WholeFileCheckpointIO

ROOT = Path(__file__).resolve().parent.parent
# 1294 training samples make 3 batches
SMALL = [
    "model.width=8",
    "model.depth=1",
    "data.batch_size=400",
    "trainer.max_epochs=2",
    "trainer.enable_progress_bar=false",
    "trainer.accelerator=cpu",
    "select_eps=0.02",
]


def compose(name: str, *overrides: str):
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return hydra.compose(name, list(overrides))


def train(output: Path, *overrides: str) -> dict[str, float]:
    return cli.train(compose("train", f"output='{output}'", *SMALL, *overrides))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def command(monkeypatch, capsys):
    """A command of this process: its output, or what it says where it fails."""

    def run(script: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        capsys.readouterr()
        try:
            (commands.train_command if script == "train.py" else commands.certify_command)()
        except SystemExit as error:
            if error.code != 2:
                raise
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith("error: ")
            return line
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    train(folder)
    return folder


@pytest.fixture(scope="module")
def last(run) -> Path:
    return run / "checkpoints/last.ckpt"


# ------------------------------------------------------------------------------------------------- one run in a folder


def test_a_folder_has_one_training_at_a_time(tmp_path, monkeypatch):
    """The second is told of the first; what it finds stays as it is, also with overwrite=true and resume=…"""
    held = []

    def second(self, *_):
        last = tmp_path / "run/checkpoints/last.ckpt"
        if held or not last.exists():
            return
        before = contents(tmp_path / "run")
        for arguments in (["overwrite=true"], [f"resume={last}"]):
            with pytest.raises(OutputError, match=rf"process {os.getpid()} on .*, since .*, is training there"):
                train(tmp_path / "run", *arguments)
        assert contents(tmp_path / "run") == before
        held.append(True)

    monkeypatch.setattr(CertifiedClassifier, "on_train_batch_start", second)
    train(tmp_path / "run")
    assert held
    assert not list((tmp_path / "run").glob(".*"))
    train(tmp_path / "run", "overwrite=true")


def test_the_lock_of_a_killed_process_is_no_obstacle(tmp_path):
    code = "import os, sys; from pathlib import Path; from liplayers.files import held\n"
    code += "with held(Path(sys.argv[1]), 'training'): print(os.getpid(), flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    pid = process.stdout.readline().strip()
    with pytest.raises(OutputError, match=f"process {pid} on "), files.held(tmp_path, "training"):
        pass
    with files.held(tmp_path, "writing"):  # certifying into the folder of a training is no conflict
        pass
    process.kill()
    process.communicate()
    with files.held(tmp_path, "training"):
        assert f"process {os.getpid()} on " in (tmp_path / ".training.holder").read_text()
    assert not list(tmp_path.iterdir())


def test_reports_are_moved_under_a_lock(tmp_path, monkeypatch):
    replace, seen = os.replace, []

    def look(source, target):
        with pytest.raises(OutputError, match="is writing there"), files.held(tmp_path, "writing"):
            pass
        seen.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", look)
    reports.write_outputs(tmp_path, {"a": reports.text_writer("1"), "b": reports.text_writer("2")})
    assert seen == ["a", "b"] == sorted(path.name for path in tmp_path.iterdir())


def test_a_run_that_ended_meanwhile_is_not_written_over(tmp_path, monkeypatch):
    """Its checkpoints appear after they were looked for, while the data are read."""

    def end(self, *_):
        (tmp_path / "run/checkpoints").mkdir(parents=True)
        (tmp_path / "run/checkpoints/best.ckpt").write_text("other")

    monkeypatch.setattr(DataModule, "train_sampler", end)
    with pytest.raises(OutputError, match="holds the checkpoints of a run"):
        train(tmp_path / "run")
    assert [path.name for path in contents(tmp_path)] == ["best.ckpt"]


# ------------------------------------------------------------------------------------------------------------- signals


def raising(number: int, hook: str, batch: int | None = None):
    def hooked(self, *_):
        if batch is None or self.trainer.fit_loop.total_batch_idx == batch:
            signal.raise_signal(number)
            signal.raise_signal(number)  # as `timeout` does

    return hook, hooked


MOMENTS = {
    "before the first step": ("on_sanity_check_start", None),
    "in a step": ("on_before_optimizer_step", 1),
    "at the end of an epoch": ("on_train_epoch_end", 2),
    "in validation": ("on_validation_batch_start", 2),
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_saves_and_ends_with_its_status(number, moment, run, last, tmp_path, monkeypatch, capsys):
    """And the run that goes on ends with the bits of the one that was not stopped."""
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    hook, batch = MOMENTS[moment]
    with monkeypatch.context() as patch:
        if hook == "on_sanity_check_start":
            from liplayers.training import Throughput

            patch.setattr(Throughput, "on_sanity_check_end", lambda *_: signal.raise_signal(number), raising=False)
        else:
            patch.setattr(CertifiedClassifier, *raising(number, hook, batch))
        with pytest.raises(SystemExit) as stopped:
            train(tmp_path / "run")
    assert stopped.value.code == 128 + number
    out = capsys.readouterr().out
    assert "certify it" not in out
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    interrupted = tmp_path / "run/checkpoints/interrupted.ckpt"
    assert f"resume={interrupted}" in out
    cli.train(compose("train", f"output={tmp_path}/run", f"resume={interrupted}"))
    whole, parts = (load_checkpoint(path / "checkpoints/last.ckpt") for path in (run, tmp_path / "run"))
    assert whole.global_step == parts.global_step
    assert all(torch.equal(whole.state_dict[key], parts.state_dict[key]) for key in whole.state_dict)


def test_a_signal_after_the_last_step_still_ends_with_its_status(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(CertifiedClassifier, *raising(signal.SIGTERM, "on_validation_batch_start", 5))
    with pytest.raises(Stopped) as stopped:
        train(tmp_path)
    assert stopped.value.code == 143
    assert load_checkpoint(tmp_path / "checkpoints/last.ckpt").epoch == 1
    assert "certify it" not in capsys.readouterr().out


def test_a_signal_that_the_parent_ignores_is_ignored(tmp_path, monkeypatch):
    monkeypatch.setattr(CertifiedClassifier, *raising(signal.SIGINT, "on_train_batch_start", 1))
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        train(tmp_path)
    finally:
        signal.signal(signal.SIGINT, previous)


def test_ctrl_c_again_ends_at_once_and_keeps_what_was_saved(tmp_path, monkeypatch):
    def twice(self, *_):
        signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr("liplayers.training.callbacks.time.monotonic", lambda: float("inf"))
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(CertifiedClassifier, "on_before_optimizer_step", twice)
    with pytest.raises(Stopped) as stopped:
        train(tmp_path)
    assert stopped.value.code == 130
    assert not list(tmp_path.rglob("*.ckpt"))


def test_sigterm_ends_a_sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(CertifiedClassifier, *raising(signal.SIGTERM, "on_train_batch_start", 1))
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "seed=0,1", f"output={tmp_path}", *SMALL])
    with pytest.raises(SystemExit) as stopped:
        cli.train_command()
    assert stopped.value.code == 143
    assert [path.parent.parent.name for path in tmp_path.rglob("*.ckpt")] == ["0"]
    assert not (tmp_path / "1").exists()


# ------------------------------------------------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk():
    """No file may grow beyond some kilobytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_earlier_checkpoint_alone(tmp_path, small_disk):
    path = tmp_path / "best.ckpt"
    WholeFileCheckpointIO().save_checkpoint({"step": 1}, path)
    with pytest.raises(OSError, match="large"):
        WholeFileCheckpointIO().save_checkpoint({"step": 2, "weight": torch.ones(10_000)}, path)
    assert list(tmp_path.iterdir()) == [path]
    assert torch.load(path) == {"step": 1}


def test_a_full_disk_leaves_the_earlier_report_alone(tmp_path, small_disk):
    reports.write_outputs(tmp_path, {"report.json": reports.text_writer("1")})
    files = {"report.json": reports.text_writer("2"), "network.pt": reports.state_writer({"w": torch.ones(10_000)})}
    with pytest.raises(OutputError, match="cannot be written"):
        reports.write_outputs(tmp_path, files)
    assert contents(tmp_path) == {tmp_path / "report.json": b"1"}


def test_training_on_a_full_disk_says_one_line(run, tmp_path, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, before[1]))
    try:
        with pytest.raises(OutputError, match="cannot be written") as caught:
            train(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "run/checkpoints").iterdir())
    assert not list((tmp_path / "run").glob(".*"))


# ----------------------------------------------------------------------------------------------- what is kept of a run

ENDS = {
    "between two validations": (["trainer.check_val_every_n_epoch=5", "trainer.max_epochs=7"], "val", 21),
    "before any validation": (["trainer.check_val_every_n_epoch=50"], "val", 6),
    "no validation split": (["trainer.check_val_every_n_epoch=5", "data.val_fraction=0"], "train", 6),
    "validation switched off": (["+trainer.limit_val_batches=0"], "train", 6),
    "steps, within an epoch": (["trainer.max_epochs=-1", "trainer.max_steps=5"], "val", 5),
    "steps, between two": (["trainer.max_steps=5", "trainer.check_val_every_n_epoch=5"], "val", 5),
    "within an epoch": (["+trainer.val_check_interval=2"], "val", 6),
    "counted in batches": (["+trainer.val_check_interval=4", "trainer.check_val_every_n_epoch=null"], "val", 6),
    "accumulated": (["trainer.accumulate_grad_batches=2", "trainer.check_val_every_n_epoch=3"], "val", 4),
}


@pytest.mark.parametrize("end", ENDS)
def test_the_end_of_training_is_saved_and_validated(end, tmp_path, monkeypatch):
    overrides, stage, steps = ENDS[end]
    validated = []

    def note(self):
        if not self.trainer.sanity_checking:
            validated.append(self.trainer.global_step)

    monkeypatch.setattr(CertifiedClassifier, "on_validation_epoch_end", note)
    metrics = train(tmp_path, *overrides)
    content = torch.load(tmp_path / "checkpoints/last.ckpt")
    assert content["global_step"] == steps
    assert validated[-1:] == ([steps] if stage == "val" else [])
    assert metrics["best"] >= metrics[f"{stage}/certified_0.02"]
    best = torch.load(tmp_path / "checkpoints/best.ckpt")["global_step"]
    assert best in (validated if stage == "val" else range(1, steps + 1))


def test_a_run_that_is_validated_rarely_goes_on_to_the_bits_of_the_whole_one(tmp_path):
    rarely = ["trainer.check_val_every_n_epoch=3", "schedule=constant"]
    train(tmp_path / "whole", *rarely, "trainer.max_epochs=5")
    train(tmp_path / "parts", *rarely)
    last = tmp_path / "parts/checkpoints/last.ckpt"
    content = torch.load(last)
    content["liplayers"]["config"]["trainer"]["max_epochs"] = 5
    torch.save(content, last)
    cli.train(compose("train", f"output={tmp_path}/parts", f"resume={last}"))
    a, b = (load_checkpoint(tmp_path / name / "checkpoints/last.ckpt") for name in ("whole", "parts"))
    assert a.global_step == b.global_step == 15
    assert all(torch.equal(a.state_dict[key], b.state_dict[key]) for key in a.state_dict)


@pytest.mark.parametrize("output", ["moved", "other"])
def test_a_run_that_was_moved_keeps_its_best_checkpoint(output, averaged, tmp_path):
    folder = tmp_path / "moved/checkpoints"
    folder.mkdir(parents=True)
    content = copy.deepcopy(averaged)
    content["liplayers"]["config"]["trainer"]["max_epochs"] = 2
    state = content["callbacks"][BEST[1]]
    state["best_model_score"] = torch.tensor(1.0)
    state["best_k_models"] = dict.fromkeys(state["best_k_models"], torch.tensor(1.0))
    torch.save(content, folder / "last.ckpt")
    (folder / "best.ckpt").write_text("the best")
    metrics = cli.train(compose("train", f"resume={folder}/last.ckpt", f"output={tmp_path}/{output}"))
    assert (folder / "best.ckpt").read_text() == "the best"
    assert (metrics["best"] == 1) == (output == "moved")
    assert (tmp_path / output / "checkpoints/best.ckpt").exists()


def test_what_keeps_training_from_beginning_is_one_line(tmp_path):
    for setting in ("+trainer.val_check_interval=400", "+trainer.enable_checkpointing=false"):
        with pytest.raises(ConfigError, match=r"(?i)trainer"):
            train(tmp_path, setting)
    with pytest.raises(ConfigError, match="overfit_batches"):
        train(tmp_path, "+trainer.overfit_batches=2")
    assert not list(tmp_path.rglob("*.ckpt"))


# ------------------------------------------------------------------------------------------------ what a command sets


def quoted(text: str) -> str:
    """As hydra's grammar writes text that means itself."""
    return "'" + text.replace("'", "\\'").replace("${", "\\${") + "'"


@pytest.mark.parametrize("name", ["a=b", "it's", "x,y [1]", "${oc.env:HOME}", "null"])
def test_a_resumed_run_goes_on_in_its_own_folder(name, last, tmp_path, monkeypatch):
    path = tmp_path / name / "checkpoints/last.ckpt"
    path.parent.mkdir(parents=True)
    path.write_bytes(last.read_bytes())
    monkeypatch.setenv("CKPT", str(path))
    for argument in (f"++resume={quoted(str(path))}", "resume=${oc.env:CKPT}"):
        config, added = training_config([argument])
        cfg = compose(config, argument, *added)
        assert (cfg.resume, cfg.output, cfg.model.width) == (str(path), str(tmp_path / name), 8)


def test_a_run_in_a_folder_of_an_odd_name_resumes_and_certifies(tmp_path):
    """Its name is kept in the checkpoint, where it looks like an interpolation."""
    train(tmp_path / "\\${x}", "trainer.max_epochs=1")
    last = tmp_path / "${x}/checkpoints/last.ckpt"
    config, _ = training_config([f"resume={quoted(str(last))}"])
    assert compose(config).output == str(tmp_path / "${x}")
    (figures,) = cli.certify(compose("certify", f"ckpt={quoted(str(last))}")).values()
    assert figures["samples"] == 359


@pytest.mark.parametrize(
    "argument", ["resume=a\\=b.ckpt", "resume='it\\'s.ckpt'", "++resume=gone.ckpt", "+resume=gone.ckpt"]
)
def test_a_checkpoint_that_is_not_there_is_named_as_it_was_meant(argument, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    meant = argument.partition("=")[2].strip("'").replace("\\", "")
    assert command("train.py", argument).startswith(f"error: {meant}: no such checkpoint")


@pytest.fixture(scope="module")
def npz_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("npz")
    rng = np.random.default_rng(0)
    for name in ("train", "test"):
        np.savez(folder / f"{name}.npz", images=rng.random((40, 1, 4, 4), np.float32), labels=np.arange(40) % 2)
    train(folder / "run", "data=npz", f"data.train={folder}/train.npz", f"data.test={folder}/test.npz")
    for name in ("train", "test"):
        (folder / f"{name}.npz").rename(folder / f"moved_{name}.npz")
    return folder


def test_settings_of_the_data_are_those_of_the_checkpoint(npz_run, command):
    """The mend that is printed for files that were moved can be given, to both commands."""
    last = npz_run / "run/checkpoints/last.ckpt"
    moved = [f"data.{name}={npz_run}/moved_{name}.npz" for name in ("train", "test")]
    certify = ["certify.py", f"ckpt={last}", f"output={npz_run}/out"]
    for arguments in (["train.py", f"resume={last}", "trainer.max_epochs=3"], certify):
        assert "set data.train and data.test to .npz files" in command(*arguments)
    assert "setting 'data.trian': did you mean data.train" in command(*certify, "data.trian=x")
    assert "clean" in command(*certify, *moved)
    assert "best val" in command("train.py", f"resume={last}", "trainer.max_epochs=3", *moved)
    assert load_checkpoint(last).epoch == 2
    again = [f"ckpt=[{last},{last}]", f"output={npz_run}/both"]
    assert "comparison" in command("certify.py", *again, *moved)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["data.root=x"], "unknown setting 'data.root'"),
        (["trainer.max_epoch=9"], "did you mean trainer.max_epochs"),
        (["model=mlp"], "resume takes model"),
        (["+model=mlp"], "resume takes model"),
        (["experiment=digits"], "resume takes model"),
        (["allow=1"], "allow=1: expected names of packages"),
        (["allow=[1]"], "allow=[1]: expected names of packages"),
    ],
)
def test_what_does_not_fit_the_checkpoint_is_named_and_nothing_is_written(arguments, said, run, last, command):
    before = contents(run)
    assert said in command("train.py", f"resume={last}", *arguments)
    assert contents(run) == before


def test_a_sweep_over_checkpoints_is_refused(last, command):
    assert "a sweep cannot be over resume" in command("train.py", "-m", f"resume={last},{last}")


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("train.py", ["output=2024"], "output=2024: expected one folder, not a number"),
        ("train.py", ["output=true"], "output=True: expected one folder"),
        ("train.py", ["output=null"], "output=None: expected one folder"),
        ("train.py", ["resume=5"], "resume=5: expected a checkpoint, not a number"),
        ("train.py", ["data=table", "data.train=5", "data.target=a"], "data.train=5: expected text"),
        ("train.py", ["data=table", "data.train=a.csv", "data.target=1"], "\"data.target='1'\""),
        ("train.py", ["data=table", "data.train=a", "data.target=b", "data.features=[c,2]"], "data.features=2"),
        ("train.py", ["data=folder", "data.root=1e3"], "data.root=1000.0: expected text"),
        ("train.py", ["overwrite=no"], "overwrite='no': expected true or false"),
        ("train.py", ["compile=1"], "compile=1: expected true or false"),
        ("train.py", ["select_eps=[0.1,0.2]"], "expected one radius"),
        ("train.py", ["extra=5"], "extra=5: expected"),
        ("train.py", ["trainer.max_steps=null"], "trainer.max_steps=None"),
        ("certify.py", ["output=2024"], "\"output='2024'\""),
        ("certify.py", ["verify=5"], "verify=5: expected a report.json"),
        ("certify.py", ["allow=1"], "allow=1: expected names of packages"),
        ("certify.py", ["audit=yes"], "audit='yes': expected true or false"),
        ("certify.py", ["device=0"], "device"),
        ("certify.py", ["mode=0"], "mode"),
        ("certify.py", ["data.split=0"], "split"),
    ],
)
def test_numbers_for_text_and_the_reverse_are_one_line(script, arguments, said, last, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    if script == "certify.py":
        arguments = [f"ckpt={last}", *arguments]
    assert said in command(script, *arguments)
    assert not list(tmp_path.iterdir())


def test_no_file_is_named_with_nul(tmp_path):
    cfg = compose("train", *SMALL)
    for key, value in {"output": "a\0b", "resume": "a\0b"}.items():
        with pytest.raises(ConfigError, match=rf"{key}='a\\x00b': holds a NUL"):
            cli.train(OmegaConf.merge(cfg, {"output": str(tmp_path), key: value}))
    cfg = OmegaConf.merge(compose("train", f"output={tmp_path}", "data=mnist"), {"data": {"root": "a\0b"}})
    with pytest.raises(ConfigError, match=r"data.root='a\\x00b': holds a NUL"):
        cli.train(cfg)


# ------------------------------------------------------------------------------------------------- damaged checkpoints


DELETED = object()


def at(*path: Any, value: Any = DELETED):
    """A change of one entry."""

    def change(content: dict) -> None:
        *parents, key = path
        for parent in parents:
            content = content[parent]
        if value is DELETED:
            del content[key]
        else:
            content[key] = value

    return change


BEST = (
    "callbacks",
    "ModelCheckpoint{'monitor': 'val/certified_0.02', 'mode': 'max', 'every_n_train_steps': 0, 'every_n_epochs': 1, "
    "'train_time_interval': None}",
)
EPOCHS = ("loops", "fit_loop", "epoch_progress", "current")
DAMAGES = {
    "no loops": at("loops"),
    "loops a list": at("loops", value=[1]),
    "loops empty": at("loops", "fit_loop", value={}),
    "a count of text": at(*EPOCHS, "processed", value="x"),
    "a negative count": at(*EPOCHS, "ready", value=-5),
    "a huge count": at(*EPOCHS, "ready", value=10**5000),
    "counts that disagree": at(*EPOCHS, "completed", value=9),
    "progress a number": at("loops", "fit_loop", "epoch_loop.batch_progress", value=3),
    "negative epoch": at("epoch", value=-1),
    "huge epoch": at("epoch", value=10**5000),
    "epoch of text": at("epoch", value="x"),
    "no step": at("global_step"),
    "no optimizer": at("optimizer_states"),
    "two optimizers": at("optimizer_states", value=[{}, {}]),
    "optimizer empty": at("optimizer_states", 0, value={}),
    "moment of another shape": at("optimizer_states", 0, "state", 0, "exp_avg", value=torch.zeros(3)),
    "moment of text": at("optimizer_states", 0, "state", 0, "exp_avg", value="x"),
    "rate of text": at("optimizer_states", 0, "param_groups", 0, "betas", value="x"),
    "no schedule": at("lr_schedulers"),
    "schedule of text": at("lr_schedulers", 0, value="x"),
    "schedule with a method": at("lr_schedulers", 0, "step", value=5),
    "schedule without base": at("lr_schedulers", 0, "base_lrs", value=None),
    "no version": at("pytorch-lightning_version"),
    "version of text": at("pytorch-lightning_version", value="newest"),
    "no callbacks": at("callbacks"),
    "callbacks a list": at("callbacks", value=[]),
    "best score of text": at(*BEST, "best_model_score", value="x"),
    "best a list": at(*BEST, value=[]),
    "average of another shape": at("current_model_state", "model.body.0.gain", value=torch.zeros(3)),
    "average without count": at("averaging_state", value={}),
    "deep config": at("liplayers", "config", "extra", value=None),
}


@pytest.fixture(scope="module")
def averaged(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("averaged")
    train(folder, "ema_decay=0.9", "trainer.max_epochs=1")
    return torch.load(folder / "checkpoints/last.ckpt")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_of_training_is_one_line_and_nothing_is_written(damage, averaged, tmp_path):
    content = copy.deepcopy(averaged)
    DAMAGES[damage](content)
    if damage == "deep config":
        for _ in range(400):
            content["liplayers"]["config"]["extra"] = {"a": content["liplayers"]["config"]["extra"]}
    content["liplayers"]["config"]["trainer"]["max_epochs"] = 2
    path = tmp_path / "last.ckpt"
    torch.save(content, path)
    with pytest.raises(CheckpointError) as caught:
        cli.train(compose("train", f"resume={path}", f"output={tmp_path}/run"))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


def test_the_undamaged_one_goes_on(averaged, tmp_path):
    averaged["liplayers"]["config"]["trainer"]["max_epochs"] = 2
    torch.save(averaged, tmp_path / "last.ckpt")
    cli.train(compose("train", f"resume={tmp_path}/last.ckpt", f"output={tmp_path}/run"))
    assert load_checkpoint(tmp_path / "run/checkpoints/last.ckpt").epoch == 1


def test_a_slow_copy_of_another_shape_is_refused():
    optimizer = Lookahead([torch.nn.Parameter(torch.zeros(3))], torch.optim.SGD)
    state = optimizer.state_dict() | {"slow": [torch.zeros(1)]}
    with pytest.raises(ArgumentError, match=r"shape \(1,\) for \(3,\)"):
        optimizer.load_state_dict(state)
