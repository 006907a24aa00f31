"""A run that is killed or interrupted and resumed ends with the bits of the run that was not."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch

from liplayers import cli
from liplayers.checkpoint import load_checkpoint
from liplayers.errors import ArgumentError
from liplayers.training import CertifiedClassifier, SaveWithinEpoch, WeightEMA, WholeFileCheckpointIO

ROOT = Path(__file__).resolve().parent.parent
# 1294 training samples make 10 batches: 30 in all
RUN = [
    "model.width=8",
    "model.depth=1",
    "data.batch_size=128",
    "data.augment=[{_target_:liplayers.data.RandomShift,padding:1}]",
    "trainer.max_epochs=3",
    "trainer.enable_progress_bar=false",
    "trainer.accelerator=cpu",
    "save_every_steps=4",
    "select_eps=0.02",
]


def train(*overrides: str) -> Path:
    """Train in this process; return last.ckpt."""
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = hydra.compose("train", list(overrides))
    cli.train(cfg)
    return Path(cfg.output) / "checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def dies() -> Callable[..., bool]:
    """Whether a function, called in a process of its own, is killed by SIGKILL."""
    context = multiprocessing.get_context("forkserver")  # imports torch and Lightning once
    context.set_forkserver_preload(["liplayers.cli"])

    def run(function: Callable, *arguments: Any) -> bool:
        process = context.Process(target=function, args=arguments)
        process.start()
        process.join(300)
        return process.exitcode == -signal.SIGKILL

    return run


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train_until(batch: int, *overrides: str) -> None:
    def begin_batch(self: CertifiedClassifier, *_: Any) -> None:
        if self.trainer.fit_loop.total_batch_idx == batch:
            kill()

    CertifiedClassifier.on_train_batch_start = begin_batch  # type: ignore[method-assign]
    train(*overrides)


def state(path: Path) -> dict[str, Any]:
    """All of a checkpoint but names of files, and how Lightning counts what it has begun."""
    content = torch.load(path, weights_only=True)
    kept = {key: content[key] for key in ("epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers")}
    scores = [entry["best_model_score"] for entry in content["callbacks"].values() if "best_model_score" in entry]
    averages = {key: content[key] for key in ("current_model_state", "averaging_state") if key in content}
    return kept | averages | {"scores": scores}


def assert_identical(a: Any, b: Any, path: str = "") -> None:
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_identical(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_identical(*pair, f"{path}.{index}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


EMMA = ["loss=emma", "epsilon_ramp={epsilon:0.4}"]
MANIFOLD = ["model.linear=manifold", "optimizer=manifold_adamw", "optimizer.retract_every=7"]
ACCUMULATED = ["trainer.accumulate_grad_batches=3", "trainer.gradient_clip_val=0.01", "save_every_steps=3"]
CASES = {
    "adam": (17, []),
    "adam with EMA": (26, ["ema_decay=0.9"]),
    "manifold with EMA": (29, [*MANIFOLD, "ema_decay=0.9"]),
    "manifold, loss with a ramp": (14, [*MANIFOLD, *EMMA]),
    "accumulated gradients, clipped": (17, ACCUMULATED),
    "extra data, colours": (
        25,
        [
            "extra={data:{_target_:liplayers.data.Digits,seed:5},share:0.25}",
            "data.augment=[{_target_:liplayers.data.RandAugment},{_target_:liplayers.data.ColorJitter,brightness:0.4}]",
        ],
    ),
    "lookahead": (17, ["optimizer=lookahead", "optimizer.sync=true", "optimizer.every=6"]),
    "counted in steps": (15, ["trainer.max_epochs=-1", "trainer.max_steps=30"]),
}


@pytest.mark.parametrize("case", CASES)
def test_killed_run_goes_on_to_the_bits_of_the_whole_one(case: str, dies: Callable[..., bool], tmp_path: Path):
    batch, overrides = CASES[case]
    whole = train(f"output={tmp_path}/whole", *RUN, *overrides)
    assert dies(train_until, batch, f"output={tmp_path}/killed", *RUN, *overrides)
    last = tmp_path / "killed/checkpoints/last.ckpt"
    middle = torch.load(last, weights_only=True)
    assert not middle["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"]
    assert not torch.equal(
        load_checkpoint(last).state_dict["body.0.raw"], load_checkpoint(whole).state_dict["body.0.raw"]
    )
    train(f"resume={last}", f"output={tmp_path}/killed")
    assert_identical(state(last), state(whole))


@pytest.mark.parametrize("arguments", [["ema_decay=0.9"], ["trainer.accumulate_grad_batches=3"]])
@pytest.mark.parametrize("batch", [3, 14])
def test_interrupted_run_goes_on_to_the_bits_of_the_whole_one(
    batch: int, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = train(f"output={tmp_path}/whole", *RUN, *arguments)

    def interrupt(self: CertifiedClassifier, *_: Any) -> None:
        if self.trainer.fit_loop.total_batch_idx == batch:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(CertifiedClassifier, "on_train_batch_start", interrupt)
        with pytest.raises(SystemExit):
            train(f"output={tmp_path}/part", *RUN, "save_every_steps=null", *arguments)
    last = train(f"resume={tmp_path}/part/checkpoints/interrupted.ckpt", f"output={tmp_path}/part")
    assert_identical(state(last), state(whole))


LOOKAHEAD = ["optimizer=lookahead", "optimizer.sync=true", "optimizer.every=7"]


@pytest.mark.parametrize("arguments", [["ema_decay=0.9"], LOOKAHEAD])
def test_exception_in_a_validation_does_not_swap_the_average_in_the_checkpoint_or_go_back_twice(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = train(f"output={tmp_path}/whole", *RUN, *arguments)

    def fail(self: CertifiedClassifier, *_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(CertifiedClassifier, "validation_step", fail)
        with pytest.raises(MemoryError):
            train(f"output={tmp_path}/part", *RUN, *arguments, "+trainer.num_sanity_val_steps=0")
    last = train(f"resume={tmp_path}/part/checkpoints/interrupted.ckpt", f"output={tmp_path}/part")
    a, b = state(last), state(whole)
    for key in {"state_dict", "optimizer_states", "current_model_state"} & a.keys():
        assert_identical(a[key], b[key])


def test_what_is_saved_at_the_end_of_an_epoch_are_lookaheads_slow_weights(tmp_path: Path):
    content = torch.load(train(f"output={tmp_path}", *RUN, *LOOKAHEAD, "trainer.max_epochs=1"), weights_only=True)
    (optimizer,) = content["optimizer_states"]
    assert optimizer["steps"] == optimizer["synchronized"] == 10
    weights = [value for name, value in content["state_dict"].items() if "preprocess" not in name]
    assert len(weights) == len(optimizer["slow"])
    assert all(map(torch.equal, weights, optimizer["slow"]))


class Fatal:
    def __reduce__(self):
        kill()


def write_until_killed(path: Path) -> None:
    WholeFileCheckpointIO().save_checkpoint({"step": 1}, path)
    WholeFileCheckpointIO().save_checkpoint({"step": 2, "weight": torch.ones(1 << 20), "end": Fatal()}, path)


def test_a_kill_while_writing_leaves_the_earlier_checkpoint(dies: Callable[..., bool], tmp_path: Path):
    path = tmp_path / "last.ckpt"
    assert dies(write_until_killed, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert (tmp_path / "last.ckpt.part").exists()


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "3"])
def test_bad_interval_is_named(every: Any, tmp_path: Path):
    with pytest.raises(ArgumentError, match="every="):
        SaveWithinEpoch(tmp_path / "last.ckpt", every)


@pytest.mark.parametrize("decay", [-0.1, 1, float("nan"), True, "0.9"])
def test_bad_decay_is_named(decay: Any):
    with pytest.raises(ArgumentError, match="decay="):
        WeightEMA(decay)
