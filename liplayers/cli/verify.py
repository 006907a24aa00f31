"""Check a report: compute everything again from the checkpoint and the data, and compare."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from liplayers.certification import report as reports
from liplayers.certification.network import state_sha256
from liplayers.checkpoint import load_checkpoint, load_tensors
from liplayers.cli.configuration import radii
from liplayers.cli.proving import Certified, certify_one, console
from liplayers.errors import ConfigError, VerificationError

TOLERANCE = 1e-8  # relative and absolute: what another order of summation changes, in logits and in proven bounds
_LARGEST_FILE = 2**30
# where things lie and what they were computed with; certificates_sha256 is compared with the file
NOT_COMPARED = ("environment", "device", "checkpoint.path", "data.config", "certificates_sha256")


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
    about = fresh.report
    console.print(
        f"verified: {len(stored)} radii, {len(about['lipschitz']['layers'])} layer bounds, accuracies and hashes agree"
    )
    return len(stored)


def _read(path: Path) -> dict[str, Any]:
    """The report, with everything that is used to compute it again."""
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise VerificationError(f"{path}: has {path.stat().st_size} bytes; not a report")
        report = json.loads(path.read_text(encoding="utf-8"))
        used = [report["checkpoint"]["sha256"], report["data"]["split"], report["mode"], report["certificates_sha256"]]
        if report["mode"] == "proof":
            used.append(report["network"]["sha256"])
        if not all(isinstance(value, str) for value in used) or not report["results"]["certified_accuracy"]:
            raise TypeError("fields of another type")
        [entry["eps"] for entry in report["results"]["certified_accuracy"]]
        return report
    except OSError as error:
        raise VerificationError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:100]
        raise VerificationError(f"{path}: not a report of certify.py ({reason})") from None


def _read_certificates(path: Path, report: Mapping[str, Any]) -> list[dict[str, str]]:
    file = path.with_name("certificates.csv")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise VerificationError(f"{file}: cannot be read ({error.strerror or error})") from None
    if hashlib.sha256(content).hexdigest() != report["certificates_sha256"]:
        raise VerificationError(f"{file}: is not the file that {path.name} was written with; its hash differs")
    return list(csv.DictReader(content.decode(errors="replace").splitlines()))


def _weights(path: Path, report: Mapping[str, Any]) -> Mapping[str, Tensor] | None:
    """The weights that were certified, from network.pt beside the report."""
    file = path.with_name("network.pt")
    if report["mode"] != "proof":
        return None
    if not file.is_file():
        raise VerificationError(f"{file}: is missing; it holds the weights that {path.name} is about")
    weights = load_tensors(file)
    tensors = isinstance(weights, dict) and all(isinstance(t, Tensor) for t in weights.values())
    if not tensors or state_sha256(weights) != report["network"]["sha256"]:
        raise VerificationError(f"{file}: is not the network that {path.name} is about; its hash differs")
    return weights


def _compare(path: Path, stored: Any, fresh: Any) -> None:
    """Raise unless both reports say the same, apart from NOT_COMPARED."""
    differences = [d for d in _differences(stored, fresh, "") if not d[0].startswith(NOT_COMPARED)]
    if differences:
        key, old, new = differences[0]
        more = f", and {len(differences) - 1} more differences" if len(differences) > 1 else ""
        raise VerificationError(f"{path}: {key} is {_short(old)}, computed again {_short(new)}{more}")


def _differences(old: Any, new: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(name, "absent"), new.get(name, "absent"), f"{key}.{name}" if key else name)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from _differences(a, b, f"{key}[{i}]")
    elif not _agree(old, new):
        yield key, old, new


def _agree(old: Any, new: Any) -> bool:
    if type(old) is type(new) is float:
        return math.isclose(old, new, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return type(old) is type(new) and old == new


def _compare_certificates(path: Path, stored: list[dict[str, str]], fresh: Certified) -> None:
    rows = list(csv.DictReader(reports.csv_text(fresh.certificates).splitlines()))
    file = path.with_name("certificates.csv")
    if len(rows) != len(stored):
        raise VerificationError(f"{file}: has {len(stored)} samples, computed again {len(rows)}")
    for old, new in zip(stored, rows, strict=True):
        for name, value in new.items():
            exact = name not in ("margin", "radius")
            if old.get(name) != value if exact else not _close(old.get(name), value):
                raise VerificationError(
                    f"{file}: sample {new['index']} has {name} {_short(old.get(name))}, computed again {value}"
                )


def _close(old: str | None, new: str) -> bool:
    try:
        return _agree(float(old or "nan"), float(new)) or old == new
    except ValueError:
        return False


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
