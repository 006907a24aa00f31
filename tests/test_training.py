"""The commands end to end on small data: training, resuming, certifying, comparing, and every kind of bad input."""

import copy
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import hydra
import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf

import liplayers as lp
from liplayers import cli
from liplayers.bounds.composition import head_splitter
from liplayers.checkpoint import Checkpoint, load_checkpoint
from liplayers.cli.configuration import build, build_data
from liplayers.cli.train import GROUPS
from liplayers.core.registry import get_layer
from liplayers.errors import ArgumentError, CheckpointError, ConfigError, LipschitzError, OutputError, ShapeError
from liplayers.training import CertifiedClassifier

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
SMALL = [
    "model.width=16",
    "model.depth=1",
    "trainer.max_epochs=2",
    "trainer.enable_progress_bar=false",
    "trainer.accelerator=cpu",
]


def compose(name: str, *overrides: str) -> OmegaConf:
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose(name, list(overrides))


def train(output: Path, *overrides: str) -> dict[str, float]:
    return cli.train(compose("train", f"output={output}", *SMALL, *overrides))


def certify(*overrides: str) -> dict:
    return cli.certify(compose("certify", *overrides))


def failing(monkeypatch, capsys, script: str, arguments: list[str], cwd: Path) -> str:
    """The one line that a bad command says; the command runs in this process."""
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as caught:
        (cli.train_command if script == "train.py" else cli.certify_command)()
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert not list(cwd.iterdir())
    return line


def command(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / script, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A small finished run on the digits."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    train(folder)
    return folder


@pytest.fixture(scope="module")
def ckpt(run) -> Path:
    return run / "checkpoints" / "best.ckpt"


# ------------------------------------------------------------------------------------------------------------ configs


def group(name: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / name).glob("*.yaml"))


@pytest.mark.parametrize("choice", [f"{g}={n}" for g in GROUPS for n in group(g)])
def test_every_config_composes_and_its_target_takes_its_arguments(choice, tmp_path):
    cfg = compose("train", choice, f"output={tmp_path}")
    for name in ("data.root", "data.train", "data.test", "data.name", "data.target"):
        if OmegaConf.is_missing(cfg.data, name.split(".")[1]):
            OmegaConf.update(cfg, name, str(tmp_path))
    build_data(cfg.data)
    build(cfg.loss)
    for key in {"width", "channels"} & cfg.model.keys():
        cfg.model[key] = [8 for _ in cfg.model[key]] if OmegaConf.is_list(cfg.model[key]) else 8
    model = build(cfg.model, input_shape=(3, 16, 16), num_classes=4)
    # LipNeXt counts the rounding of each of its 64 matrices
    assert head_splitter(model, (3, 16, 16), estimates=True)().body_bound == pytest.approx(1, rel=1e-4)
    optimizer = build(cfg.optimizer)(model.parameters())
    scheduler = build(cfg.schedule)(optimizer, 10)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert 0 <= min(rates) <= max(rates) == pytest.approx(cfg.optimizer.lr)
    assert build(cfg.trainer, logger=False, default_root_dir=str(tmp_path)).max_epochs == cfg.trainer.max_epochs


@pytest.mark.parametrize("conv", [f.name for f in lp.FAMILIES.values() if f.conv])
def test_models_take_every_convolution_by_name(conv):
    from liplayers.models import lipconvnet

    linear = None if lp.FAMILIES[conv].linear else "bjorck"
    if conv == "bcop":
        with pytest.raises(lp.LipschitzError, match=r"stride.*AOCConv2d"):
            lipconvnet((1, 9, 6), 3, conv=conv)
        return
    model = lipconvnet((1, 9, 6), 3, conv=conv, linear=linear, channels=4, stages=2, dense=1, width=8)
    assert model(torch.rand(2, 1, 9, 6)).shape == (2, 3)


def test_a_family_without_dense_layers_is_named():
    from liplayers.models import lipconvnet

    with pytest.raises(lp.LipschitzError, match="'aoc' has no linear layer; these have one: aol, bjorck"):
        lipconvnet((1, 8, 8), 3, conv="aoc", stages=1, dense=1)


# ----------------------------------------------------------------------------------------------------------- training


def test_training_writes_what_it_says(run):
    assert {"best.ckpt", "last.ckpt"} == {p.name for p in (run / "checkpoints").iterdir()}
    assert (run / "config.yaml").is_file()
    assert list((run / "tensorboard").rglob("events*"))
    header = next((run / "csv").rglob("metrics.csv")).open().readline()
    for stage in ("train", "val"):
        for metric in ("loss", "accuracy", "margin", "certified_0.141176", "certified_1"):
            assert f"{stage}/{metric}" in header


def test_checkpoint_holds_raw_parameters_and_plain_containers_only(ckpt):
    content = torch.load(ckpt, weights_only=True)
    assert {k for k in content["state_dict"] if "0.raw" in k or "0.gain" in k} == {
        "model.body.0.raw",
        "model.body.0.gain",
    }
    assert content["liplayers"]["input_shape"] == [1, 8, 8]


def test_same_seed_same_weights_and_another_seed_others(tmp_path, ckpt):
    train(tmp_path / "again")
    train(tmp_path / "other", "seed=1")
    weights = [
        load_checkpoint(p).state_dict["body.0.raw"]
        for p in (ckpt, tmp_path / "again/checkpoints/best.ckpt", tmp_path / "other/checkpoints/best.ckpt")
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_resumed_run_equals_the_uninterrupted_one(tmp_path, monkeypatch):
    """With a schedule that does not know the length of the run, stopping and going on changes nothing."""
    train(tmp_path / "whole", "schedule=constant", "trainer.max_epochs=4")
    train(tmp_path / "parts", "schedule=constant")
    last = tmp_path / "parts/checkpoints/last.ckpt"
    monkeypatch.setattr("sys.argv", ["train.py", f"resume={last}", "trainer.max_epochs=4"])
    cli.train_command()
    a, b = load_checkpoint(tmp_path / "whole/checkpoints/last.ckpt"), load_checkpoint(last)
    assert a.epoch == b.epoch == 3
    assert all(torch.equal(a.state_dict[k], b.state_dict[k]) for k in a.state_dict)


@pytest.mark.parametrize(("override", "said"), [("model.width=17", "do not fit"), ("trainer.max_epochs=1", "higher")])
def test_resume_that_cannot_go_on_changes_nothing(override, said, tmp_path, monkeypatch, capsys):
    train(tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    monkeypatch.setattr(sys, "argv", ["train.py", f"resume={tmp_path}/run/checkpoints/last.ckpt", override])
    with pytest.raises(SystemExit):
        cli.train_command()
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "limits",
    [
        (),
        ("trainer.max_epochs=-1", "trainer.max_steps=3"),
        ("trainer.max_epochs=100000", "+trainer.max_time={seconds:1}"),
    ],
)
def test_resume_of_a_finished_run_says_so(limits, tmp_path, capsys):
    train(tmp_path / "run", *limits)
    last = tmp_path / "run/checkpoints/last.ckpt"
    trained = load_checkpoint(last)
    said = capsys.readouterr().out
    assert "nothing was left" not in said
    epochs = [line for line in said.splitlines() if line.startswith("epoch ")]  # as printed to no terminal
    assert len(epochs) == trained.epoch + 1
    assert re.match(r"epoch 1( of \d+)?: clean [\d.e-]+, ε=[\d.]+ [\d.e-]+, [\d.]+ s$", epochs[0])
    cli.train(compose("train", f"output={tmp_path}/run", f"resume={last}"))
    assert f"nothing was left to train: {last} is at step {trained.global_step}; to go on" in capsys.readouterr().out
    assert load_checkpoint(last).global_step == trained.global_step


def test_resume_from_python_goes_on(tmp_path):
    train(tmp_path / "run")
    last = tmp_path / "run/checkpoints/last.ckpt"
    content = torch.load(last, weights_only=True)
    content["liplayers"]["config"]["trainer"]["max_epochs"] = 3
    for newer in ("ema_decay", "save_every_steps", "extra"):  # an older checkpoint has fewer settings
        del content["liplayers"]["config"][newer]
    torch.save(content, last)
    cli.train(compose("train", f"output={tmp_path}/run", f"resume={last}"))
    assert load_checkpoint(last).epoch == 2


def test_interrupted_run_leaves_a_checkpoint_that_resumes(tmp_path, monkeypatch):
    arguments = [f"output={tmp_path}/run", *SMALL, "trainer.max_epochs=100000"]
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    last, interrupted = (tmp_path / "run/checkpoints" / name for name in ("last.ckpt", "interrupted.ckpt"))
    deadline = time.monotonic() + 120
    while not last.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in error
    assert f"resume={interrupted}" in output
    reached = load_checkpoint(interrupted).epoch
    monkeypatch.setattr("sys.argv", ["train.py", f"resume={interrupted}", f"trainer.max_epochs={reached + 2}"])
    cli.train_command()
    assert load_checkpoint(last).epoch == reached + 1


EXTRA = "extra={data:{_target_:liplayers.data.Digits,seed:5},share:0.25}"


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([], marks=pytest.mark.slow),
        ["loss=emma", "ema_decay=0.9", "trainer.accumulate_grad_batches=2", EXTRA],
    ],
)
def test_two_processes_train_what_one_does(arguments, tmp_path):
    """Each has half of every batch; the sums differ in rounding alone."""
    arguments = [*SMALL, "data.batch_size=256", "select_eps=0.02", *arguments]
    train(tmp_path / "one", *arguments)
    result = command("train.py", *arguments, "trainer.devices=2", "trainer.strategy=ddp", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("certify it:") == 1
    (two,) = (tmp_path / "runs/mlp-digits").iterdir()  # the second process has made no folder of its own
    for name in ("best.ckpt", "last.ckpt"):
        a, b = (load_checkpoint(run / "checkpoints" / name).state_dict for run in (tmp_path / "one", two))
        assert all(torch.allclose(a[k], b[k], rtol=0, atol=1e-5) for k in a)
    logs = [pd.read_csv(run / "csv/version_0/metrics.csv") for run in (tmp_path / "one", two)]
    logs = [log.drop(columns="train/samples_per_second") for log in logs]
    pd.testing.assert_frame_equal(*logs, rtol=1e-4, atol=1e-5)
    assert logs[0].filter(like="train/").notna().any().all()


def test_validation_and_checkpoints_take_the_average_of_the_weights(tmp_path, monkeypatch):
    from liplayers.training import CertifiedClassifier

    seen = []

    def record(self, *_):
        seen.append({name: p.detach().clone() for name, p in self.model.named_parameters()})

    monkeypatch.setattr(CertifiedClassifier, "on_train_batch_end", record)
    metrics = train(tmp_path, "ema_decay=0.8", "select_eps=0.02")
    average = seen[0]
    for weights in seen[1:]:
        average = {name: 0.8 * average[name] + 0.2 * weights[name] for name in weights}
    saved = load_checkpoint(tmp_path / "checkpoints/last.ckpt")
    assert all(torch.allclose(average[name], saved.state_dict[name], atol=1e-6) for name in average)
    assert not any(torch.allclose(seen[-1][name], saved.state_dict[name], atol=1e-4) for name in average)
    (figures,) = certify(f"ckpt={tmp_path}/checkpoints/last.ckpt", "data.split=val").values()
    assert figures["clean_accuracy"] == pytest.approx(metrics["val/accuracy"], abs=1e-6)


def test_schedules_count_the_steps_of_the_optimizer(tmp_path):
    """Six batches an epoch, four to a step: the last two make a step of their own."""
    train(tmp_path, "data.batch_size=200", "trainer.accumulate_grad_batches=4")
    content = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert content["global_step"] == content["lr_schedulers"][0]["last_epoch"] == 4
    assert content["lr_schedulers"][0]["_last_lr"] == [pytest.approx(0, abs=1e-9)]


def quadratic(make, steps: int, resume_at: int | None = None) -> torch.Tensor:
    """x after some steps down ½xᵀDx; saved and loaded into a new optimizer on the way if asked."""
    x, curvature = torch.nn.Parameter(torch.tensor([1.0, -2.0])), torch.tensor([1.0, 3.0])
    optimizer = make([x])
    for step in range(steps):
        if step == resume_at:
            state, x = copy.deepcopy(optimizer.state_dict()), torch.nn.Parameter(x.detach().clone())
            optimizer = make([x])
            optimizer.load_state_dict(state)
        optimizer.zero_grad()
        (0.5 * curvature * x * x).sum().backward()
        optimizer.step()
    return x.detach()


def test_kernel_decay_is_keras_penalty_on_kernels_alone():
    from liplayers.training import kernel_decay

    torch.manual_seed(0)
    ours = torch.nn.Linear(4, 3)
    theirs = copy.deepcopy(ours)
    x = torch.randn(5, 4)
    optimizers = [
        kernel_decay(ours.parameters(), partial(torch.optim.SGD, momentum=0.9), lr=0.1, weight_decay=2 * 0.3),
        torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9),
    ]
    for _ in range(3):
        for model, optimizer, penalty in zip((ours, theirs), optimizers, (0.0, 0.3), strict=True):
            optimizer.zero_grad()
            (model(x).square().mean() + penalty * model.weight.square().sum()).backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.bias, theirs.bias)


def test_lookahead_is_its_formula():
    from liplayers.training import Lookahead

    x = slow = torch.tensor([1.0, -2.0])
    for step in range(1, 12):
        x = x - 0.1 * torch.tensor([1.0, 3.0]) * x
        if step % 3 == 0:
            x = slow = slow + 0.4 * (x - slow)
    make = partial(Lookahead, inner=torch.optim.SGD, lr=0.1, every=3, alpha=0.4)
    assert torch.allclose(quadratic(make, 11), x)


def test_lookahead_synchronizes_once_between_two_steps_and_only_where_asked():
    from liplayers.training import Lookahead

    def make(x: torch.nn.Parameter, sync: bool) -> Lookahead:
        return Lookahead([x], torch.optim.SGD, lr=0.1, every=3, alpha=0.4, sync=sync)

    for sync, middle in ((True, 0.92), (False, 0.8)):  # φ = 1 − 0.4·0.2, or 1 − 0.2
        x = torch.nn.Parameter(torch.tensor(1.0))
        optimizer = make(x, sync)
        optimizer.synchronize()
        assert x.item() == 1
        for _ in range(2):
            x.grad = torch.tensor(1.0)
            optimizer.step()
        for _ in range(2):
            optimizer.synchronize()
            assert x.item() == pytest.approx(middle)
        y = torch.nn.Parameter(x.detach().clone())
        again = make(y, sync)
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        again.synchronize()
        assert y.item() == x.item()


@pytest.mark.parametrize("inner", [torch.optim.SGD, torch.optim.NAdam])
def test_lookahead_goes_on_where_it_was_saved_and_is_the_inner_optimizer_for_alpha_one(inner):
    from liplayers.training import Lookahead

    make = partial(Lookahead, inner=inner, lr=0.1, every=3)
    assert torch.equal(quadratic(make, 11, resume_at=5), quadratic(make, 11))
    plain = quadratic(partial(inner, lr=0.1), 11)
    assert torch.allclose(quadratic(partial(make, alpha=1), 11), plain)
    assert not torch.allclose(quadratic(make, 11), plain)


def test_lookahead_of_orthogonal_parameters_stays_on_the_manifold():
    from liplayers.training import Lookahead, ManifoldAdamW

    torch.manual_seed(0)
    layer = lp.ManifoldLinear(6, 6)
    optimizer = Lookahead(layer.parameters(), ManifoldAdamW, lr=0.3, every=2)
    for _ in range(4):
        optimizer.zero_grad()
        layer(torch.randn(5, 6)).square().sum().add(layer.weight.sum()).backward()
        optimizer.step()
    assert torch.allclose(layer.weight @ layer.weight.mT, torch.eye(6), atol=1e-5)


@pytest.mark.parametrize(
    "setting", [{"every": 0}, {"every": 2.0}, {"alpha": 0}, {"alpha": 1.5}, {"alpha": float("nan")}, {"sync": 1}]
)
def test_lookahead_names_a_bad_setting(setting):
    from liplayers.training import Lookahead

    with pytest.raises(ArgumentError, match=f"{next(iter(setting))}="):
        Lookahead([torch.nn.Parameter(torch.zeros(1))], torch.optim.SGD, **setting)


def test_mixed_precision_leaves_the_weights_in_float32(tmp_path, monkeypatch):
    from liplayers.training import CertifiedClassifier

    seen = []

    def look(self, *_):
        with torch.autocast("cpu", torch.bfloat16):
            weight = self.model.body[0].weight
            seen.append((weight.dtype, self.model(torch.rand(2, *self.input_shape)).dtype))
        gram = weight.double() @ weight.double().mT
        seen.append(bool((gram - torch.eye(len(gram))).abs().max() < 1e-5))

    monkeypatch.setattr(CertifiedClassifier, "on_train_batch_end", look)
    metrics = train(tmp_path / "bf16", "trainer.precision=bf16-mixed", "model.linear=bro", "optimizer.lr=0.02")
    assert set(seen) == {(torch.float32, torch.bfloat16), True}
    monkeypatch.undo()
    plain = train(tmp_path / "f32", "model.linear=bro", "optimizer.lr=0.02")
    assert metrics["val/accuracy"] == pytest.approx(plain["val/accuracy"], abs=0.1)
    states = [load_checkpoint(tmp_path / name / "checkpoints/last.ckpt").state_dict for name in ("bf16", "f32")]
    assert {value.dtype for value in states[0].values()} == {torch.float32}
    assert any(not torch.equal(states[0][key], states[1][key]) for key in states[0])


def classifier(model: torch.nn.Module, loss: torch.nn.Module, input_shape: tuple[int, ...], **options):
    from liplayers.training import CertifiedClassifier, constant

    module = CertifiedClassifier(
        model,
        loss,
        optimizer=torch.optim.SGD,
        schedule=constant,
        input_shape=input_shape,
        class_names="abc",
        eps=[0.1],
        config={},
        **options,
    )
    module.log = lambda *args, **kwargs: None
    return module


FREES_128_MB = """
import torch
from liplayers.training import keep_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

assert keep_freed_memory()
x = torch.ones(2**25)
held = resident()
del x
assert resident() > held - 2**20, (held, resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps memory as it likes")
def test_freed_memory_stays():
    subprocess.run([sys.executable, "-c", FREES_128_MB], check=True)  # a process of its own: it lasts


@pytest.mark.parametrize("channels_last", [False, True])
def test_channels_last_hands_such_images_to_the_model(channels_last):
    model = torch.nn.Sequential(lp.AOLConv2d(3, 4, 3, padding=1), torch.nn.Flatten(), lp.AOLLinear(100, 3))
    module = classifier(model, torch.nn.CrossEntropyLoss(), (3, 5, 5), channels_last=channels_last)
    strides = []
    model.register_forward_pre_hook(lambda _, inputs: strides.append(inputs[0].stride()))
    module.training_step((torch.rand(2, 3, 5, 5), torch.tensor([0, 1])), 0)
    assert strides == [(75, 1, 15, 3) if channels_last else (75, 25, 5, 1)]


def test_channels_last_of_a_table_is_refused():
    with pytest.raises(ConfigError, match=r"channels_last=true.*\(4,\)"):
        classifier(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), (4,), channels_last=True)


@pytest.mark.slow
def test_compiled_training_is_training_up_to_rounding(tmp_path):
    for name in ("false", "true"):
        train(tmp_path / name, f"compile={name}", "trainer.max_epochs=1")
    a, b = (load_checkpoint(tmp_path / name / "checkpoints/last.ckpt").state_dict for name in ("false", "true"))
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)


def test_multirun_gives_each_job_its_folder(tmp_path, monkeypatch):
    arguments = ["train.py", "-m", "model.linear=aol,bro", f"output={tmp_path}/sweep", *SMALL]
    monkeypatch.setattr("sys.argv", arguments)
    cli.train_command()
    for job, linear in enumerate(["aol", "bro"]):
        checkpoint = load_checkpoint(tmp_path / f"sweep/{job}/checkpoints/best.ckpt")
        assert checkpoint.config["model"]["linear"] == linear


@pytest.mark.parametrize("loss", group("loss"))
def test_every_loss_trains(loss, tmp_path):
    metrics = train(tmp_path, f"loss={loss}", "trainer.max_epochs=4", "optimizer.lr=0.02")
    assert metrics["val/accuracy"] > 0.5


def test_bound_below_the_head_is_current_in_every_step():
    """A body of plain layers moves its bound with every step; EMMA must not divide by an old one."""
    from liplayers.losses import EMMA

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
    module = classifier(model, EMMA(0.5), (4,))
    module.model[0].weight.data *= 3
    module.training_step((torch.rand(2, 4), torch.tensor([0, 1])), 0)
    assert module.split[0].body_bound == lp.lipschitz_bound(module.model[0])


def test_epsilon_ramp(tmp_path):
    train(tmp_path / "a", "loss=emma", "+epsilon_ramp.epsilon=0.5")
    for loss in ("offset_cross_entropy", "certificate_regularization"):
        with pytest.raises(ConfigError, match="EpsilonRamp"):
            train(tmp_path / loss, f"loss={loss}", "+epsilon_ramp.epsilon=0.5")


def test_training_without_validation_split_selects_on_train(tmp_path):
    assert "best" in train(tmp_path, "data.val_fraction=0")


@pytest.mark.parametrize("needed", ["data.val_fraction=0", "loss=emma"])
def test_figures_that_select_or_train_take_the_bound_of_every_step(needed, tmp_path, monkeypatch):
    """Adam takes these weights off their manifold within an epoch: the bound of its start would flatter them."""
    log, seen = CertifiedClassifier._log_metrics, []

    def compare_and_log(module, stage, loss, logits, labels, constants):
        if stage == "train":
            now = lp.split_head(module.model, module.input_shape).margin_lipschitz(logits.shape[1]).detach()
            torch.testing.assert_close(constants, now.float())
            seen.append(now.max().item())
        log(module, stage, loss, logits, labels, constants)

    monkeypatch.setattr(CertifiedClassifier, "_log_metrics", compare_and_log)
    train(tmp_path, "model.linear=manifold", "optimizer.lr=0.03", needed)
    assert max(seen) > 1.05 * min(seen)  # it moves


@pytest.mark.parametrize("model", ["model=lipconvnet", "model=sllnet"])
def test_convolutional_models_train_and_certify(model, tmp_path):
    small = ["model.channels=4", "model.width=16", "trainer.limit_train_batches=2", *SMALL[2:]]
    cli.train(compose("train", f"output={tmp_path}", model, *small))
    (figures,) = certify(f"ckpt={tmp_path}/checkpoints/last.ckpt").values()
    assert figures["samples"] == 359


# --------------------------------------------------------------------------------------------------------- certifying


def test_certify_writes_a_report_that_says_everything(ckpt, tmp_path):
    (figures,) = certify(f"ckpt={ckpt}", f"output={tmp_path}", "eps=[0.1,36/255]").values()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["results"] == figures
    assert [row["eps"] for row in figures["certified_accuracy"]] == ["0.1", "36/255"]
    assert report["checkpoint"]["sha256"] == load_checkpoint(ckpt).sha256
    assert report["lipschitz"]["layers"]["body.0"] == pytest.approx(1, abs=1e-5)
    rows = np.genfromtxt(tmp_path / "certificates.csv", delimiter=",", names=True)
    right = rows["label"] == rows["prediction"]
    assert right.mean() == pytest.approx(figures["clean_accuracy"])
    assert (right & (rows["radius"] > 0.1)).mean() == pytest.approx(figures["certified_accuracy"][0]["accuracy"])
    assert (tmp_path / "certified_accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_certify_twice_gives_the_same_numbers(ckpt, tmp_path):
    texts = []
    for name in ("a", "b"):
        certify(f"ckpt={ckpt}", f"output={tmp_path / name}")
        texts.append((tmp_path / name / "certificates.csv").read_text())
    assert texts[0] == texts[1]


def test_one_radius_is_a_list_of_one(ckpt, tmp_path):
    (figures,) = certify(f"ckpt={ckpt}", f"output={tmp_path}", "eps=0.25").values()
    assert [row["radius"] for row in figures["certified_accuracy"]] == [0.25]


def test_certifying_writes_nothing_that_only_the_checkpoint_asks_for(ckpt, tmp_path):
    from liplayers.cli.proving import _data_config

    checkpoint = load_checkpoint(ckpt)
    checkpoint.config["data"].update(download=True, cache=str(tmp_path), augment=[1])
    config = _data_config(checkpoint, compose("certify", f"ckpt={ckpt}"))
    assert (config["download"], config["cache"], config["augment"]) == (False, None, [])


def test_certify_goes_beside_the_run_by_default(ckpt, run):
    certify(f"ckpt={ckpt}", "data.split=val")
    assert (run / "certify-best-val" / "report.json").is_file()


def test_compare(ckpt, tmp_path):
    train(tmp_path / "second", "model.linear=aol")
    result = certify(f"ckpt=[{ckpt},{tmp_path}/second/checkpoints/best.ckpt]", f"output={tmp_path}/both")
    assert set(result) == {"first", "second"} == set(json.loads((tmp_path / "both/comparison.json").read_text()))
    assert (tmp_path / "both/comparison.png").is_file()
    assert (tmp_path / "both/second/certificates.csv").is_file()


def test_compare_refuses_different_data(ckpt, tmp_path):
    with pytest.raises(ConfigError, match="different data"):
        certify(f"ckpt=['{ckpt}','{npz_run(tmp_path)}']", f"output={tmp_path}/both")
    assert not (tmp_path / "both").exists()


# ---------------------------------------------------------------------------------------------------------- bad input


def test_existing_run_is_not_written_over(run):
    before = (run / "checkpoints/best.ckpt").read_bytes()
    with pytest.raises(OutputError, match=r"resume=.*overwrite=true"):
        train(run)
    assert (run / "checkpoints/best.ckpt").read_bytes() == before


class Code:
    """Would leave a mark if it were unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def target(name: str, place: str = "augment"):
    """A change that makes the config of the data call `name` on a path."""

    def change(content: dict, mark: Path) -> None:
        node = {"_target_": name, "path": str(mark), "fname": str(mark), "X": [1.0]}
        config = content["liplayers"]["config"]
        if place == "augment":
            config["data"]["augment"] = [node]
        elif place == "tuple":
            config["model"]["activation"] = (node,)
        elif place == "interpolation":
            config["model"]["activation"] = f"${{oc.create:{{_target_: {name}, fname: {mark}, X: [1.0]}}}}"
        else:
            config[place] = node

    return change


def entry(key: str, value: object):
    def change(content: dict, mark: Path) -> None:
        content["liplayers"][key] = value

    return change


def on_meta(content: dict, mark: Path) -> None:
    layer = {"_target_": "liplayers.ManifoldLinear", "_partial_": True, "device": "meta"}
    content["liplayers"]["config"]["model"]["linear"] = layer


CHANGES = {
    "model without values": on_meta,
    "wrong weights": lambda content, mark: content["liplayers"]["config"]["model"].update(width=17),
    "no config": lambda content, mark: content["liplayers"].pop("config"),
    "config a list": entry("config", [1]),
    "config empty": entry("config", {}),
    "shape a number": entry("input_shape", 3),
    "state a list": lambda content, mark: content.update(state_dict=[1]),
    "other target": target("numpy.savetxt"),
    "target in a tuple": target("numpy.savetxt", "tuple"),
    "target by interpolation": target("numpy.savetxt", "interpolation"),
    "hidden target": target("liplayers.data.folder.hashlib.sha256"),
    "a function of ours that writes": target("liplayers.export_onnx"),
    "a function among the layers": target("liplayers.layers.get_layer"),
    "foreign name in our module": target("liplayers.data.module.inspect"),
    "target of a loss": target("numpy.savetxt", "loss"),
}


def damaged(kind: str, ckpt: Path, folder: Path) -> Path:
    path = folder / f"{kind}.ckpt"
    if kind == "truncated":
        path.write_bytes(ckpt.read_bytes()[:2000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "foreign":
        torch.save({"state_dict": {}}, path)
    elif kind == "tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "code":
        torch.save({"state_dict": Code(folder / "mark")}, path)
    elif kind == "folder":
        path.mkdir()
    elif kind in CHANGES:
        content = torch.load(ckpt, weights_only=True)
        CHANGES[kind](content, folder / "mark")
        torch.save(content, path)
    return path


KINDS = ["missing", "truncated", "empty", "text", "foreign", "tensor", "code", "folder", *CHANGES]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("wrong weights", "model without values")])
def test_bad_checkpoints_do_not_resume_and_run_no_code(kind, ckpt, tmp_path):
    path = damaged(kind, ckpt, tmp_path)
    with pytest.raises(CheckpointError) as caught:
        cli.train(compose("train", f"resume='{path}'", f"output={tmp_path}/out"))
    assert str(path) in str(caught.value)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_bad_checkpoints_are_named_and_run_no_code(kind, ckpt, tmp_path):
    path = damaged(kind, ckpt, tmp_path)
    with pytest.raises(CheckpointError) as caught:
        certify(f"ckpt='{path}'", f"output={tmp_path}/out")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "mark").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layer", ["liplayers.ManifoldLinear", "liplayers.layers.CayleyLinear"])
def test_a_config_may_name_a_layer_itself(layer, tmp_path):
    train(tmp_path / "run", f"model.linear={{_target_:{layer},_partial_:true}}")
    (result,) = certify(f"ckpt={tmp_path}/run/checkpoints/best.ckpt").values()
    assert 0 <= result["clean_accuracy"] <= 1


def npz_run(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("train", "test"):
        np.savez(tmp_path / f"{name}.npz", images=rng.random((40, 1, 4, 4), np.float32), labels=np.arange(40) % 2)
    train(tmp_path / "run", "data=npz", f"data.train={tmp_path}/train.npz", f"data.test={tmp_path}/test.npz")
    return tmp_path / "run/checkpoints/last.ckpt"


@pytest.mark.parametrize("change", ["nan", "inf", "above", "channels", "size", "classes"])
def test_bad_data_is_named_and_leaves_the_report(change, tmp_path):
    checkpoint = npz_run(tmp_path)
    certify(f"ckpt={checkpoint}", f"output={tmp_path}/out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    images = np.random.default_rng(0).random((40, 1, 4, 4), np.float32)
    labels = np.arange(40) % 2
    if change in ("nan", "inf", "above"):
        images[3, 0, 1, 2] = {"nan": np.nan, "inf": np.inf, "above": 1.25}[change]
    elif change == "channels":
        images = np.repeat(images, 3, 1)
    elif change == "size":
        images = images[:, :, :3]
    else:
        labels = np.arange(40) % 3
    for name in ("train", "test"):
        np.savez(tmp_path / f"{name}.npz", images=images, labels=labels)
    with pytest.raises(LipschitzError) as caught:
        certify(f"ckpt={checkpoint}", f"output={tmp_path}/out")
    assert "\n" not in str(caught.value)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["experiment=digitss"], "did you mean digits"),
        (["model=lipconvnett"], "did you mean lipconvnet"),
        (["loss=ema"], "did you mean emma"),
        (["model.widht=3"], "did you mean model.width"),
        (["model.linear=cayly"], "did you mean cayley"),
        (["model.activation=maxmim"], "did you mean maxmin"),
        (["model.width=-3"], "width=-3"),
        (["eps=[-0.5]"], "eps=-0.5"),
        (["eps=[half]"], "eps='half'"),
        (["data=mnist", "data.root=nowhere"], "nowhere"),
        (["data=folder"], "data.root is required"),
        (["data=folder", "data.root=~/x"], "write name=value"),
        (["model.width = 3"], "write name=value"),
        (["model.linear=[aol,bro]"], "linear layer ['aol', 'bro']"),
        (["output=[a,b]"], "expected one folder"),
        (["eps=null"], "eps=None"),
        (["eps=[0.1412,0.14120000001]"], "six digits"),
        (["threads=0"], "threads=0"),
        (["trainer.max_epochs=-1"], "trainer.max_epochs=-1"),
        (["+epsilon_ramp.epsilon=1", "+epsilon_ramp.stat=2"], "stat"),
        (["optimizer.lr=fast"], "optimizer"),
        (["seed=x"], "seed='x'"),
        (["trainer.max_epochs=many"], "trainer.max_epochs='many'"),
        (["resume=gone.ckpt"], "gone.ckpt"),
        (["eps=[1"], "error:"),
        (["output=/proc/nowhere"], "output="),
        (["data.batch_size=255", "trainer.accelerator=cpu", "trainer.devices=2"], "batch_size=255"),
        (["ema_decay=1"], "decay=1"),
        (["save_every_steps=0"], "every=0"),
        (["extra={data:{_target_:liplayers.data.Digits},share:2}"], "extra.share"),
    ],
)
def test_bad_training_commands_say_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    assert said in failing(monkeypatch, capsys, "train.py", arguments, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "ckpt"),
        (["eps=[-1]"], "eps=-1"),
        (["eps=[x]"], "eps='x'"),
        (["eps=36/255x"], "eps="),
        (["ckpt=5"], "ckpt=5"),
        (["data.split=tets"], "did you mean test"),
        (["device=tpu"], "device"),
        (["ckpt=gone.ckpt"], "gone.ckpt"),
        (["ckpts=gone.ckpt"], "did you mean ckpt"),
    ],
)
def test_bad_certify_commands_say_one_line(arguments, said, ckpt, tmp_path, monkeypatch, capsys):
    if arguments and not arguments[0].startswith("ckpt"):
        arguments = [f"ckpt={ckpt}", *arguments]
    assert said in failing(monkeypatch, capsys, "certify.py", arguments, tmp_path)


def test_the_scripts_themselves(ckpt, tmp_path):
    result = command("certify.py", f"ckpt={ckpt}", f"output={tmp_path}/out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "clean" in result.stdout
    assert f"{tmp_path}/out/report.json" in result.stdout
    result = command("train.py", "model=mpl", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: unknown model config 'mpl': did you mean mlp?\n"


def test_certify_wrong_image_size_names_both(ckpt, tmp_path):
    content = torch.load(ckpt, weights_only=True)
    content["liplayers"]["input_shape"] = [1, 4, 16]
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(ShapeError, match=r"\(1, 8, 8\).*\(1, 4, 16\)"):
        certify(f"ckpt={tmp_path}/x.ckpt")


@pytest.mark.parametrize(
    ("version", "start"), [("0.1.0", "family"), ("0.1", "family"), ("0.2.0", None), ("1.0.0", None)]
)
def test_older_checkpoints_start_their_layers_as_they_did(version, start, tmp_path):
    model = {"_target_": "liplayers.models.bronet", "stem": "aol"}
    checkpoint = Checkpoint(tmp_path, "", version, {"model": model}, (3, 4, 4), ("a", "b"), 0, 0, {})
    assert checkpoint.model_config == (model if start is None else {**model, "start": start})
    other = {"_target_": "liplayers.models.convnet"}
    assert Checkpoint(tmp_path, "", version, {"model": other}, (3,), (), 0, 0, {}).model_config == other


STOOD_FOR = [
    ("rescaled", "0.1.0", True),
    ("soc", "0.1.0", True),
    ("aol", "0.1.0", False),
    ("rescaled", "0.2.0", False),
    ("rko", "x", True),
]


@pytest.mark.parametrize(("stem", "version", "refused"), STOOD_FOR)
def test_a_checkpoint_whose_parameters_stood_for_other_weights_is_refused(stem, version, refused, tmp_path):
    model = torch.nn.Sequential(get_layer(stem, "conv")(3, 4, 3), torch.nn.Flatten(), lp.NormalizedLinear(16, 2))
    checkpoint = Checkpoint(tmp_path, "", version, {}, (3, 4, 4), ("a", "b"), 0, 0, model.state_dict())
    if refused:
        with pytest.raises(CheckpointError, match=rf"liplayers {version}, where 0 \((Rescaled|SOC)|version='x'"):
            checkpoint.load_into(model)
    else:
        checkpoint.load_into(model)
