"""Attack the certificates of one checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from liplayers.audit.audit import Audit
from liplayers.audit.report import audit_figure, audit_table
from liplayers.certification import report as reports
from liplayers.cli.proving import Certified
from liplayers.commands.output import console, progress_bar, say
from liplayers.errors import RefutedError

__all__ = ["attacked", "audit"]


def audit(name: str, one: Certified, samples: int, eps: list[float | str], folder: Path) -> Audit:
    """Attack the first certificates; write audit.json, audit.png and, where one falls, audit_fallen.npz.

    Raises:
        RefutedError: a certified point fell; after the files are written.
    """
    title, unit = one.certification.title, one.data.unit
    found = attacked(one, samples, eps)
    files = {
        "audit.json": reports.json_writer(found.summary()),
        "audit.png": reports.figure_writer(audit_figure(found, f"{title}, {name}", unit)),
    }
    if found.fallen:
        files["audit_fallen.npz"] = lambda path: np.savez(
            path.open("wb"),
            kind=np.array([r.kind for r in found.fallen]),
            input=torch.stack([r.input.cpu() for r in found.fallen]).numpy(),
            adversarial=torch.stack([r.adversarial.cpu() for r in found.fallen]).numpy(),
            label=np.array([r.label for r in found.fallen]),
            radius=np.array([r.radius for r in found.fallen]),
        )
    written = reports.write_outputs(folder, files)
    console.print(audit_table(found, f"audit of {name}: {title}, {found.samples} samples"))
    for path in written:
        say(path)
    if not found.holds:
        raise RefutedError(
            f"{name}: {found.certified_fallen} certified points and {found.boundary_fallen} points near the boundary "
            f"fell, and a margin's slope is {found.margin_ratio:.6f} of its constant; {folder} holds the inputs: a "
            f"bound is wrong, please report it"
        )
    return found


def attacked(one: Certified, samples: int, eps: Sequence[float | str]) -> Audit:
    """What attacks on the first certificates found; writes nothing."""
    with progress_bar("auditing") as progress:
        found = one.certification.audit(samples, eps=eps, progress=progress)
    assert isinstance(found, Audit)  # of a classifier
    return found
