"""Certificates as proofs: the network that runs, its radii, the report, and its verification."""

from __future__ import annotations

import copy
import csv
import hashlib
import importlib
import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor, nn

import liplayers as lp
from liplayers import cli
from liplayers.certification import CertifiedNetwork, certified_radius
from liplayers.certification.network import LARGEST_RADIUS
from liplayers.checkpoint import load_checkpoint
from liplayers.cli.configuration import build
from liplayers.data import DataModule, Digits
from liplayers.errors import (
    ArgumentError,
    CheckpointError,
    ConfigError,
    LipschitzError,
    ShapeError,
    UnknownBoundError,
    UnknownNameError,
    VerificationError,
)

F64 = torch.float64
CONFIGS = Path(__file__).resolve().parent.parent / "configs"
DENSE = [name for name, family in lp.FAMILIES.items() if family.linear]
BLOCKS = [name for name, family in lp.FAMILIES.items() if family.dense_block]


def classifier(width: int = 16, depth: int = 2, classes: int = 4) -> nn.Module:
    torch.manual_seed(0)
    body = [layer for _ in range(depth) for layer in (lp.CayleyLinear(width, width), lp.MaxMin())]
    return nn.Sequential(nn.Flatten(), *body, lp.NormalizedLinear(width, classes))


# The network ----------------------------------------------------------------------------------------------------------


def test_what_runs_is_the_frozen_model_in_float64_and_the_model_stays_as_it_was():
    model = classifier().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    network = CertifiedNetwork(model, (1, 4, 4), 4)
    x = torch.rand(5, 1, 4, 4)
    assert torch.equal(network(x), lp.freeze(model, (1, 4, 4)).double()(x.double()))
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {t.dtype for t in network.weights().values()} == {torch.float32}
    assert network.dtype == F64


def test_fast_mode_is_the_model_in_its_own_dtype_and_knows_no_rounding():
    network = CertifiedNetwork(classifier(), (16,), 4, mode="fast")
    x = torch.rand(5, 16)
    assert network(x).dtype == torch.float32
    assert torch.allclose(network.radius(x), CertifiedNetwork(classifier(), (16,), 4).radius(x), rtol=1e-4)
    assert network.worst_rounding is None
    with pytest.raises(ArgumentError, match="mode=proof"):
        network.rounding(1.0)


def test_a_radius_is_the_naive_one_less_the_rounding_of_both_logits_on_both_ends():
    network = CertifiedNetwork(classifier(), (16,), 4)
    x = torch.rand(50, 16, dtype=F64)
    naive = certified_radius(network(x), network.margin_lipschitz)
    error = network.worst_rounding
    assert error is None
    radius = network.radius(x)
    assert network.worst_rounding is not None
    e = network.worst_rounding.error
    nearest = network.margin_lipschitz[network.margin_lipschitz > 0].min()
    assert ((naive - radius) > 0).all()
    assert ((naive - radius) <= 4.01 * e / nearest).all()
    assert e < 1e-12


def test_the_rounding_that_is_counted_is_that_of_the_whole_ball():
    """A large margin reaches far from a small input, where logits are large and their rounding is, too."""
    linear = nn.Linear(2, 2).double()
    linear.weight.data = torch.tensor([[1e-3, 0.0], [-1e-3, 0.0]], dtype=F64)
    linear.bias.data = torch.tensor([1.0, -1.0], dtype=F64)
    network = CertifiedNetwork(linear, (2,), 2)
    assert network.radius(torch.zeros(1, 2)).item() == pytest.approx(1000, rel=1e-9)
    assert network.worst_rounding is not None
    assert network.worst_rounding.input_norm >= 1000


def test_radii_end_where_the_rounding_was_analysed():
    constant = nn.Linear(2, 2)
    constant.weight.data.zero_()
    constant.bias.data = torch.tensor([1.0, 0.0])
    radius = CertifiedNetwork(constant, (2,), 2).radius(torch.rand(3, 2))
    assert radius.tolist() == [LARGEST_RADIUS] * 3
    assert (CertifiedNetwork(constant, (2,), 2, mode="fast").radius(torch.rand(3, 2)) > 1e100).all()


def test_a_radius_does_not_depend_on_the_rest_of_the_batch():
    network = CertifiedNetwork(classifier(), (16,), 4)
    x = torch.rand(20, 16, dtype=F64) * 10.0 ** torch.arange(-3, 17)[:, None].clamp_max(4)
    together = network.radius(x)
    alone = torch.cat([network.radius(row[None]) for row in x])
    assert torch.allclose(together, alone, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300])
def test_inputs_beyond_what_can_be_computed_have_no_radius(value: float):
    network = CertifiedNetwork(classifier(), (16,), 4)
    x = torch.rand(3, 16, dtype=F64)
    x[1, 2] = value
    radius = network.radius(x)
    assert radius[1] == 0
    assert (radius[[0, 2]] > 0).all()


def test_ties_and_denormal_weights_have_no_radius():
    linear = nn.Linear(2, 3).double()
    linear.weight.data = torch.tensor([[5e-324, 0.0], [0.0, 5e-324], [0.0, 0.0]], dtype=F64)
    linear.bias.data.zero_()
    assert CertifiedNetwork(linear, (2,), 3).radius(torch.rand(4, 2, dtype=F64)).tolist() == [0.0] * 4


def test_huge_weights_are_certified_with_a_small_radius_or_none():
    linear = nn.Linear(2, 2).double()
    linear.weight.data = torch.tensor([[1e150, 0.0], [0.0, 1e150]], dtype=F64)
    linear.bias.data.zero_()
    radius = CertifiedNetwork(linear, (2,), 2).radius(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    assert radius[0].item() == pytest.approx(1 / math.sqrt(2), rel=1e-9)
    assert radius[1] == 0
    linear.weight.data *= 1e150
    assert CertifiedNetwork(linear, (2,), 2).radius(torch.tensor([[1.0, 0.0]])).item() == 0


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"mode": "prof"}, UnknownNameError),
        ({"num_classes": 1}, ShapeError),
        ({"num_classes": 5}, ShapeError),
        ({"input_shape": (17,)}, ShapeError),
    ],
)
def test_bad_arguments_raise(arguments: dict[str, Any], error: type[LipschitzError]):
    with pytest.raises(error):
        CertifiedNetwork(classifier(), **{"input_shape": (16,), "num_classes": 4} | arguments)  # type: ignore[arg-type]


def test_what_was_proven_cannot_be_cast_moved_or_trained():
    network = CertifiedNetwork(classifier(), (16,), 4)
    for change in (network.float, network.half, network.train, lambda: network.to("cpu"), network.cpu):
        with pytest.raises(ArgumentError, match="a CertifiedNetwork stays"):
            change()
    assert network.eval() is network
    assert not any(p.requires_grad for p in network.parameters())


def test_what_was_proven_cannot_be_written_to():
    network = CertifiedNetwork(classifier(), (16,), 4)
    with pytest.raises(ArgumentError, match="stays what its proofs are about"):
        network.load_state_dict({k: 100 * v for k, v in network.state_dict().items()})
    x = torch.rand(2, 16)
    before = network.radius(x)
    with torch.no_grad():
        next(network.network.parameters()).mul_(100)  # of a copy
    assert torch.equal(network.radius(x), before)


def test_inputs_of_another_shape_have_no_certificate():
    """A pool of an 8 × 8 image averages; one of a 4 × 4 image does not, and has another bound."""
    model = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16, 3))
    network = CertifiedNetwork(model, (1, 32, 32), 3)
    for shape in [(2, 1, 4, 4), (1, 32, 32), (2, 3, 32, 32)]:
        with pytest.raises(ShapeError, match=r"the proofs are for \(N, 1, 32, 32\)"):
            network.radius(torch.rand(shape))


class Mixing(nn.Module):
    def __init__(self, compute: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x)


@pytest.mark.parametrize(
    "part",
    [
        lp.MaxMin(dim=0),
        lp.MaxMin(dim=-2),
        lp.MaxMin(dim=0, pairs="neighbours"),
        lp.GroupSort(dim=0),
        lp.GroupSort(None, dim=-2),
        lp.BetaAbs(dim=0),
        lp.ConvexResidual(lp.MaxMin(-2)),
        Mixing(lambda x: (x + x.unsqueeze(1))[:, 0]),
        Mixing(lambda x: x - x[0]),
        Mixing(lambda x: x.reshape(-1, 2, 2).transpose(0, 1).reshape(-1, 4)),
        Mixing(lambda x: x + x.shape[0] * 1.0),
    ],
    ids=range(11),
)
def test_a_model_that_mixes_the_samples_of_a_batch_is_refused(part: nn.Module):
    for width in (2, 4, 5, 7):
        model = nn.Sequential(nn.Linear(4, width), copy.deepcopy(part), nn.Linear(width, 3))
        with pytest.raises((UnknownBoundError, ShapeError)):
            CertifiedNetwork(model, (4,), 3)


def test_a_replaced_call_and_hooks_of_every_module_are_refused():
    class Tenfold(nn.Sequential):
        def __call__(self, *args: Any) -> Any:
            return 10 * super().__call__(*args)

    with pytest.raises((UnknownBoundError, ArgumentError), match="__call__"):
        CertifiedNetwork(Tenfold(nn.Linear(4, 3)), (4,), 3)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: 3 * out)
    try:
        with pytest.raises((UnknownBoundError, ArgumentError), match="hook"):
            CertifiedNetwork(nn.Linear(4, 3), (4,), 3)
        with pytest.raises(UnknownBoundError, match="hook"):
            lp.lipschitz_bound(nn.Linear(4, 3))
    finally:
        handle.remove()


def test_an_input_that_a_module_writes_to_stays_as_it_was():
    network = CertifiedNetwork(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)), (3,), 2)
    x = torch.tensor([[-100.0, 1.0, 1.0]], dtype=F64)
    network.radius(x)
    assert x.tolist() == [[-100.0, 1.0, 1.0]]
    assert network.worst_rounding is not None
    assert network.worst_rounding.input_norm >= 100


def test_squares_that_overflow_have_no_certificate():
    torch.manual_seed(0)
    model = nn.Sequential(lp.Scale(1e154), lp.GlobalL2Pool2d(), lp.Scale(1e-154), nn.Linear(2, 2)).double()
    assert CertifiedNetwork(model, (2, 2, 2), 2).radius(torch.rand(8, 2, 2, 2)).tolist() == [0.0] * 8


def test_weights_of_several_dtypes_are_kept_and_hashed_as_they_are():
    model = nn.Sequential(nn.Linear(4, 4), lp.PositionEmbedding((4,), dtype=F64), nn.Linear(4, 3))
    model[1].position.data.uniform_()
    model = nn.Sequential(model[1], lp.Scale(1.0), nn.Linear(4, 3).double())
    network = CertifiedNetwork(model, (4,), 3)
    assert {str(t.dtype) for t in network.weights().values()} == {"torch.float64"}
    again = CertifiedNetwork(model, (4,), 3, weights=network.weights())
    assert again.sha256() == network.sha256()
    model[0].position.data += 1e-10
    assert CertifiedNetwork(model, (4,), 3).sha256() != network.sha256()


def test_it_can_be_made_in_inference_mode():
    with torch.inference_mode():
        radius = CertifiedNetwork(classifier(), (16,), 4).radius(torch.rand(2, 16))
    assert (radius > 0).all()


def test_weights_of_another_machine_run_and_those_of_another_model_are_refused():
    network = CertifiedNetwork(classifier(), (16,), 4)
    near = {name: tensor * (1 + 2**-20) for name, tensor in network.weights().items()}
    again = CertifiedNetwork(classifier(), (16,), 4, weights=near)
    assert again.sha256() != network.sha256()
    assert all(torch.equal(tensor, near[name]) for name, tensor in again.weights().items())
    assert again.bounds.split.body_bound > 1 + 1e-6
    for spoil, says in [
        (lambda state: state.pop("1.weight"), "1.weight: is not in both"),
        (lambda state: state.update(new=torch.zeros(1)), "new: is not in both"),
        (lambda state: state.update({"1.bias": torch.zeros(3)}), "1.bias: is not in both"),
        (lambda state: state.update({"1.bias": torch.zeros(16).double()}), "1.bias: is torch.float64"),
        (lambda state: state["1.weight"].mul_(1.1), "1.weight: differs"),
        (lambda state: state["1.weight"].fill_(math.nan), "1.weight: differs"),
    ]:
        state = {name: tensor.clone() for name, tensor in network.weights().items()}
        spoil(state)
        with pytest.raises(CheckpointError, match=says):
            CertifiedNetwork(classifier(), (16,), 4, weights=state)


def test_the_hash_depends_on_every_bit_name_and_shape():
    from liplayers.certification.network import state_sha256

    states = [
        {"a": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(2, 3, dtype=F64)},
        {"a": torch.tensor([[0.0, 0, 0], [0, 0, -0.0]])},
        {"a": torch.zeros(2, 3), "b": torch.zeros(0)},
    ]
    assert len({state_sha256(state) for state in states}) == len(states)
    assert state_sha256({"a": torch.ones(1), "b": torch.ones(2)}) == state_sha256(
        {"b": torch.ones(2), "a": torch.ones(1)}
    )


# Random architectures -------------------------------------------------------------------------------------------------


@torch.no_grad()
def difference_quotient(network: CertifiedNetwork, shape: tuple[int, ...], seed: int) -> float:
    """The largest difference quotient of the logit vector over random pairs of all distances."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, *shape, dtype=F64, generator=generator)
    step = torch.randn(64, *shape, dtype=F64, generator=generator) * 10.0 ** (
        -4 * torch.rand(64, *[1] * len(shape), dtype=F64, generator=generator)
    )
    length = step.flatten(1).norm(dim=1)
    return ((network(x + step) - network(x)).norm(dim=1) / length).max().item()


@torch.enable_grad()
def strongest(network: Callable[[Tensor], Tensor], x: Tensor, radius: Tensor, steps: int = 30) -> Tensor:
    """The prediction at the point of each ball that gradient ascent on the runner-up's logit finds."""
    y = network(x).argmax(1)
    delta = torch.zeros_like(x)
    for _ in range(steps):
        delta.requires_grad_(True)
        logits = network(x + delta)
        others = logits.masked_fill(nn.functional.one_hot(y, logits.shape[1]).bool(), -math.inf).amax(1)
        (gradient,) = torch.autograd.grad((others - logits.gather(1, y[:, None])[:, 0]).sum(), delta)
        with torch.no_grad():
            delta = delta + gradient / gradient.flatten(1).norm(dim=1).clamp_min(1e-30)[:, None] * radius[:, None]
            length = delta.flatten(1).norm(dim=1)
            delta = delta * (radius / length.clamp_min(1e-30)).clamp_max(1)[:, None] * (1 - 1e-14)
    with torch.no_grad():
        return network(x + delta).argmax(1)


@settings(max_examples=25, deadline=None)
@given(
    widths=st.lists(st.integers(2, 9), min_size=2, max_size=5),
    families=st.lists(st.sampled_from(DENSE), min_size=4, max_size=4),
    blocks=st.lists(st.sampled_from(BLOCKS), max_size=2),
    activation=st.sampled_from([lp.MaxMin, nn.ReLU, nn.Tanh, lp.Abs, lambda: lp.GroupSort(3), nn.GELU]),
    head=st.sampled_from([lp.NormalizedLinear, nn.Linear, lp.AOLLinear]),
    classes=st.integers(2, 5),
    seed=st.integers(0, 1000),
)
def test_certificates_of_random_dense_networks_hold(
    widths: list[int],
    families: list[str],
    blocks: list[str],
    activation: Callable,
    head: Callable,
    classes: int,
    seed: int,
):
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for (a, b), name in zip(itertools.pairwise(widths), families, strict=False):
        layers += [lp.FAMILIES[name].linear(a, b), activation()]  # type: ignore[misc]
    layers += [lp.FAMILIES[name].dense_block(widths[-1]) for name in blocks]  # type: ignore[misc]
    model = nn.Sequential(*layers, head(widths[-1], classes))
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    check(CertifiedNetwork(model, (widths[0],), classes), (widths[0],), seed)


CONV = [(name, family) for name, family in lp.FAMILIES.items() if family.conv or family.conv_block]


@pytest.mark.parametrize(("name", "family"), CONV, ids=[name for name, _ in CONV])
@pytest.mark.parametrize("stride", [1, 2])
def test_certificates_of_convolutional_networks_hold(name: str, family: Any, stride: int):
    torch.manual_seed(0)
    layers: list[nn.Module] = [lp.Normalize([0.5, 0.4], [0.5, 0.25])]
    if family.conv:
        if name == "bcop" and stride > 1:
            pytest.skip("BCOP has no strides")
        kernel = stride if name == "rko" else 3
        layers += [family.conv(2, 4, kernel, stride=stride, padding=(kernel - 1) // 2), lp.MaxMin()]
    else:
        layers += [lp.PadChannels(4), family.conv_block(4), lp.MaxPool2d(stride)]
    size = 4 * (6 // stride) ** 2
    model = nn.Sequential(*layers, nn.Flatten(), lp.NormalizedLinear(size, 3))
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    check(CertifiedNetwork(model, (2, 6, 6), 3), (2, 6, 6), 0)


def check(network: CertifiedNetwork, shape: tuple[int, ...], seed: int) -> None:
    """Bounds above what random pairs show; certified points keep their prediction under attack."""
    assert difference_quotient(network, shape, seed) <= network.bounds.upper[""] * (1 + 1e-9)
    x = torch.rand(16, math.prod(shape), dtype=F64, generator=torch.Generator().manual_seed(seed))
    flat = lambda z: z.view(-1, *shape)  # noqa: E731
    radius = network.radius(flat(x))
    assert radius.isfinite().all()
    prediction = network(flat(x)).argmax(1)

    attacked = strongest(lambda z: network(flat(z)), x, radius)
    assert (attacked == prediction)[radius > 0].all()


# The report and its verification --------------------------------------------------------------------------------------


def compose(name: str, *overrides: str) -> Any:
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose(name, list(overrides))


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run on the digits, and its report in `report`."""
    folder = tmp_path_factory.mktemp("run")
    small = ["model.width=16", "model.depth=1", "trainer.max_epochs=2", "trainer.enable_progress_bar=false"]
    cli.train(compose("train", f"output={folder}", "trainer.accelerator=cpu", *small))
    cli.certify(compose("certify", f"ckpt={folder}/checkpoints/best.ckpt", f"output={folder}/report"))
    return folder


def verify(folder: Path, *overrides: str, ckpt: str = "checkpoints/best.ckpt") -> int:
    arguments = [f"ckpt={folder}/{ckpt}", f"verify={folder}/report/report.json", *overrides]
    return cli.certify(compose("certify", *arguments))["verified"]


@pytest.fixture
def folder(certified: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(certified, tmp_path / "copy"))


def test_the_report_says_what_was_proven(certified: Path):
    report = json.loads((certified / "report/report.json").read_text())
    assert report["mode"] == "proof"
    assert report["dtype"] == "float64"
    assert report["network"]["stored_dtypes"] == ["float32"]
    assert 0 < report["rounding"]["logit_error"] < 1e-9
    assert report["rounding"]["largest_term"]["layer"] in report["lipschitz"]["layers"]
    assert report["rounding"]["input_norm"] >= 8  # 64 pixels in [0, 1]
    content = (certified / "report/certificates.csv").read_bytes()
    assert report["certificates_sha256"] == hashlib.sha256(content).hexdigest()
    weights = torch.load(certified / "report/network.pt", weights_only=True)
    assert sum(t.numel() for t in weights.values()) >= report["network"]["parameters"]


def test_a_report_verifies_and_writes_nothing(folder: Path):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert verify(folder) == 359
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_what_python_saves_of_a_checkpoint_is_what_the_command_writes(folder: Path):
    path = folder / "checkpoints/best.ckpt"
    command = json.loads((folder / "report/report.json").read_text())
    checkpoint = load_checkpoint(path)
    model = build(OmegaConf.create(checkpoint.config["model"]), input_shape=(1, 8, 8), num_classes=10)
    checkpoint.load_into(model)
    eps = [row["eps"] for row in command["results"]["certified_accuracy"]]
    found = lp.certify(model.eval(), DataModule(Digits()), eps=eps, checkpoint=path)
    (folder / "report").rename(folder / "command")
    assert {p.name for p in found.save(folder / "report")} == {p.name for p in (folder / "command").iterdir()}
    python = json.loads((folder / "report/report.json").read_text())
    assert list(python) == list(command)
    for report in (python, command):
        del report["environment"]
        report["checkpoint"]["path"] = None
    assert python == command
    files = [(folder / name / "certificates.csv").read_bytes() for name in ("report", "command")]
    assert files[0] == files[1]
    assert verify(folder) == 359


def test_a_report_in_fast_mode_verifies(folder: Path):
    shutil.rmtree(folder / "report")
    cli.certify(compose("certify", f"ckpt={folder}/checkpoints/best.ckpt", f"output={folder}/report", "mode=fast"))
    report = json.loads((folder / "report/report.json").read_text())
    assert "rounding" not in report
    assert "no proofs" in report["statement"]
    assert sorted(p.name for p in (folder / "report").iterdir()) == [
        "certificates.csv", "certified_accuracy.png", "report.json",
    ]  # fmt: skip
    assert verify(folder) == 359


def test_a_report_of_another_machine_verifies_with_its_own_weights(folder: Path):
    """There the weights came out a little different; everything was computed from those."""
    weights = torch.load(folder / "report/network.pt", weights_only=True)
    for tensor in weights.values():
        tensor.mul_(1 + 2**-22)
    from liplayers.checkpoint import load_checkpoint
    from liplayers.cli.proving import certify_one

    cfg = compose("certify", f"ckpt={folder}/checkpoints/best.ckpt")
    there = certify_one(load_checkpoint(folder / "checkpoints/best.ckpt"), cfg, ["36/255"], weights)
    importlib.import_module("liplayers.cli.certify").write_and_print({"there": there}, folder / "report", ["36/255"])
    assert verify(folder) == 359


def edited(folder: Path, change: Callable[[dict], Any]) -> None:
    path = folder / "report/report.json"
    report = json.loads(path.read_text())
    change(report)
    path.write_text(json.dumps(report))


def leaves(node: Any, path: tuple = ()) -> list[tuple]:
    if isinstance(node, dict):
        return [leaf for key, value in node.items() for leaf in leaves(value, (*path, key))]
    if isinstance(node, list):
        return [leaf for i, value in enumerate(node) for leaf in leaves(value, (*path, i))]
    return [path]


UNVERIFIED = ("environment", "device", "data.config", "checkpoint.path")


def test_every_single_change_of_the_report_is_caught(folder: Path, monkeypatch: pytest.MonkeyPatch):
    from liplayers.cli import verify as module

    original = (folder / "report/report.json").read_text()
    fresh: list[Any] = []
    real = module.certify_one  # computed once: the report's settings are compared below by what was asked

    def once(checkpoint: Any, cfg: Any, eps: Any, weights: Any) -> Any:
        if not fresh:
            fresh.append(real(checkpoint, cfg, eps, weights))
        return fresh[0]

    monkeypatch.setattr(module, "certify_one", once)
    verify(folder)
    tried = 0
    for leaf in leaves(json.loads(original)):
        key = ".".join(map(str, leaf))
        if key.startswith(UNVERIFIED):
            continue
        report = json.loads(original)
        node = report
        for part in leaf[:-1]:
            node = node[part]
        value = node[leaf[-1]]
        node[leaf[-1]] = value * (1 + 1e-6) + 1e-6 if isinstance(value, float) else f"{value}1"
        (folder / "report/report.json").write_text(json.dumps(report))
        with pytest.raises(LipschitzError):
            verify(folder)
        tried += 1
    assert tried > 30


@pytest.mark.parametrize("column", ["label", "prediction", "margin", "radius", "index"])
def test_a_changed_sample_is_caught_even_where_the_hash_is_changed_with_it(folder: Path, column: str):
    path = folder / "report/certificates.csv"
    rows = list(csv.DictReader(path.open()))
    rows[7][column] = str(float(rows[7][column]) + 1e-6) if column in ("margin", "radius") else "3000"
    text = ",".join(rows[0]) + "\n" + "".join(",".join(row.values()) + "\n" for row in rows)
    path.write_bytes(text.encode())
    with pytest.raises(VerificationError, match=r"certificates\.csv: is not the file"):
        verify(folder)
    edited(folder, lambda report: report.update(certificates_sha256=hashlib.sha256(text.encode()).hexdigest()))
    with pytest.raises(VerificationError, match=rf"sample 7 has {column}"):
        verify(folder)


def drop_last_sample(folder: Path) -> None:
    path = folder / "report/certificates.csv"
    text = "".join(path.read_text().splitlines(keepends=True)[:-1])
    path.write_bytes(text.encode())
    edited(folder, lambda report: report.update(certificates_sha256=hashlib.sha256(text.encode()).hexdigest()))


def rewritten(folder: Path, change: Callable[[str], str]) -> None:
    path = folder / "report/report.json"
    path.write_text(change(path.read_text()))


def recertified(folder: Path, change: Callable[[str], str]) -> None:
    """A changed certificates.csv whose hash the report has, too."""
    path = folder / "report/certificates.csv"
    content = change(path.read_text()).encode()
    path.write_bytes(content)
    edited(folder, lambda report: report.update(certificates_sha256=hashlib.sha256(content).hexdigest()))


def with_more_radius(text: str) -> str:
    lines = text.splitlines(keepends=True)
    start, radius = lines[1].rstrip().rsplit(",", 1)
    lines[1] = f"{start},{float(radius) + 9e-9!r}\n"
    return "".join(lines)


def with_longer_numbers(text: str) -> str:
    lines = text.splitlines(keepends=True)
    lines[1] = lines[1].rstrip() + "0000\n"
    return "".join(lines)


def other_weights(folder: Path) -> None:
    path = folder / "report/network.pt"
    weights = torch.load(path, weights_only=True)
    weights[next(iter(weights))].mul_(1.5)
    torch.save(weights, path)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (drop_last_sample, "has 358 samples, computed again 359"),
        (other_weights, "is not the network"),
        (lambda folder: (folder / "report/network.pt").unlink(), "is missing"),
        (lambda folder: (folder / "report/network.pt").write_bytes(b"no"), "cannot be read|truncated"),
        (lambda folder: torch.save([1], folder / "report/network.pt"), "is not the network"),
        (lambda folder: (folder / "report/certificates.csv").unlink(), r"certificates\.csv: cannot be read"),
        (lambda folder: (folder / "report/report.json").unlink(), r"report\.json: cannot be read"),
        (lambda folder: (folder / "report/report.json").write_text("{"), "not a report"),
        (lambda folder: (folder / "report/report.json").write_text("[]"), "not a report"),
        (lambda folder: (folder / "report/report.json").write_bytes(b"\xff\xfe"), "not a report"),
        (lambda folder: (folder / "report/report.json").write_text("[" * 100_000), "not a report"),
        (lambda folder: edited(folder, lambda r: r.pop("network")), "not a report .*network"),
        (lambda folder: edited(folder, lambda r: r.update(mode="fast")), "mode|network|rounding|dtype"),
        (lambda folder: edited(folder, lambda r: r.update(mode="quick")), "unknown mode"),
        (lambda folder: edited(folder, lambda r: r["data"].update(split="val")), "differ|is|samples"),
        (lambda folder: edited(folder, lambda r: r["results"].update(certified_accuracy=[])), "not a report"),
        (lambda folder: edited(folder, lambda r: r["results"].update(extra=1)), "results.extra is 1"),
        (lambda folder: edited(folder, lambda r: r["results"].update(extra="absent")), "results.extra is 'absent'"),
        (lambda folder: edited(folder, lambda r: r.update(device_note="99 %")), "device_note is '99 %'"),
        (lambda folder: edited(folder, lambda r: r["data"].update(config_note=1)), "data.config_note is 1"),
        (lambda folder: edited(folder, lambda r: r["rounding"].update(logit_error=-9e-9)), "logit_error"),
        (lambda folder: edited(folder, lambda r: r["data"].update(split="${oc.env:HOME}")), "unknown mode or split"),
        (lambda folder: edited(folder, lambda r: r["checkpoint"].update(sha256="a\nb")), "not a sha256"),
        (lambda folder: edited(folder, lambda r: r["results"]["certified_accuracy"][0].update(eps="1\n")), "radii"),
        (
            lambda folder: rewritten(folder, lambda t: t.replace('"results": {', '"results": {"mean_radius": 9.0, ')),
            "the same key twice",
        ),
        (lambda folder: torch.save({1: torch.ones(1)}, folder / "report/network.pt"), "more than plain tensors"),
        (
            lambda folder: torch.save({"a": torch.zeros(1).expand(10**13)}, folder / "report/network.pt"),
            "more than plain tensors",
        ),
        (
            lambda folder: torch.save({"a": torch.eye(2).to_sparse()}, folder / "report/network.pt"),
            "more than plain tensors",
        ),
        (lambda folder: recertified(folder, lambda t: t.replace("radius", "radius,radius", 1)), "begins with"),
        (lambda folder: recertified(folder, lambda t: t.replace("\n3,", "\n٣,", 1)), "cannot be read"),
        (lambda folder: recertified(folder, lambda t: t.replace("\n3,", ",9\n3,", 1)), "sample 2 is"),
        (lambda folder: recertified(folder, lambda t: t + "359,0,0,1.0,9.0"), "begins with"),
        (lambda folder: recertified(folder, with_more_radius), "sample 0 has radius"),
        (lambda folder: recertified(folder, with_longer_numbers), "sample 0 has radius"),
        (lambda folder: edited(folder, lambda r: r["results"].pop("mean_radius")), "mean_radius is absent"),
    ],
)
def test_reports_that_are_damaged_or_do_not_belong_are_refused_in_one_line(
    folder: Path, spoil: Callable[[Path], Any], says: str
):
    spoil(folder)
    with pytest.raises(LipschitzError, match=says) as caught:
        verify(folder)
    assert "\n" not in str(caught.value)


def test_another_checkpoint_is_refused(folder: Path):
    with pytest.raises(VerificationError, match="is about a checkpoint with sha256"):
        verify(folder, ckpt="checkpoints/last.ckpt")
    with pytest.raises(ConfigError, match="the one checkpoint"):
        cli.certify(compose("certify", "ckpt=[a,b]", f"verify={folder}/report/report.json"))


# The audit ------------------------------------------------------------------------------------------------------------


def audit(folder: Path, output: Path, *overrides: str) -> dict[str, Any]:
    arguments = [f"ckpt={folder}/checkpoints/best.ckpt", f"output={output}", "audit=true", "eps=[0.1]", *overrides]
    return cli.certify(compose("certify", *arguments))


def test_an_audit_of_sound_certificates_holds_and_leaves_table_and_plot(
    certified: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    audit(certified, tmp_path, "audit_samples=8")
    found = json.loads((tmp_path / "audit.json").read_text())
    assert found["holds"]
    assert (found["samples"], found["certified"], found["certified_fallen"]) == (8, 8, 0)
    assert found["boundary_certified"] > 0
    assert 0.5 < found["margin_ratio"] <= 1
    assert found["rows"][0]["certified"] <= found["rows"][0]["apgd"]
    assert (tmp_path / "audit.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "audit_fallen.npz").exists()
    assert "nothing was refuted" in capsys.readouterr().out


def test_a_wrong_bound_is_refuted_with_the_inputs_saved_and_exit_status_2(
    certified: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    from liplayers.bounds.composition import HeadSplit

    true = HeadSplit.margin_lipschitz
    monkeypatch.setattr(HeadSplit, "margin_lipschitz", lambda self, classes: 0.3 * true(self, classes))
    arguments = [f"ckpt={certified}/checkpoints/best.ckpt", f"output={tmp_path}", "audit_samples=8", "eps=[0.1]"]
    monkeypatch.setattr("sys.argv", ["liplayers-audit", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.audit_command()
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "certified points" in line
    assert "please report it" in line
    assert not json.loads((tmp_path / "audit.json").read_text())["holds"]
    fallen = np.load(tmp_path / "audit_fallen.npz")
    distance = np.linalg.norm((fallen["input"] - fallen["adversarial"]).reshape(len(fallen["kind"]), -1), axis=1)
    assert (distance <= fallen["radius"]).all()
    assert set(fallen["kind"]) <= {"radius", "eps", "rounding"}


def test_audits_of_figures_that_are_no_proofs_and_of_no_samples_are_refused(certified: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="needs mode=proof"):
        audit(certified, tmp_path / "a", "mode=fast")
    with pytest.raises(ConfigError, match="audit_samples=0"):
        audit(certified, tmp_path / "b", "audit_samples=0")
    assert not list(tmp_path.iterdir())


# What a review found --------------------------------------------------------------------------------------------------


def test_radii_too_small_for_relative_errors_are_zero():
    """The factors of the formula pay for relative errors, which subnormal numbers do not have."""
    logits = torch.tensor([[3e-308, 0.0], [3.0, 0.0]], dtype=F64)
    constants = torch.tensor([[0.0, 2.0], [2.0, 0.0]], dtype=F64)
    radius = certified_radius(logits, constants)
    assert radius[0] == 0
    assert 1.5 * (1 - 1e-14) < radius[1] < 1.5


def test_modules_that_are_called_by_keyword_are_seen_with_their_shapes():
    """One pool on images of two sizes: of the smaller ones it takes no average."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = nn.AdaptiveAvgPool2d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(x) + self.pool(input=x[:, :, :2, :2])

    assert lp.lipschitz_bound(Twice(), (1, 16, 16)) >= 1.125


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["model"].update(width="???"),
        lambda config: config["model"].update(width="\ud800"),
        lambda config: config["model"].update({("a", 1): 1}),
        lambda config: config["model"].update(_partial_=True),
        lambda config: config["model"].pop("_target_"),
        lambda config: config["data"].update(_partial_=True),
    ],
    ids=range(6),
)
def test_a_hostile_config_in_a_checkpoint_is_one_line(folder: Path, change: Callable[[dict], Any]):
    path = folder / "checkpoints/best.ckpt"
    content = torch.load(path, weights_only=True)
    change(content["liplayers"]["config"])
    torch.save(content, path)
    with pytest.raises(LipschitzError) as caught:
        cli.certify(compose("certify", f"ckpt={path}", f"output={folder}/new"))
    assert "\n" not in str(caught.value)
    assert not (folder / "new").exists()


@pytest.mark.parametrize("change", [lambda t: t.to(torch.complex64), lambda t: None, lambda t: "weights"])
def test_hostile_weights_in_a_checkpoint_are_one_line(folder: Path, change: Callable[[Tensor], Any]):
    path = folder / "checkpoints/best.ckpt"
    content = torch.load(path, weights_only=True)
    name = next(name for name in content["state_dict"] if name.startswith("model."))
    content["state_dict"][name] = change(content["state_dict"][name])
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="is not a tensor, or not real or complex"):
        cli.certify(compose("certify", f"ckpt={path}", f"output={folder}/new"))
