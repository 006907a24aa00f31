"""What `certify.py` left behind, read with suspicion: report.json, certificates.csv and the weights they are about."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liplayers.certification.network import MODES, state_sha256
from liplayers.checkpoint import load_tensors
from liplayers.errors import VerificationError
from liplayers.text import strict_json

__all__ = ["CSV_HEADER", "SPLITS", "check_network", "read_certificates", "read_network", "read_report"]

SPLITS = ("train", "val", "test")
CSV_HEADER = ("index", "label", "prediction", "margin", "radius")
_LARGEST_FILE = 2**30
_HASH = re.compile(r"[0-9a-f]{64}")


def read_report(path: Path, content: bytes | None = None) -> dict[str, Any]:
    """The report, with everything that is used to compute it again.

    Args:
        path: of the file.
        content: what it holds; None to read it.

    Raises:
        VerificationError: naming the file.
    """
    try:
        if content is None:
            if path.stat().st_size > _LARGEST_FILE:
                raise VerificationError(f"{path}: has {path.stat().st_size} bytes; not a report")
            content = path.read_bytes()
        report = strict_json(content)
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
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, VerificationError):
            raise
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:100]
        raise VerificationError(f"{path}: not a report of certify.py ({reason})") from None


def read_certificates(path: Path, report: Mapping[str, Any], content: bytes | None = None) -> list[str]:
    """The lines of certificates.csv, without the header.

    Args:
        path: of the file.
        report: that names its hash.
        content: what it holds; None to read it.

    Raises:
        VerificationError: naming the file.
    """
    try:
        content = path.read_bytes() if content is None else content
        header, *lines, last = content.decode("ascii").split("\n")
    except (OSError, ValueError) as error:
        raise VerificationError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if hashlib.sha256(content).hexdigest() != report["certificates_sha256"]:
        raise VerificationError(f"{path}: is not the file that report.json was written with; its hash differs")
    if header != ",".join(CSV_HEADER) or last:
        raise VerificationError(f"{path}: begins with {header[:57]!r}, expected {','.join(CSV_HEADER)}")
    return lines


def read_network(path: Path, report: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights that were certified, from a network.pt.

    Args:
        path: of the file.
        report: that names their hash.

    Raises:
        VerificationError: naming the file.
    """
    if not path.is_file():
        raise VerificationError(f"{path}: is missing; it holds the weights that report.json is about")
    weights = load_tensors(path)
    if not isinstance(weights, dict) or not all(isinstance(name, str) and _plain(t) for name, t in weights.items()):
        raise VerificationError(
            f"{path}: is not the network that report.json is about; it holds more than plain tensors"
        )
    check_network(path, weights, report)
    return weights


def check_network(path: Path, weights: Mapping[str, Tensor], report: Mapping[str, Any]) -> None:
    """Raise unless the weights are those that were certified.

    Args:
        path: of the file that they are from.
        weights: by name.
        report: that names their hash.

    Raises:
        VerificationError: naming the file.
    """
    if state_sha256(weights) != report["network"]["sha256"]:
        raise VerificationError(f"{path}: is not the network that report.json is about; its hash differs")


def _plain(tensor: Any) -> bool:
    """Whether every entry of a tensor is stored, as it stands."""
    return (
        isinstance(tensor, Tensor)
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not (tensor.is_neg() or tensor.is_conj() or tensor.is_quantized)
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )
