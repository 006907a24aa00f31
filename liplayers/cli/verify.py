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
from liplayers.certification.network import LARGEST_RADIUS, MODES, state_sha256
from liplayers.certification.radius import certified_radius
from liplayers.checkpoint import load_checkpoint, load_tensors
from liplayers.cli.configuration import radii, text
from liplayers.cli.proving import Certified, certify_one
from liplayers.commands.output import say
from liplayers.errors import VerificationError

__all__ = ["ABSENT", "NOT_COMPARED", "SPLITS", "TOLERANCE", "Span", "verify"]

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
    path = Path(text("verify", cfg.verify, "a report.json"))
    report = _read(path)
    stored = _read_certificates(path, report)
    checkpoint = load_checkpoint(text("ckpt", cfg.ckpt, f"the one checkpoint that {path} is about"))
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
            raise TypeError("not a sha256")
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


def _agree(old: Any, new: Any) -> bool:
    if type(old) is type(new) is float:
        return math.isclose(old, new, rel_tol=TOLERANCE)
    return type(old) is type(new) and old == new


def _compare_certificates(path: Path, stored: list[str], fresh: Certified) -> None:
    """Raise unless each sample has the same label and prediction, and margin and radius up to its own rounding."""
    file = path.with_name("certificates.csv")
    rows = reports.csv_text(fresh.certificates).splitlines()[1:]
    if len(rows) != len(stored):
        raise VerificationError(f"{file}: has {len(stored)} samples, computed again {len(rows)}")
    if stored == rows:
        return
    for old, new, spans in zip(stored, rows, _spans(fresh), strict=True):
        fields, expected = old.split(","), new.split(",")
        if len(fields) != len(expected):
            raise VerificationError(f"{file}: sample {expected[0]} is {_short(old)}, computed again {_short(new)}")
        for name, a, b in zip(reports.CSV_HEADER, fields, expected, strict=True):
            if a != b and not (name in spans and _close(a, b, spans[name])):
                raise VerificationError(f"{file}: sample {expected[0]} has {name} {_short(a)}, computed again {b}")


Span = tuple[float, float]


@torch.no_grad()
def _spans(fresh: Certified) -> Iterator[dict[str, Span]]:
    """What another order of summation may make of each sample's margin and radius, by the proven error of its logits.

    Two evaluations differ by twice the error in a logit, four times in a margin; the error that is subtracted from
    margins may come out for the next power of two. Each pair of classes has its own constant.
    """
    network, constants = fresh.network, fresh.network.margin_lipschitz
    for inputs, _ in fresh.data.eval_loader(fresh.report["data"]["split"]):
        logits = network(inputs).cpu()
        exact = logits.double()
        best = exact.topk(2, 1).values
        if network.mode == "proof":
            wider = 1 + TOLERANCE
            error = network.logit_error(wider * inputs.double(), wider * certified_radius(exact, constants))
        else:  # of the two classes that decide: one of a huge negative logit says nothing about them
            error = 8 * torch.finfo(logits.dtype).eps * best.abs().amax(1).clamp_min(1)
        error = torch.where(error.isfinite(), error, 0.0)
        margin = best[:, 0] - best[:, 1]
        most = LARGEST_RADIUS if network.mode == "proof" else math.inf
        low, high = (
            certified_radius(exact, constants, (times * error)[:, None].expand_as(exact)).clamp_max(most)
            for times in (3, -1)
        )
        columns = (margin - 4 * error, margin + 4 * error, low, high)
        for a, b, c, d in zip(*(column.tolist() for column in columns), strict=True):
            yield {"margin": (a, b), "radius": (c, d)}


def _close(old: str, new: str, span: Span) -> bool:
    """Numbers that agree, written as Python writes them; what is 0 in one is 0 in both."""
    try:
        a, b = float(old), float(new)
    except ValueError:
        return False
    within = span[0] <= a <= span[1] or _agree(a, b) or any(_agree(a, end) for end in span)
    return repr(a) == old and (a == 0) == (b == 0) and within


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
