"""Check a report: compute everything again from the checkpoint and the data, and compare."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from liplayers.certification import report as reports
from liplayers.certification.network import MODES, state_sha256
from liplayers.checkpoint import load_checkpoint, load_tensors
from liplayers.cli.configuration import radii
from liplayers.cli.proving import Certified, certify_one
from liplayers.commands.output import say
from liplayers.errors import ConfigError, VerificationError

TOLERANCE = 1e-8  # relative: what another order of summation changes in logits and in proven bounds
NOT_COMPARED = {"environment", "device", "checkpoint.path", "data.config", "certificates_sha256"}  # the file is
SPLITS = ("train", "val", "test")
_LARGEST_FILE = 2**30
_HASH = re.compile(r"[0-9a-f]{64}")


def verify(cfg: DictConfig) -> int:
    """Compute a report again from `cfg.ckpt` and compare; return the number of samples that agree.

    Raises:
        VerificationError: the report, its certificates.csv or its network.pt differs from what is computed, or cannot
            be read.
        LipschitzError: as in certifying.
    """
    path = Path(cfg.verify)
    report = _read(path)
    stored = _read_certificates(path, report)
    if not isinstance(cfg.ckpt, str):
        raise ConfigError(f"ckpt={cfg.ckpt}: expected the one checkpoint that {path} is about")
    checkpoint = load_checkpoint(cfg.ckpt)
    if checkpoint.sha256 != report["checkpoint"]["sha256"]:
        raise VerificationError(
            f"{path}: is about a checkpoint with sha256 {report['checkpoint']['sha256'][:12]}…, "
            f"{cfg.ckpt} has {checkpoint.sha256[:12]}…"
        )
    settings = OmegaConf.merge(cfg, {"mode": report["mode"], "data": {"split": report["data"]["split"]}})
    assert isinstance(settings, DictConfig)
    eps = radii(f"{path}: eps", [entry["eps"] for entry in report["results"]["certified_accuracy"]])
    fresh = certify_one(checkpoint, settings, eps, _weights(path, report))
    _compare(path, report, json.loads(reports.json_text(fresh.report)))
    _compare_certificates(path, stored, fresh)
    distance = fresh.network.weights_distance
    rounding = f"; computed here, the weights differ by {distance:.1e} of the largest" if distance else ""
    bounds = len(fresh.network.bounds.upper)
    say(f"verified: {len(stored)} radii, {bounds} layer bounds, accuracies and hashes agree{rounding}")
    return len(stored)


def _read(path: Path) -> dict[str, Any]:
    """The report, with everything that is used to compute it again."""
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise VerificationError(f"{path}: has {path.stat().st_size} bytes; not a report")
        report = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
        hashes = [report["checkpoint"]["sha256"], report["network"]["sha256"], report["certificates_sha256"]]
        if not all(isinstance(value, str) and _HASH.fullmatch(value) for value in hashes):
            raise TypeError("a sha256 that is none")
        if report["mode"] not in MODES or report["data"]["split"] not in SPLITS:
            raise TypeError("an unknown mode or split")
        entries = report["results"]["certified_accuracy"]
        if not entries or not all(isinstance(e["eps"], str) and e["eps"] == e["eps"].strip() for e in entries):
            raise TypeError("radii that are none")
        return report
    except OSError as error:
        raise VerificationError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:100]
        raise VerificationError(f"{path}: not a report of certify.py ({reason})") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object with the same key twice")
    return found


def _read_certificates(path: Path, report: Mapping[str, Any]) -> list[str]:
    """The lines of certificates.csv, without the header."""
    file = path.with_name("certificates.csv")
    try:
        content = file.read_bytes()
        header, *lines, last = content.decode("ascii").split("\n")
    except (OSError, ValueError) as error:
        raise VerificationError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if hashlib.sha256(content).hexdigest() != report["certificates_sha256"]:
        raise VerificationError(f"{file}: is not the file that {path.name} was written with; its hash differs")
    if header != ",".join(reports.CSV_HEADER) or last:
        raise VerificationError(f"{file}: begins with {_short(header)}, expected {','.join(reports.CSV_HEADER)}")
    return lines


def _weights(path: Path, report: Mapping[str, Any]) -> Mapping[str, Tensor] | None:
    """The weights that were certified, from network.pt beside the report."""
    file = path.with_name("network.pt")
    if report["mode"] != "proof":
        return None
    if not file.is_file():
        raise VerificationError(f"{file}: is missing; it holds the weights that {path.name} is about")
    weights = load_tensors(file)
    if not isinstance(weights, dict) or not all(isinstance(name, str) and _plain(t) for name, t in weights.items()):
        raise VerificationError(
            f"{file}: is not the network that {path.name} is about; it holds more than plain tensors"
        )
    if state_sha256(weights) != report["network"]["sha256"]:
        raise VerificationError(f"{file}: is not the network that {path.name} is about; its hash differs")
    return weights


def _plain(tensor: Any) -> bool:
    """Whether every entry of a tensor is stored, as it stands."""
    return (
        isinstance(tensor, Tensor)
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not (tensor.is_neg() or tensor.is_conj() or tensor.is_quantized)
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def _compare(path: Path, stored: Any, fresh: Any) -> None:
    """Raise unless both reports say the same, apart from NOT_COMPARED."""
    differences = list(_differences(stored, fresh, ""))
    if differences:
        key, old, new = differences[0]
        more = f", and {len(differences) - 1} more differences" if len(differences) > 1 else ""
        raise VerificationError(f"{path}: {key} is {_short(old)}, computed again {_short(new)}{more}")


def _differences(old: Any, new: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    if key in NOT_COMPARED:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(name, ABSENT), new.get(name, ABSENT), f"{key}.{name}" if key else name)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from _differences(a, b, f"{key}[{i}]")
    elif not _agree(old, new):
        yield key, old, new


class _Absent:
    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


def _agree(old: Any, new: Any, absolute: float = 0.0) -> bool:
    if type(old) is type(new) is float:
        return math.isclose(old, new, rel_tol=TOLERANCE, abs_tol=absolute)
    return type(old) is type(new) and old == new


def _compare_certificates(path: Path, stored: list[str], fresh: Certified) -> None:
    """Raise unless each sample has the same label and prediction, and margin and radius up to rounding."""
    file = path.with_name("certificates.csv")
    rows = reports.csv_text(fresh.certificates).splitlines()[1:]
    if len(rows) != len(stored):
        raise VerificationError(f"{file}: has {len(stored)} samples, computed again {len(rows)}")
    absolute = _rounding(fresh)
    for old, new in zip(stored, rows, strict=True):
        fields, expected = old.split(","), new.split(",")
        if len(fields) != len(expected):
            raise VerificationError(f"{file}: sample {expected[0]} is {_short(old)}, computed again {_short(new)}")
        for name, a, b in zip(reports.CSV_HEADER, fields, expected, strict=True):
            if a != b and not (name in ("margin", "radius") and _close(a, b, absolute)):
                raise VerificationError(f"{file}: sample {expected[0]} has {name} {_short(a)}, computed again {b}")


def _rounding(fresh: Certified) -> float:
    """What the rounding of the logits may change in a margin or, a few times over, in a radius."""
    network = fresh.network
    constants = network.margin_lipschitz[network.margin_lipschitz > 0].double()
    error = 1e-6 if network.worst_rounding is None else network.worst_rounding.error
    return 8 * error * max(1.0, 1 / constants.min().item() if len(constants) else 1.0)


def _close(old: str, new: str, absolute: float) -> bool:
    """Numbers that agree, written as Python writes them; what is 0 in one is 0 in both."""
    try:
        a, b = float(old), float(new)
    except ValueError:
        return False
    return repr(a) == old and (a == 0) == (b == 0) and _agree(a, b, absolute)


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
