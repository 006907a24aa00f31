"""The audit of a layer: every check that its role has, one by one or all at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from liplayers.core.registry import ROLES, Family
from liplayers.errors import ArgumentError, AuditError, UnknownNameError
from liplayers.testing.contract import contract_checks
from liplayers.testing.norms import norm_checks
from liplayers.testing.subject import Measured, Refused, Subject
from liplayers.text import one_line

__all__ = ["Audit", "Check", "Finding", "audit", "checks"]

CAN_BE_ORTHOGONAL = ("linear", "conv")


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        layer: the class or function that was audited.
        role: in which role.
        check: what was checked, such as "norm".
        configuration: of the layer, such as "(2, 13, bias=True), float64"; empty for a small one by default arguments.
        passed: whether the layer keeps it.
        measured: where something is measured, what came nearest to its bound.
        bound: what it may be at most.
        note: where that was; what failed; or why the constructor refuses the configuration.
        refused: whether it does, which is not a failure.
    """

    layer: str
    role: str
    check: str
    configuration: str
    passed: bool
    measured: float | None = None
    bound: float | None = None
    note: str = ""
    refused: bool = False

    def __str__(self) -> str:
        where = f" {self.configuration}" if self.configuration else ""
        return f"{self.layer} ({self.role}): {self.check}{where}: {self.note or 'passed'}"


@dataclass(frozen=True)
class Check:
    """One check of a layer in one configuration; to be called, without arguments.

    `pytest.mark.parametrize("check", checks(…))` shows each under its `__name__`.

    Attributes:
        subject: the constructor that is audited, its role, and whether it says that it preserves norms.
        name: what is checked, such as "norm".
        configuration: as in `Finding`.
        measure: what is called.
    """

    subject: Subject
    name: str
    configuration: str
    measure: Callable[[], Measured | None]

    @property
    def __name__(self) -> str:
        return " ".join(filter(None, (self.subject.name, self.subject.role, self.name, self.configuration)))

    def __call__(self) -> Finding:
        """Run it.

        Returns:
            What it found: that the layer passes, or that its constructor refuses the configuration.

        Raises:
            AuditError: the layer does not keep what is checked.
        """
        finding, cause = self._run()
        if not finding.passed:
            raise AuditError(str(finding)) from cause
        return finding

    def run(self) -> Finding:
        """What it found, also where the layer fails."""
        return self._run()[0]

    def _run(self) -> tuple[Finding, Exception | None]:
        asked = (self.subject.name, self.subject.role, self.name, self.configuration)
        try:
            with torch.random.fork_rng(devices=()), torch.enable_grad():
                torch.manual_seed(0)
                found = self.measure()
        except Refused as reason:
            return Finding(*asked, True, note=f"refused: {one_line(reason)}", refused=True), None
        except Exception as error:  # a layer may fail in any way
            kind = "" if isinstance(error, AuditError) else f"{type(error).__name__}: "
            return Finding(*asked, False, note=kind + one_line(error)), error
        if found is None:
            return Finding(*asked, True), None
        note = found.where
        if found.exceeded:
            note = f"measured {found.measured:.9g} > {found.bound:.9g} at {found.where}"
            others = [where for where in found.exceeded if where != found.where]
            note += f"; too large also at {', '.join(others)}" if others else ""
        return Finding(*asked, not found.exceeded, found.measured, found.bound, note), None


@dataclass(frozen=True)
class Audit:
    """What all checks found; its `str` is a table."""

    findings: tuple[Finding, ...]

    @property
    def failed(self) -> tuple[Finding, ...]:
        """The findings that the layer does not keep."""
        return tuple(finding for finding in self.findings if not finding.passed)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "check", "configuration", "measured", "bound", "")]
        for f in self.findings:
            numbers = ("" if value is None else f"{value:.9g}" for value in (f.measured, f.bound))
            rows.append((f.layer, f.check, f.configuration, *numbers, f.note if f.passed else f"FAILED: {f.note}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        widths[-1] = 0
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        refused = sum(finding.refused for finding in self.findings)
        passed = len(self.findings) - refused - len(self.failed)
        return "\n".join([*lines, f"{passed} passed, {refused} refused by the constructor, {len(self.failed)} failed"])


def checks(
    layer: Callable[..., nn.Module] | Family, role: str | None = None, *, orthogonal: bool = False
) -> list[Check]:
    """Every check of a layer, to be called one by one: by pytest, or where some are to be left out.

    Args:
        layer: a class, or a function that returns a layer, with the arguments of its role; or a `Family`.
        role: "linear", "conv" or "conv_transpose", with the arguments of `nn.Linear`, `nn.Conv2d` and
            `nn.ConvTranspose2d`; "dense_block" or "conv_block", of `features` or `channels`, which keep the shape. Of a
            family, every role that it has, if none is given.
        orthogonal: whether norms are preserved (for "conv", with circular padding). A family says so itself.

    Raises:
        ArgumentError: a layer without a role; a property that is not measured for the role.
        UnknownNameError: an unknown role.

    >>> from liplayers import AOLLinear
    >>> first, *others = checks(AOLLinear, "linear")
    >>> print(first())
    AOLLinear (linear): norm (1, 1, bias=True), float64: as initialised
    """
    if role is not None and role not in ROLES:
        raise UnknownNameError.of("layer role", role, ROLES)
    if isinstance(layer, Family):
        if orthogonal:
            raise ArgumentError("audit: orthogonal=True beside a Family, which says it itself: Family(…, orthogonal=…)")
        roles = [r for r in ROLES if getattr(layer, r) is not None] if role is None else [role]
        subjects = [_subject(getattr(layer, r), r, r in layer.orthogonal) for r in roles]
    else:
        subjects = [_subject(layer, role, orthogonal)]
    return [
        Check(subject, *named) for subject in subjects for named in (*norm_checks(subject), *contract_checks(subject))
    ]


def _subject(make: Callable[..., nn.Module] | None, role: str | None, orthogonal: bool) -> Subject:
    if not callable(make) or isinstance(make, nn.Module):
        raise ArgumentError(
            f"audit: got {make!r} as the {role or 'layer'}; expected a class, or a function that makes it"
        )
    if role is None:
        raise ArgumentError(f"audit: {make!r} without a role; expected one of {', '.join(ROLES)}")
    if orthogonal and role not in CAN_BE_ORTHOGONAL:
        raise ArgumentError(f"audit: orthogonal=True is measured for {' and '.join(CAN_BE_ORTHOGONAL)}, got {role!r}")
    return Subject(make, role, orthogonal)


def audit(layer: Callable[..., nn.Module] | Family, role: str | None = None, *, orthogonal: bool = False) -> Audit:
    """Run every check of a layer: whether it keeps its bound whatever its parameters are, and the layer contract.

    The true norm is measured in float64 on the real size of input and compared with `liplayers.lipschitz_bound`: over
    few inputs and many outputs and the reverse, odd and not square images, kernels, strides, paddings, with and without
    bias; with raw parameters at extreme scales, of rank near one, zero, and trained to exceed the bound. The contract:
    signature, repr, state, copies, casts, caches, gradients, half precision, freezing. It takes seconds, on the CPU,
    and leaves random numbers as they were.

    Arguments as for `checks`. An audit that passes is no proof.

    Returns:
        What each check measured; `print` shows a table. What a constructor refuses with an ArgumentError is noted.

    Raises:
        AuditError: the layer fails; one line for each check, with its configuration and what was measured.

    >>> from liplayers import AOLLinear
    >>> print(audit(AOLLinear, "linear"))  # doctest: +ELLIPSIS
    layer      check ...
    AOLLinear  norm  ...
    ... passed, 0 refused by the constructor, 0 failed
    """
    found = Audit(tuple(check.run() for check in checks(layer, role, orthogonal=orthogonal)))
    if found.failed:
        lines = "\n".join(map(str, found.failed))
        raise AuditError(f"{len(found.failed)} of {len(found.findings)} checks failed\n{lines}")
    return found
