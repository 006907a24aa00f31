"""From a finished run and its certification to a bundle."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liplayers.bundles.building import portable
from liplayers.bundles.bundle import FROZEN, RAW, Bundle
from liplayers.bundles.card import card_text
from liplayers.bundles.manifest import CARD, CERTIFICATES, CONFIG, FORMAT, MANIFEST, REPORT, WEIGHTS
from liplayers.certification.evidence import read_certificates, read_network, read_report
from liplayers.checkpoint import Checkpoint, load_checkpoint
from liplayers.errors import BundleError, VerificationError
from liplayers.extras import extra

__all__ = ["cpu_model", "save_bundle"]


def save_bundle(
    run: str | Path,
    folder: str | Path,
    *,
    command: str,
    data: str,
    report: str | Path | None = None,
    name: str | None = None,
    machine: str | None = None,
    notes: str = "",
    overwrite: bool = False,
) -> Bundle:
    """Make a bundle of a trained network that `certify.py` has certified; it is loaded once before it is written.

    Where the run and its data lay is left out; folders of data keep the last part of their names.

    Args:
        run: the output folder of the training, whose checkpoints/best.ckpt is meant, or a checkpoint.
        folder: for the bundle.
        command: that trained it, for the card.
        data: what the data are and where anyone gets them, in a sentence, for the card.
        report: the folder that `certify.py` wrote; None: certify-<checkpoint>-test of the run.
        name: of the bundle; None: that of `folder`.
        machine: that trained it; None: this one's processor.
        notes: for the card, such as the time it took and the figures of other seeds.
        overwrite: whether to replace a bundle that is there.

    Raises:
        CheckpointError: no such checkpoint.
        VerificationError: the report is missing or damaged, or about another checkpoint.
        BundleError: a network that cannot be in a bundle, such as one with layers that are not of liplayers.
        MissingPackageError: safetensors is not installed.
        OutputError: the folder holds something, or cannot be written.
    """
    run, folder = Path(run), Path(folder)
    path = run / "checkpoints" / "best.ckpt" if run.is_dir() else run
    checkpoint = load_checkpoint(path)
    home = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    where = (home / f"certify-{path.stem}-test" if report is None else Path(report)) / REPORT
    found = read_report(where)
    if found["checkpoint"]["sha256"] != checkpoint.sha256:
        raise VerificationError(f"{where}: is about another checkpoint than {path}")
    if found["mode"] != "proof":
        raise VerificationError(f"{where}: mode={found['mode']} proves nothing; certify with mode=proof")
    certificates = where.with_name(CERTIFICATES)
    read_certificates(certificates, found)
    frozen = read_network(where.with_name("network.pt"), found)
    weights, same = _stored(checkpoint.state_dict, frozen)
    about = {"data": data, "command": command, "machine": machine or cpu_model(), "notes": notes}
    config = {
        "name": folder.absolute().name if name is None else name,
        "liplayers": checkpoint.version,
        "input_shape": list(checkpoint.input_shape),
        "class_names": list(checkpoint.class_names),
        "epoch": checkpoint.epoch,
        "config": portable({**checkpoint.config, "model": checkpoint.model_config}),
        "same": same,
        "about": about,
    }
    files = {
        CONFIG: _json(config),
        WEIGHTS: weights,
        REPORT: _json(_report_of_bundle(found, checkpoint, config["config"], weights)),
        CERTIFICATES: certificates.read_bytes(),
    }
    files[CARD] = card_text(config, json.loads(files[REPORT])).encode()
    hashes = {key: hashlib.sha256(content).hexdigest() for key, content in sorted(files.items())}
    files[MANIFEST] = _json({"format": FORMAT, "sha256": hashes})
    bundle = Bundle.from_files(str(folder), files)
    bundle.network()
    bundle.save_pretrained(folder, overwrite=overwrite)
    return bundle


def _stored(raw: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> tuple[bytes, dict[str, str]]:
    """The weights as safetensors, each once; which frozen weight is which raw one."""
    with extra("bundles"):
        from safetensors.torch import save
    same = {}
    for name, tensor in frozen.items():
        alike = (key for key, other in raw.items() if other.dtype == tensor.dtype and torch.equal(other, tensor))
        equal = next(alike, None)
        if equal is not None:
            same[name] = equal
    tensors = {RAW + name: tensor for name, tensor in raw.items()}
    tensors |= {FROZEN + name: tensor for name, tensor in frozen.items() if name not in same}
    return save({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}), same


def _report_of_bundle(
    report: Mapping[str, Any], checkpoint: Checkpoint, config: dict[str, Any], weights: bytes
) -> dict[str, Any]:
    """The report, about the weights in the bundle in place of those in the checkpoint."""
    environment = {key: value for key, value in report["environment"].items() if key != "platform"}
    return {
        **report,
        "checkpoint": {
            "path": WEIGHTS,
            "sha256": hashlib.sha256(weights).hexdigest(),
            "epoch": checkpoint.epoch,
            "liplayers": checkpoint.version,
            "config": config,
        },
        "data": {**report["data"], "config": portable(report["data"]["config"], of_data=True)},
        "environment": {**environment, "processor": cpu_model()},
    }


def _json(content: Any) -> bytes:
    try:
        return (json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()
    except (TypeError, ValueError) as error:  # NaN, or text that is no UTF-8
        raise BundleError(f"the bundle cannot be written as JSON ({error}); its settings must be plain") from None


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
