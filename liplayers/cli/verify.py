"""Check a report: compute everything again from the checkpoint, or the bundle, and the data, and compare."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from liplayers.bundles.bundle import Bundle, load_bundle
from liplayers.bundles.card import card_text
from liplayers.bundles.manifest import CARD, CERTIFICATES, CONFIG, REPORT, WEIGHTS
from liplayers.certification import Certificates
from liplayers.certification import report as reports
from liplayers.certification.evidence import check_network, read_certificates, read_network, read_report
from liplayers.certification.network import LARGEST_RADIUS, CertifiedNetwork
from liplayers.certification.radius import certified_radius
from liplayers.checkpoint import Checkpoint, load_checkpoint
from liplayers.cli.configuration import radii, text
from liplayers.cli.proving import Certified, certify_one
from liplayers.commands.output import say
from liplayers.errors import CheckpointError, DataNotFoundError, VerificationError
from liplayers.text import one_line

__all__ = ["ABSENT", "NOT_COMPARED", "TOLERANCE", "Evidence", "Span", "verify"]

TOLERANCE = 1e-8  # relative: what another order of summation changes in logits and in proven bounds
NOT_COMPARED = {"environment", "device", "checkpoint.path", "data.config", "certificates_sha256"}  # the file is


@dataclass(frozen=True)
class Evidence:
    """A report with what it is about.

    Args:
        path: of the report; its certificates.csv lies, or would lie, beside it.
        report: as read.
        lines: of its certificates.csv.
        checkpoint: of the network.
        weights: that were certified; None in mode "fast".
        weights_path: of the file that holds them.
        bundle: that it all belongs to.
    """

    path: Path
    report: dict[str, Any]
    lines: list[str]
    checkpoint: Checkpoint
    weights: Mapping[str, Tensor] | None
    weights_path: Path
    bundle: Bundle | None = None


def verify(cfg: DictConfig) -> Certified:
    """Compute a report again, from `cfg.ckpt` or `cfg.bundle` and the data, and compare; return what was computed.

    Raises:
        VerificationError: the report, its certificates.csv or its weights differ from what is computed, or cannot be
            read.
        DataNotFoundError: of a bundle, after everything was compared that needs no data.
        LipschitzError: as in certifying.
    """
    evidence = _evidence(cfg)
    path, report = evidence.path, evidence.report
    settings = OmegaConf.merge(cfg, {"mode": report["mode"], "data": {"split": report["data"]["split"]}})
    assert isinstance(settings, DictConfig)
    eps = radii(f"{path}: eps", [entry["eps"] for entry in report["results"]["certified_accuracy"]])
    try:
        fresh = certify_one(evidence.checkpoint, settings, eps, evidence.weights)
    except DataNotFoundError:
        if evidence.bundle is not None:
            _verify_without_data(evidence)
        raise
    except CheckpointError as error:
        if evidence.bundle is None:
            raise
        raise VerificationError(f"{evidence.weights_path}: {error}") from None
    stored = report
    if evidence.bundle is not None and not isinstance(getattr(type(fresh.data.source), "name", None), str):
        # called after the folder that the data lie in, which may have another name here
        stored = {**report, "data": {**report["data"], "name": fresh.report["data"]["name"]}}
    _compare(path, stored, json.loads(reports.json_text(fresh.report)))
    _compare_certificates(path, evidence.lines, fresh)
    distance = fresh.network.weights_distance
    rounding = f"; computed here, the weights differ by {distance:.1e} of the largest" if distance else ""
    bounds = len(fresh.network.bounds.upper)
    say(f"verified: {len(evidence.lines)} radii, {bounds} layer bounds, accuracies and hashes agree{rounding}")
    return fresh


def _evidence(cfg: DictConfig) -> Evidence:
    """What `cfg.verify` names: a report.json, or, where it is true, that of the bundle."""
    bundle = None if cfg.bundle is None else load_bundle(text("bundle", cfg.bundle, "a bundle"))
    if cfg.verify is True and bundle is not None:
        return _evidence_of_bundle(bundle)
    path = Path(text("verify", cfg.verify, "a report.json" if bundle is None else "true, or a report.json"))
    report = read_report(path)
    lines = read_certificates(path.with_name("certificates.csv"), report)
    if bundle is None:
        checkpoint = load_checkpoint(text("ckpt", cfg.ckpt, f"the one checkpoint that {path} is about"))
    else:
        checkpoint = bundle.checkpoint()
    if checkpoint.sha256 != report["checkpoint"]["sha256"]:
        raise VerificationError(
            f"{path}: is about a checkpoint with sha256 {report['checkpoint']['sha256'][:12]}…, "
            f"{checkpoint.path} has {checkpoint.sha256[:12]}…"
        )
    file = path.with_name("network.pt")
    weights = read_network(file, report) if report["mode"] == "proof" else None
    return Evidence(path, report, lines, checkpoint, weights, file)


def _evidence_of_bundle(bundle: Bundle) -> Evidence:
    """That of a bundle, each file of which is consistent with the others."""
    folder, checkpoint = Path(bundle.name if "://" in bundle.place else bundle.place), bundle.checkpoint()
    path, weights_path = folder / REPORT, folder / WEIGHTS
    report = read_report(path, bundle.files[REPORT])
    lines = read_certificates(folder / CERTIFICATES, report, bundle.files[CERTIFICATES])
    if report["mode"] != "proof":
        raise VerificationError(f"{path}: mode={report['mode']} proves nothing; a bundle has a report of mode=proof")
    if checkpoint.sha256 != report["checkpoint"]["sha256"]:
        raise VerificationError(f"{weights_path}: is not the file that {REPORT} is about; its hash differs")
    bundle.network()
    check_network(weights_path, bundle.frozen, report)
    try:
        card = card_text(bundle.config, report)
    except (KeyError, TypeError, ValueError) as error:
        raise VerificationError(f"{path}: not the report of a bundle ({one_line(error)[:100]})") from None
    if card.encode() != bundle.files[CARD]:
        raise VerificationError(f"{folder / CARD}: says something else than {CONFIG} and {REPORT}")
    return Evidence(path, report, lines, checkpoint, bundle.frozen, weights_path, bundle)


def _verify_without_data(evidence: Evidence) -> None:
    """Compare what is proven of the network alone, and the accuracies with the certificates."""
    bundle = evidence.bundle
    assert bundle is not None
    classes = len(bundle.class_names)
    network = CertifiedNetwork(bundle.network(), bundle.input_shape, classes, weights=bundle.frozen)
    proven = json.loads(reports.json_text(reports.proofs(network)))
    _compare(evidence.path, {key: evidence.report[key] for key in proven if key in evidence.report}, proven)
    results = evidence.report["results"]
    summary = reports.summary(_as_stored(evidence), [entry["eps"] for entry in results["certified_accuracy"]])
    _compare(evidence.path, {"results": results}, {"results": json.loads(reports.json_text(summary))})
    say(
        f"without the data: {len(network.bounds.upper)} layer bounds and the hashes agree, {len(evidence.lines)} radii "
        "are NOT verified"
    )


def _as_stored(evidence: Evidence) -> Certificates:
    """What certificates.csv says."""
    file = evidence.path.with_name(CERTIFICATES)
    try:
        table = torch.tensor(
            [[float(field) for field in line.split(",")] for line in evidence.lines], dtype=torch.float64
        )
        _, label, prediction, margin, radius = table.T
    except ValueError as error:
        raise VerificationError(f"{file}: not the certificates of certify.py ({one_line(error)[:100]})") from None
    return Certificates(label.long(), prediction.long(), margin, radius)


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
