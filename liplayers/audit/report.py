"""The tables and the plot of an audit."""

from __future__ import annotations

from liplayers.audit.audit import Audit
from liplayers.certification.report import label_plot
from liplayers.extras import extra
from liplayers.text import printable

with extra("train"):
    from matplotlib.figure import Figure
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

__all__ = ["audit_figure", "audit_table"]


def audit_table(audit: Audit, title: str = "audit") -> Group:
    """Two tables: accuracy at each ε, certified and under attack; what was tried against the certificates.

    >>> from liplayers.audit.audit import RobustAccuracy
    >>> audit = Audit(4, 1.0, (RobustAccuracy(0.5, 0.5, 0.75, 0.75),), 4, 0, 0.99, 56, 30, 0, 50, 9, {0.5: 1.2}, ())
    >>> [table.row_count for table in audit_table(audit).renderables]
    [1, 5]
    """
    accuracy = Table(
        title=Text(printable(title), "table.title"), caption="accuracy in %; balls are not clipped to a range of pixels"
    )
    for heading in ("ε", "certified", "under PGD", "under APGD"):
        accuracy.add_column(heading, justify="right", no_wrap=True)
    for row in audit.rows:
        accuracy.add_row(f"{row.eps:.4g}", *(f"{100 * share:.2f}" for share in (row.certified, row.pgd, row.apgd)))
    checks = Table(caption="nothing was refuted" if audit.holds else "REFUTED: these certificates are not proofs")
    for heading in ("against the certificates", "tried", "fallen"):
        checks.add_column(heading, justify="left" if heading.startswith("against") else "right")
    checks.add_row("certified points, attacked at their radius", str(audit.certified), str(audit.certified_fallen))
    near = f"{audit.boundary_certified} of {audit.boundary}"
    checks.add_row("points near the boundary with a radius: rounding", near, str(audit.boundary_fallen))
    naive = f"{audit.naive_certified} of {audit.boundary}"
    checks.add_row("for comparison: radii without rounding", naive, str(audit.naive_fallen))
    checks.add_row(
        "largest slope of a margin / its constant",
        f"{audit.margin_ratio:.6f}",
        "" if audit.margin_ratio <= 1 else "above 1",
    )
    for level, value in audit.headroom.items():
        checks.add_row(f"headroom / radius, {100 * level:g} % quantile", f"{value:.4f}", "")
    return Group(accuracy, checks)


def audit_figure(audit: Audit, title: str = "", unit: str = "pixels in [0, 1]") -> Figure:
    """Certified accuracy and accuracy under attack over ε, from the clean accuracy at 0."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    rows = sorted(audit.rows, key=lambda row: row.eps)
    x = [0.0, *(row.eps for row in rows)]
    for label, style, values in (
        ("under PGD", "o-", [row.pgd for row in rows]),
        ("under APGD", "o--", [row.apgd for row in rows]),  # often the same
        ("certified", "o-", [row.certified for row in rows]),
    ):
        axes.plot(x, [100 * value for value in (audit.clean_accuracy, *values)], style, label=label)
    axes.set(ylabel="accuracy (%)", ylim=(0, 100))
    axes.grid(alpha=0.3)
    label_plot(axes, title, unit)
    return figure
