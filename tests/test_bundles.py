"""Bundles: what is loaded is what was certified, whatever was tampered with is refused, and nothing in one is run."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import sys
import types
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from sklearn.datasets import load_digits

import liplayers as lp
from benchmarks import leaderboard
from liplayers import cli
from liplayers.audit.audit import Audit, RobustAccuracy
from liplayers.bundles import Bundle, building, manifest, places
from liplayers.bundles.building import build_network, check_network
from liplayers.bundles.card import card_text
from liplayers.bundles.manifest import CARD, CERTIFICATES, CONFIG, FILES, MANIFEST, REPORT, WEIGHTS
from liplayers.certification import CertifiedNetwork, parse_radius
from liplayers.certification.network import state_sha256
from liplayers.checkpoint import load_checkpoint
from liplayers.cli import bundle as command
from liplayers.cli import verify as verifying
from liplayers.cli.composing import certify_config
from liplayers.cli.configuration import build
from liplayers.commands import bundle_command
from liplayers.commands.help import config_folder
from liplayers.errors import (
    BundleError,
    CheckpointError,
    DataNotFoundError,
    LipschitzError,
    MissingPackageError,
    OutputError,
    VerificationError,
)
from liplayers.layers.manifold import OrthogonalParameter

safetensors = pytest.importorskip("safetensors.torch", reason="the extra liplayers[bundles] is not installed")

CONFIGS = config_folder()
SHIPPED = places.shipped()
ABOUT = {"command": "python train.py data=npz", "data": "Digits, in two files."}
MODELS = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))


def compose(name: str, *overrides: str) -> Any:
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose(name, list(overrides))


def verify(folder: str | Path, *overrides: str) -> int:
    arguments = [f"bundle={folder}", "verify=true", *overrides]
    return cli.certify(compose(certify_config(arguments)[0], *arguments))["verified"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run on digits in files of its own, certified; in `data` the data."""
    folder = tmp_path_factory.mktemp("secret-place")
    digits = load_digits()
    images = (digits.images[:, None] / 16).astype(np.float32)
    (folder / "data").mkdir()
    for name, rows in (("train", slice(0, 600)), ("test", slice(600, 700))):
        np.savez(folder / "data" / f"{name}.npz", images=images[rows], labels=digits.target[rows])
    of_data = [f"data.{name}={folder}/data/{name}.npz" for name in ("train", "test")]
    small = [
        "model.linear=manifold",
        "model.width=16",
        "model.depth=2",
        "trainer.max_epochs=2",
        "optimizer=manifold_muon",
    ]
    quiet = ["trainer.enable_progress_bar=false", "trainer.accelerator=cpu"]
    cli.train(compose("train", "data=npz", *of_data, *small, *quiet, f"output={folder}/run"))
    cli.certify(compose("certify", f"ckpt={folder}/run/checkpoints/best.ckpt"))
    return folder


@pytest.fixture(scope="module")
def saved(run: Path) -> Path:
    lp.save_bundle(run / "run", run / "small-net", machine="a processor", notes="none", **ABOUT)
    return run / "small-net"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a bundle that comes with liplayers."""
    return Path(shutil.copytree(SHIPPED["digits-mlp"], tmp_path / "copy"))


# --- what is loaded is what was certified ---------------------------------------------------------------------------


def test_a_bundle_loads_elsewhere_with_the_same_outputs_and_radii(
    run: Path, saved: Path, tmp_path: Path, monkeypatch: Any
):
    elsewhere = Path(shutil.copytree(saved, tmp_path / "elsewhere"))
    monkeypatch.chdir(tmp_path)
    checkpoint = load_checkpoint(run / "run/checkpoints/best.ckpt")
    trained = build(OmegaConf.create(checkpoint.config["model"]), input_shape=(1, 8, 8), num_classes=10)
    checkpoint.load_into(trained)
    x = torch.from_numpy(np.load(run / "data/test.npz")["images"])

    network = lp.load_pretrained("elsewhere")
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert torch.equal(network(x), lp.freeze(trained, (1, 8, 8))(x))
    proven = CertifiedNetwork(network, (1, 8, 8), 10)
    assert proven.sha256() == CertifiedNetwork(trained, (1, 8, 8), 10).sha256()
    rows = list(csv.DictReader(io.StringIO((elsewhere / CERTIFICATES).read_text())))
    assert proven.radius(x).tolist() == [float(row["radius"]) for row in rows]

    raw = lp.load_pretrained(elsewhere, frozen=False)
    assert raw.training
    assert {name: t.tolist() for name, t in raw.state_dict().items()} == {
        name: t.tolist() for name, t in trained.state_dict().items()
    }
    assert any(isinstance(parameter, OrthogonalParameter) for parameter in raw.parameters())
    raw(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in raw.parameters())


def test_a_bundle_is_made_by_one_command_and_names_no_place_of_its_maker(run: Path, tmp_path: Path, capsys: Any):
    arguments = [str(run / "run"), str(tmp_path / "net"), "--command", ABOUT["command"], "--data", ABOUT["data"]]
    assert command.main(arguments) == 0
    assert f"bundle={tmp_path}/net verify=true" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "net").iterdir()) == sorted(FILES)
    everything = b"".join(path.read_bytes() for path in (tmp_path / "net").iterdir())
    assert b"secret-place" not in everything
    assert os.uname().release.encode() not in everything
    for name in ("train", "test"):
        shutil.copy(run / f"data/{name}.npz", tmp_path / f"my-{name}.npz")  # what they are called makes no difference
    assert verify(tmp_path / "net", f"data.train={tmp_path}/my-train.npz", f"data.test={tmp_path}/my-test.npz") == 100
    swapped = [f"data.train={tmp_path}/my-test.npz", f"data.test={tmp_path}/my-train.npz"]
    with pytest.raises(VerificationError, match=r"report\.json: data\.sha256"):
        verify(tmp_path / "net", *swapped)
    assert command.main(arguments) == 2
    assert "holds a bundle" in capsys.readouterr().err


def test_weights_that_are_their_raw_ones_are_stored_once(saved: Path):
    bundle = lp.load_bundle(saved)
    stored = safetensors.load_file(saved / WEIGHTS)
    assert not [name for name in stored if name.startswith("frozen.body")]
    assert {f"frozen.{name}" for name in bundle.frozen} == {n for n in stored if n.startswith("frozen.")} | {
        f"frozen.{name}" for name in bundle.config["same"]
    }


def test_the_card_says_what_it_must(saved: Path):
    card, report = (saved / CARD).read_text("utf-8"), json.loads((saved / REPORT).read_text("utf-8"))
    said = ["python train.py data=npz", "Digits, in two files.", "a processor", "Seed: 0", report["statement"]]
    said += [report["data"]["sha256"], f"{100 * report['results']['clean_accuracy']:.2f}", "verify=true"]
    assert not [text for text in said if text not in card]


@pytest.mark.parametrize("name", SHIPPED)
def test_what_ships_is_small_and_whole(name: str):
    bundle = lp.load_bundle(name)
    assert bundle.name == name
    assert sum(map(len, bundle.files.values())) <= 20e6
    assert {t.dtype for t in bundle.frozen.values()} == {torch.float32}
    assert (bundle.report["mode"], bundle.report["data"]["split"]) == ("proof", "test")


def test_the_shipped_digits_verify_and_can_be_certified_and_audited(tmp_path: Path, capsys: Any):
    assert verify("digits-mlp") == 359
    output = [f"output={tmp_path}", "bundle=digits-mlp"]
    (results,) = cli.certify(compose("certify", *output)).values()
    assert results == lp.load_bundle("digits-mlp").report["results"] | {
        key: pytest.approx(results[key], abs=1e-8) for key in ("mean_radius",)
    }
    assert cli.certify(compose("certify", "bundle=digits-mlp", f"verify={tmp_path}/report.json"))["verified"] == 359
    with pytest.raises(LipschitzError, match="give one of them"):
        cli.certify(compose("certify", *output, "ckpt=a"))


def test_the_digits_are_in_the_wheel():
    project = (CONFIGS.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert '"bundles/digits-mlp" = "liplayers/pretrained/digits-mlp"' in project


def test_without_the_data_all_but_the_radii_is_verified_and_that_is_said(
    saved: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataNotFoundError, match=r"train\.npz"):
        verify(saved)
    assert "100 radii are NOT verified" in " ".join(capsys.readouterr().out.split())
    copy = Path(shutil.copytree(saved, tmp_path / "copy"))
    edit_report(copy, lambda report: report["results"].update(clean_accuracy=0.99))
    with pytest.raises(VerificationError, match=r"report\.json: results\.clean_accuracy"):
        verify(copy)


@pytest.mark.parametrize("model", MODELS)
def test_settings_build_the_network_that_training_builds(model: str):
    cfg = compose("train", f"model={model}")
    cfg.model.update({key: 8 for key in ("width", "channels") if key in cfg.model})
    settings = OmegaConf.to_container(cfg.model, resolve=True)
    torch.manual_seed(0)
    trained = build(cfg.model, input_shape=(3, 16, 16), num_classes=4)
    torch.manual_seed(0)
    check_network("config.json", settings, (3, 16, 16), 4, trained.state_dict())
    built = build_network("config.json", settings, (3, 16, 16), 4)
    assert repr(built) == repr(trained)
    state = trained.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in built.state_dict().items())


# --- whatever was tampered with is refused --------------------------------------------------------------------------


def rehash(folder: Path) -> None:
    """As someone would who can compute hashes: the manifest, and every hash and text that repeats another file."""
    report, config = (json.loads((folder / name).read_text("utf-8")) for name in (REPORT, CONFIG))
    report["checkpoint"]["sha256"] = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    report["certificates_sha256"] = hashlib.sha256((folder / CERTIFICATES).read_bytes()).hexdigest()
    with suppress(Exception):  # no safetensors any more
        tensors = safetensors.load_file(folder / WEIGHTS)
        frozen = {n.removeprefix("frozen."): t for n, t in tensors.items() if n.startswith("frozen.")}
        frozen |= {name: tensors[f"raw.{raw}"] for name, raw in config["same"].items()}
        report["network"]["sha256"] = state_sha256(frozen)
    (folder / REPORT).write_text(json.dumps(report), "utf-8")
    seal(folder)


def seal(folder: Path) -> None:
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES if name != MANIFEST}
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "sha256": hashes}))


def edit_report(folder: Path, change: Callable[[dict], Any]) -> None:
    report = json.loads((folder / REPORT).read_text("utf-8"))
    change(report)
    (folder / REPORT).write_text(json.dumps(report), "utf-8")
    config = json.loads((folder / CONFIG).read_text("utf-8"))
    with suppress(KeyError, TypeError, ValueError):
        (folder / CARD).write_bytes(card_text(config, report).encode())
    seal(folder)


def edit_config(folder: Path, change: Callable[[dict], Any], also_report: bool = True) -> None:
    """In config.json and, as far as it repeats it, in the report and on the card."""
    config = json.loads((folder / CONFIG).read_text("utf-8"))
    change(config)
    (folder / CONFIG).write_text(json.dumps(config), "utf-8")
    if also_report:
        about = {"config": config["config"], "epoch": config["epoch"], "liplayers": config["liplayers"]}
        edit_report(folder, lambda report: report["checkpoint"].update(about))
    seal(folder)


def edit_weights(folder: Path, change: Callable[[dict], Any]) -> None:
    tensors = safetensors.load_file(folder / WEIGHTS)
    change(tensors)
    safetensors.save_file(tensors, folder / WEIGHTS)
    rehash(folder)
    edit_report(folder, lambda report: None)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "a byte": lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "longer": lambda content: content + b"\n",
    "another": lambda content: b"\x80\x04.",
}


@pytest.mark.parametrize("name", FILES)
def test_every_file_that_is_changed_or_missing_is_named(folder: Path, name: str):
    path = folder / name
    content = path.read_bytes()
    for change in DAMAGE.values():
        if name == MANIFEST and change(content) == content + b"\n":
            continue  # the same manifest
        path.write_bytes(change(content))
        with pytest.raises(BundleError, match=r".+") as caught:
            lp.load_bundle(folder)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    path.unlink()
    for make in (lambda: None, lambda: path.mkdir()):
        make()
        with pytest.raises(BundleError, match=rf"copy/{name}: is missing or no file"):
            lp.load_bundle(folder)


def test_a_file_more_is_named_and_what_git_leaves_is_not(folder: Path):
    (folder / ".git").mkdir()
    (folder / ".gitattributes").touch()
    lp.load_bundle(folder)
    for name in ("model.pkl", ".hidden", "config.json~"):
        (folder / name).touch()
        with pytest.raises(BundleError, match=rf"copy/{name}: is no part of a bundle"):
            lp.load_bundle(folder)
        (folder / name).unlink()


def test_a_file_that_is_too_large_is_not_read(folder: Path, monkeypatch: Any):
    with (folder / CARD).open("r+b") as file:
        file.truncate(2**40)  # takes no room on the disk
    with pytest.raises(BundleError, match=r"README\.md: has more than 1,048,576 bytes"):
        lp.load_bundle(folder)


def _frozen_only(tensors: dict) -> None:
    tensors["frozen.body.2.weight"][3, 4] += 1e-3


def _frozen_within_rounding(tensors: dict) -> None:
    tensors["frozen.body.2.weight"] *= 1 + 3e-6


def _raw_and_frozen(tensors: dict) -> None:
    tensors["raw.body.0.bias"] += 0.05  # which is stored once


def _raw_only(tensors: dict) -> None:
    tensors["raw.body.2.raw"] *= 1 + torch.linspace(0, 0.1, tensors["raw.body.2.raw"].shape[-1])


WEIGHT_LIES = {
    _frozen_only: r"model\.safetensors: frozen\.body\.2\.weight: differs by",
    _frozen_within_rounding: r"report\.json: lipschitz",
    _raw_and_frozen: r"report\.json: |certificates\.csv: sample 0",
    _raw_only: r"model\.safetensors: frozen\.body\.2\.weight: differs by",
}


@pytest.mark.parametrize("lie", WEIGHT_LIES)
def test_weights_that_were_not_certified_are_caught_though_every_hash_is_right(folder: Path, lie: Callable):
    names = safetensors.load_file(folder / WEIGHTS)
    assert "raw.body.2.raw" in names, sorted(names)
    edit_weights(folder, lie)
    lp.load_bundle(folder)
    with pytest.raises(LipschitzError, match=WEIGHT_LIES[lie]):
        verify(folder)


def radius_of(factor: float, row: int = 5) -> Callable[[str], str]:
    def change(text: str) -> str:
        lines = text.split("\n")
        head, _, last = lines[row].rpartition(",")
        lines[row] = f"{head},{float(last) * factor!r}"
        return "\n".join(lines)

    return change


CERTIFICATE_LIES: dict[str, Callable[[str], str]] = {
    "larger": radius_of(1.0001),
    "smaller": radius_of(0.999),
    "a sample less": lambda text: "\n".join(text.split("\n")[:-2]) + "\n",
    "no number": lambda text: text.replace("\n3,", "\nx,", 1),
    "label": lambda text: text.replace("\n7,", "\n7,1", 1),
}


@pytest.mark.parametrize("kind", CERTIFICATE_LIES)
def test_certificates_that_do_not_hold_are_caught_though_every_hash_is_right(folder: Path, kind: str, once: None):
    path = folder / CERTIFICATES
    path.write_text(CERTIFICATE_LIES[kind](path.read_text()))
    rehash(folder)
    edit_report(folder, lambda report: None)
    with pytest.raises(VerificationError, match=r"certificates\.csv: "):
        verify(folder)


@pytest.fixture(scope="module")
def fresh() -> list:
    return []


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch, fresh: list) -> None:
    """The digits are certified once for all tests that leave config and weights as they are."""
    real = verifying.certify_one

    def certify_one(*arguments: Any) -> Any:
        if not fresh:
            fresh.append(real(*arguments))
        return fresh[0]

    monkeypatch.setattr(verifying, "certify_one", certify_one)


def leaves(node: Any, path: tuple = ()) -> list[tuple]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
    return [path] if items is None else [leaf for key, value in items for leaf in leaves(value, (*path, key))]


UNVERIFIED = ("environment", "device", "data.config", "checkpoint.path")


def test_every_change_of_the_report_is_caught_though_every_hash_is_right(folder: Path, once: None):
    original = json.loads((folder / REPORT).read_text("utf-8"))
    tried = 0
    for leaf in leaves(original)[::9]:  # the report's own tests change each
        if ".".join(map(str, leaf)).startswith(UNVERIFIED):
            continue

        def change(report: dict, leaf: tuple = leaf) -> None:
            *path, last = leaf
            for key in path:
                report = report[key]
            value = report[last]
            report[last] = value + 1 if type(value) in (int, float) else f"{value}1"

        edit_report(folder, change)
        with pytest.raises(VerificationError, match=r"report\.json|certificates\.csv|model\.safetensors|README\.md"):
            verify(folder)
        (folder / REPORT).write_text(json.dumps(original), "utf-8")
        tried += 1
    assert tried > 5


def test_a_card_that_says_something_else_is_caught_though_every_hash_is_right(folder: Path, once: None):
    card = (folder / CARD).read_text("utf-8")
    for old, new in (("| 9", "| 99"), ("needs no trust", "needs trust"), ("\n## Use", "\nCertified at 10.\n\n## Use")):
        assert old in card
        (folder / CARD).write_text(card.replace(old, new, 1), "utf-8")
        seal(folder)
        with pytest.raises(VerificationError, match=r"README\.md: says something else"):
            verify(folder)


CONFIG_LIES: dict[str, tuple[Callable[[dict], Any], str]] = {
    "activation": (lambda c: c["config"]["model"].update(activation="relu"), r"report\.json: "),
    "width": (lambda c: c["config"]["model"].update(width=64), r"config\.json: the raw weight"),
    "family": (lambda c: c["config"]["model"].update(linear="bro"), r"config\.json: the raw weight|model\.safetensors"),
    "shape": (lambda c: c.update(input_shape=[1, 4, 16]), "shape"),
    "classes": (lambda c: c["class_names"].reverse(), "classes"),
    "fewer classes": (lambda c: c["class_names"].pop(), r"config\.json: the raw weight"),
    "training data": (lambda c: c["config"]["data"].update(_target_="liplayers.data.MNIST", root="data"), "mnist"),
}


@pytest.mark.parametrize("kind", CONFIG_LIES)
def test_another_config_is_caught_though_every_hash_is_right(folder: Path, kind: str):
    change, says = CONFIG_LIES[kind]
    edit_config(folder, change)
    with pytest.raises(LipschitzError, match=says) as caught:
        verify(folder)
    assert "\n" not in str(caught.value)


def test_a_recipe_that_only_the_config_claims_is_caught(folder: Path):
    edit_config(folder, lambda c: c["config"]["optimizer"].update(lr=1.0), also_report=False)
    with pytest.raises(VerificationError, match=r"report\.json: checkpoint\.config\.optimizer\.lr is 0\.005, .* 1\.0"):
        verify(folder)


# --- nothing in one is run ------------------------------------------------------------------------------------------

LAYER = {"_target_": "liplayers.layers.BROLinear", "_partial_": True}
MALICIOUS: dict[str, tuple[Callable[[dict], Any], str]] = {
    "system": (lambda m: m.update(_target_="os.system", command="touch gone"), "no part of liplayers"),
    "eval": (lambda m: m.update(_target_="builtins.eval"), "no part of liplayers"),
    "no name": (lambda m: m.update(_target_=["os.system"]), "no part of liplayers"),
    "no target": (lambda m: m.pop("_target_"), "expected a public model"),
    "ours, no model": (
        lambda m: m.update(_target_="liplayers.files.save_tensors", path="gone"),
        "expected a public model",
    ),
    "a part": (lambda m: m.update(_target_="liplayers.models.parts.sequence"), "expected a public model"),
    "what a model imports": (lambda m: m.update(_target_="liplayers.models.nn"), "expected a public model"),
    "an attribute": (lambda m: m.update(_target_="liplayers.models.mlp.__globals__"), "expected a public model"),
    "torch's layer": (lambda m: m.update(linear=LAYER | {"_target_": "torch.nn.Linear"}), "no part of liplayers"),
    "an optimizer": (lambda m: m.update(linear=LAYER | {"_target_": "torch.optim.Adam"}), "expected a public layer"),
    "a model as layer": (lambda m: m.update(linear=LAYER | {"_target_": "liplayers.models.mlp"}), "public layer"),
    "a base": (lambda m: m.update(linear=LAYER | {"_target_": "liplayers.layers.bases"}), "public layer"),
    "called at once": (lambda m: m.update(linear=LAYER | {"_partial_": False}), "no _partial_: true"),
    "no layer": (lambda m: m.update(linear={"path": "gone"}), "public layer"),
    "arguments": (lambda m: m.update(_args_=[1]), "names of settings"),
    "conversion": (lambda m: m.update(_convert_="all"), "names of settings"),
    "interpolation": (lambda m: m.update(activation="${oc.env:HOME}"), "expected plain numbers and text"),
    "missing": (lambda m: m.update(activation="???"), "expected plain numbers and text"),
    "unknown setting": (lambda m: m.update(nothing=1), "build no network"),
    "unknown layer": (lambda m: m.update(linear="nothing"), "build no network .unknown"),
    "text for a number": (lambda m: m.update(width="wide"), "build no network"),
    "huge width": (lambda m: m.update(width=10**12), "width=1000000000000"),
    "wide": (lambda m: m.update(width=2**20), "build no network .a weight of 1,099,511,627,776 entries"),
    "deep": (lambda m: m.update(depth=2**20, width=2), "more than 1,000 operations"),
    "infinite": (lambda m: m.update(mean=float("1e999")), "not the JSON|plain numbers"),
    "nested": (lambda m: m.update(mean=json.loads("[" * 40 + "]" * 40)), "nested deeper"),
}


@pytest.mark.parametrize("kind", MALICIOUS)
@pytest.mark.parametrize("use", [lp.load_pretrained, verify], ids=["load", "verify"])
def test_a_config_builds_models_of_liplayers_and_calls_nothing_else(
    folder: Path, kind: str, use: Callable, tmp_path: Path, monkeypatch: Any
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(building, "MOST_OPERATIONS", 1000)
    change, says = MALICIOUS[kind]
    edit_config(folder, lambda config: change(config["config"]["model"]))
    with pytest.raises(LipschitzError, match=rf"config\.json: .*({says})") as caught:
        use(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("part", ["loss", "optimizer", "data", "trainer"])
def test_other_parts_of_a_config_may_name_no_other_packages(folder: Path, part: str):
    edit_config(folder, lambda config: config["config"][part].update(_target_="subprocess.run", args=["touch", "gone"]))
    with pytest.raises(BundleError, match=rf"config\.json: {part} calls 'subprocess\.run'"):
        lp.load_bundle(folder)


ENTRIES: dict[str, Callable[[dict], Any]] = {
    "name, a path": lambda c: c.update(name="../../etc/cron.d/x"),
    "name, absolute": lambda c: c.update(name="/tmp/x"),
    "name, hidden": lambda c: c.update(name=".ssh"),
    "name, two lines": lambda c: c.update(name="a\nb"),
    "name, number": lambda c: c.update(name=5),
    "input_shape, empty": lambda c: c.update(input_shape=[]),
    "input_shape, negative": lambda c: c.update(input_shape=[1, -8, -8]),
    "input_shape, a truth": lambda c: c.update(input_shape=[True, 8, 8]),
    "epoch": lambda c: c.update(epoch=-1),
    "liplayers, no version": lambda c: c.update(liplayers="${x}"),
    "class_names": lambda c: c.update(class_names=[1, 2]),
    "same": lambda c: c.update(same=[]),
    "about": lambda c: c["about"].pop("command"),
    "config, no model": lambda c: c["config"].pop("model"),
    "more": lambda c: c.update(code="import os"),
    "less": lambda c: c.pop("epoch"),
}


@pytest.mark.parametrize("kind", ENTRIES)
def test_every_entry_of_a_config_is_what_it_must_be(folder: Path, kind: str):
    edit_config(folder, ENTRIES[kind], also_report=False)
    with pytest.raises(BundleError, match=r"config\.json: (has the entries|\w+ is )") as caught:
        lp.load_bundle(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("root", ["/etc", "..", "a/../../b", "../x", ""])
def test_settings_lead_to_no_place_on_the_machine(folder: Path, root: str):
    edit_config(folder, lambda config: config["config"]["data"].update(root=root), also_report=False)
    with pytest.raises(BundleError, match=r"config\.json: its settings name places on a machine"):
        lp.load_bundle(folder)


def test_huge_inputs_and_numbers_of_classes_are_refused(folder: Path):
    for change in ({"input_shape": [10**5, 10**5]}, {"class_names": ["a"] * 10**5}):
        edit_config(folder, lambda config, change=change: config.update(change), also_report=False)
        with pytest.raises(BundleError, match=r"config\.json: .*(inputs of shape|expected at most)"):
            lp.load_pretrained(folder)


class Pickled:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("gone",)


def test_pickles_are_not_read(folder: Path, tmp_path: Path, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    torch.save({"raw.a": Pickled()}, folder / WEIGHTS)
    seal(folder)
    with pytest.raises(BundleError, match=r"model\.safetensors: is not a file of safetensors"):
        lp.load_bundle(folder)
    assert not (tmp_path / "gone").exists()


WEIGHTS_OF_ANOTHER_KIND: dict[str, tuple[Callable[[dict], Any], str]] = {
    "nan": (lambda t: t["raw.body.0.bias"].fill_(torch.nan), r"raw\.body\.0\.bias has an entry that is NaN"),
    "inf": (lambda t: t["frozen.body.0.weight"][0, 0].fill_(torch.inf), "NaN or infinite"),
    "other names": (lambda t: t.update(weight=torch.ones(2)), "names that begin with raw. or frozen."),
    "one more": (
        lambda t: t.update({"raw.more": torch.ones(2)}),
        "more is float32 .2,., the model has absent",
    ),
    "one less": (lambda t: t.pop("raw.body.2.raw"), "the raw weight body.2.raw is absent"),
    "a frozen one less": (lambda t: t.pop("frozen.body.2.weight"), "frozen.body.2.weight: is not in both"),
    "shape": (lambda t: t.update({"raw.body.0.bias": torch.ones(5)}), "the raw weight body.0.bias is"),
    "dtype": (lambda t: t.update({"raw.body.2.raw": t["raw.body.2.raw"].double()}), "float64 .128, 128., the model"),
    "frozen dtype": (lambda t: t.update({"frozen.body.2.weight": t["frozen.body.2.weight"].double()}), "float64"),
    "stored twice": (lambda t: t.update({"frozen.body.0.bias": t["raw.body.0.bias"].clone()}), "as config.json says"),
}


@pytest.mark.parametrize("kind", WEIGHTS_OF_ANOTHER_KIND)
def test_weights_are_finite_and_those_of_the_model(folder: Path, kind: str):
    change, says = WEIGHTS_OF_ANOTHER_KIND[kind]
    edit_weights(folder, change)
    with pytest.raises(BundleError, match=says):
        lp.load_pretrained(folder)


def test_a_header_that_claims_more_than_the_file_has_is_refused(folder: Path):
    content = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["raw.body.0.bias"]["shape"] = [2**40]
    text = json.dumps(header).encode()
    for changed in (
        (2**62).to_bytes(8, "little") + content[8:],
        len(text).to_bytes(8, "little") + text + content[8 + size :],
    ):
        (folder / WEIGHTS).write_bytes(changed)
        seal(folder)
        with pytest.raises(BundleError, match=r"model\.safetensors: is not a file of safetensors"):
            lp.load_bundle(folder)


# --- formats and places ---------------------------------------------------------------------------------------------


FORMATS = {
    2: "is of format 2, this liplayers reads 1; install a newer one",
    0: "states format 0",
    "1": "states format '1'",
}
FORMATS |= {None: "states format None", 1.5: "states format 1.5"}


@pytest.mark.parametrize(("version", "says"), FORMATS.items())
def test_other_formats_are_named_before_anything_else_is_read(folder: Path, version: Any, says: str):
    (folder / MANIFEST).write_text(json.dumps({"format": version, "blobs": []}))
    (folder / "weights.new").touch()
    (folder / CONFIG).unlink()
    with pytest.raises(BundleError, match=rf"manifest\.json: {says}"):
        lp.load_bundle(folder)


def test_weights_of_an_older_version_that_meant_something_else_are_refused(folder: Path, monkeypatch: Any):
    monkeypatch.setattr(lp.CayleyLinear, "weights_since", "9.0.0")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: written by liplayers 0\.2\.0"):
        lp.load_pretrained(folder)


def test_an_unknown_name_is_answered_by_the_known_ones(tmp_path: Path, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BundleError, match=r"bundle mnist: neither a folder nor one that is here .*digits-mlp"):
        lp.load_pretrained("mnist")
    for where in ("a\0b", b"bytes", "ftp://a/b", "http://a/b", "file:///etc", "hf://a", "hf://a/b/c", "https://a/b?c"):
        with pytest.raises(BundleError):
            lp.load_bundle(where)
    (tmp_path / "digits-mlp").mkdir()
    assert lp.load_bundle("digits-mlp").name == "digits-mlp"
    with pytest.raises(BundleError, match=r"manifest\.json: is missing"):
        lp.load_bundle("./digits-mlp")


@pytest.mark.parametrize("where", ["https://example.org/a/net", "hf://owner/net@v1.0", "digits-mlp", "./net"])
def test_places_need_no_quotes_on_the_command_line(where: str):
    assert OverridesParser.create().parse_override(f"bundle={where}").value() == where


class Web:
    """In place of the opener: answers from a folder, and notes what was asked for."""

    def __init__(self, folder: Path, *handlers: Any) -> None:
        self.folder, self.asked, self.handlers = folder, [], handlers

    def open(self, address: str, timeout: float) -> io.BytesIO:
        self.asked.append(address)
        assert timeout > 0
        path = self.folder / address.rpartition("/")[2]
        if not path.exists():
            raise OSError("HTTP Error 404: Not Found")
        return io.BytesIO(path.read_bytes())


def test_an_address_gives_the_six_files_and_nothing_else(folder: Path, monkeypatch: Any):
    web = Web(folder)
    monkeypatch.setattr(places, "build_opener", lambda *handlers: web)
    assert lp.load_bundle("https://example.org/net/").name == "digits-mlp"
    assert web.asked == [f"https://example.org/net/{name}" for name in FILES]
    assert verify("https://example.org/net") == 359
    monkeypatch.setitem(manifest.FILES, REPORT, 100)
    with pytest.raises(BundleError, match=r"net/report\.json: has more than 100 bytes"):
        lp.load_bundle("https://example.org/net")
    (folder / CONFIG).unlink()
    with pytest.raises(BundleError, match=r"https://example\.org/net/config\.json: cannot be fetched .*404"):
        lp.load_bundle("https://example.org/net")


def test_an_address_leads_to_https_only():
    handler = places._StaysSecure()
    request = places.Request("https://example.org/a")
    assert (
        handler.redirect_request(request, None, 302, "", {}, "https://example.org/b").full_url
        == "https://example.org/b"
    )
    for address in ("http://example.org/b", "file:///etc/passwd", "ftp://example.org/b"):
        with pytest.raises(BundleError, match="is no https address"):
            handler.redirect_request(request, None, 302, "", {}, address)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> types.SimpleNamespace:
    """huggingface_hub with one repository, in a folder; what it was asked for is noted."""
    fake = types.SimpleNamespace(folder=tmp_path / "hub", asked=[], sizes={}, refuses=None)
    fake.folder.mkdir()

    class HfApi:
        def __init__(self, token: Any = None) -> None:
            fake.asked.append(("token", token))

        def model_info(self, repo_id: str, *, revision: Any, files_metadata: bool) -> Any:
            if fake.refuses:
                raise fake.refuses
            fake.asked.append(("info", repo_id, revision))
            files = [
                types.SimpleNamespace(rfilename=p.name, size=fake.sizes.get(p.name, p.stat().st_size))
                for p in fake.folder.iterdir()
            ]
            return types.SimpleNamespace(sha="c0ffee", siblings=files)

        def create_repo(self, repo_id: str, *, private: Any, exist_ok: bool) -> None:
            fake.asked.append(("create", repo_id, private, exist_ok))

        def upload_folder(self, *, repo_id: str, folder_path: Path, revision: Any, commit_message: str) -> Any:
            if fake.refuses:
                raise fake.refuses
            shutil.copytree(folder_path, fake.folder, dirs_exist_ok=True)
            fake.asked.append(("upload", repo_id, revision, commit_message))
            return types.SimpleNamespace(commit_url="https://huggingface.co/owner/net/commit/c0ffee")

    def snapshot_download(repo_id: str, *, revision: str, allow_patterns: list[str]) -> str:
        fake.asked.append(("download", repo_id, revision))
        copy = Path(shutil.copytree(fake.folder, tmp_path / "snapshot", dirs_exist_ok=True))
        for path in copy.iterdir():
            if path.name not in allow_patterns:
                path.unlink()
        return str(copy)

    module = types.ModuleType("huggingface_hub")
    module.HfApi, module.snapshot_download = HfApi, snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return fake


def test_a_bundle_goes_to_the_hub_and_comes_back(hub: Any):
    bundle = lp.load_bundle("digits-mlp")
    assert bundle.push_to_hub("owner/net", private=True, token="t").endswith("c0ffee")
    assert ("create", "owner/net", True, True) in hub.asked
    assert ("upload", "owner/net", None, "Upload digits-mlp") in hub.asked
    (hub.folder / ".gitattributes").touch()
    (hub.folder / "pytorch_model.bin").touch()  # what the bundle does not have is not fetched
    back = Bundle.from_pretrained("owner/net", revision="v1")
    assert back.files == bundle.files
    assert hub.asked[-2:] == [("info", "owner/net", "v1"), ("download", "owner/net", "c0ffee")]
    assert verify("hf://owner/net") == 359


def test_what_the_hub_refuses_or_has_too_much_of_is_one_line(hub: Any):
    bundle = lp.load_bundle("digits-mlp")
    bundle.push_to_hub("owner/net")
    hub.sizes = {WEIGHTS: 2**40}
    with pytest.raises(BundleError, match=r"hf://owner/net/model\.safetensors: has 1,099,511,627,776 bytes"):
        lp.load_bundle("hf://owner/net")
    assert hub.asked[-1][0] == "info"
    hub.sizes = {}
    (hub.folder / CARD).unlink()
    with pytest.raises(BundleError, match=r"README\.md: is missing"):
        lp.load_bundle("hf://owner/net")
    hub.refuses = RuntimeError("404 Client Error.\n\nRepository Not Found")
    for use in (lambda: lp.load_bundle("hf://owner/net"), lambda: bundle.push_to_hub("owner/net")):
        with pytest.raises(BundleError, match=r"hf://owner/net: cannot be .* \(404 Client Error"):
            use()
    with pytest.raises(BundleError, match="is not OWNER/NAME on the hub"):
        Bundle.from_pretrained("digits-mlp", revision="v1")


@pytest.mark.parametrize(("package", "where"), [("huggingface_hub", "hf://owner/net"), ("safetensors", "digits-mlp")])
def test_a_missing_package_is_named_with_what_to_install(package: str, where: str, monkeypatch: Any):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=rf"{package} is not installed: pip install 'liplayers\[bundles\]'"):
        lp.load_bundle(where)


# --- saving ---------------------------------------------------------------------------------------------------------


def test_what_is_there_is_kept_or_replaced_as_a_whole(folder: Path, tmp_path: Path, monkeypatch: Any):
    bundle = lp.load_bundle("digits-mlp")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="holds something else than a bundle"):
            bundle.save_pretrained(tmp_path / "mine", overwrite=overwrite)
    with pytest.raises(OutputError, match="holds a bundle"):
        bundle.save_pretrained(folder)
    (folder / CARD).write_text("changed")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OutputError, match="No space left on device"):
            bundle.save_pretrained(folder, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    bundle.save_pretrained(folder, overwrite=True)
    assert lp.load_bundle(folder).files == bundle.files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "mine"]


def test_a_bundle_is_not_made_of_what_is_no_proof_or_of_another_run(run: Path, tmp_path: Path, monkeypatch: Any):
    best = run / "run/checkpoints/best.ckpt"

    def save(report: Path | None = None, ckpt: Path = best, **changes: Any) -> None:
        lp.save_bundle(ckpt, tmp_path / "net", report=report, **{**ABOUT, **changes})

    torch.save(torch.load(best, weights_only=True) | {"epoch": 7}, tmp_path / "other.ckpt")
    certified = run / "run/certify-best-test"
    with pytest.raises(VerificationError, match=r"nowhere.report\.json: cannot be read"):
        save(tmp_path / "nowhere")
    with pytest.raises(VerificationError, match=r"report\.json: is about another checkpoint"):
        save(certified, tmp_path / "other.ckpt")
    copy = Path(shutil.copytree(certified, tmp_path / "report"))
    (copy / CERTIFICATES).write_text("index\n")
    with pytest.raises(VerificationError, match=r"certificates\.csv: is not the file"):
        save(copy)
    (copy / "network.pt").unlink()
    shutil.copy(certified / CERTIFICATES, copy)
    with pytest.raises(VerificationError, match=r"network\.pt: is missing"):
        save(copy)
    with pytest.raises(BundleError, match=r"config\.json: name is '\.\./x'"):
        save(name="../x")
    real = load_checkpoint(best)
    real.config["model"]["_target_"] = "mypackage.Net"
    monkeypatch.setattr("liplayers.bundles.saving.load_checkpoint", lambda path: real)
    with pytest.raises(BundleError, match=r"calls 'mypackage\.Net', which is no part of liplayers"):
        save()
    assert not (tmp_path / "net").exists()


def test_the_options_of_the_command_are_checked(monkeypatch: Any, capsys: Any):
    monkeypatch.setattr(sys, "argv", ["liplayers-bundle", "run"])
    with pytest.raises(SystemExit) as ended:
        bundle_command()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the following arguments are required: DIR, --command, --data")


# --- the leaderboard ------------------------------------------------------------------------------------------------


def attacked(one: Any, samples: int, eps: Any) -> Audit:
    rows = tuple(RobustAccuracy(parse_radius(e), 0.5, 0.75, 0.7512) for e in eps)
    return Audit(samples, 1.0, rows, samples, 0, 0.9, 5, 3, 0, 5, 1, {0.5: 1.2}, ())


def test_a_certificate_that_falls_makes_no_leaderboard(tmp_path: Path, monkeypatch: Any, capsys: Any, once: None):
    monkeypatch.setattr(leaderboard, "attacked", lambda *arguments: replace(attacked(*arguments), certified_fallen=1))
    assert leaderboard.main(["digits-mlp", "--output", str(tmp_path)]) == 2
    assert "digits-mlp: attacks refute its certificates" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_leaderboard_is_of_what_was_verified(
    folder: Path, saved: Path, tmp_path: Path, monkeypatch: Any, capsys: Any, once: None
):
    monkeypatch.chdir(tmp_path)
    output = ["--output", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(verifying, "certify_one", lambda *arguments: (_ for _ in ()).throw(DataNotFoundError("no files")))
        assert leaderboard.main([str(saved), "--samples", "0", *output]) == 0
    text = (tmp_path / "leaderboard.md").read_text("utf-8")
    assert "- small-net: no files" in text.partition("## Not verified here")[2]
    assert "| small-net" not in text
    monkeypatch.setattr(leaderboard, "attacked", attacked)
    assert leaderboard.main([str(folder), "--samples", "4", *output]) == 0
    text = (tmp_path / "leaderboard.md").read_text("utf-8")
    provable, under_attack, published = (part for part in text.split("\n\n") if part.startswith("| "))
    assert provable.startswith("| provable | clean |")
    results = lp.load_bundle(folder).report["results"]
    figures = [results["clean_accuracy"], *(entry["accuracy"] for entry in results["certified_accuracy"])]
    assert f"| digits-mlp | {' | '.join(f'{100 * figure:.2f}' for figure in figures)} |" in provable
    assert under_attack.startswith("| attacked | samples | clean |")
    assert "| digits-mlp | 4 | 100.00 | 75.12 |" in under_attack
    assert "70.6" in published
    assert "digits" not in published
    radius_lie = folder / CERTIFICATES
    radius_lie.write_text(radius_of(1.01)(radius_lie.read_text()))
    rehash(folder)
    edit_report(folder, lambda report: None)
    assert leaderboard.main([str(folder), *output]) == 2
    assert "certificates.csv: sample 4 has radius" in capsys.readouterr().err
    assert leaderboard.main(["--root", "nonsense", *output]) == 2
