"""The table of a comparison."""

from __future__ import annotations

from rich.table import Table

from hdrq.parity.checker import Report


def parity_table(report: Report):
    """What :func:`hdrq.parity.check` compared, as a :class:`rich.table.Table`."""

    result = Table(box=None, title=f"Against the reference, seed {report.seed}, {report.seconds:.0f} s")
    for name in ("op", "backend"):
        result.add_column(name, no_wrap=True)
    for name in ("cases", "elements", "sums", "error"):
        result.add_column(name, justify="right")
    result.add_column("")
    for t in report.tallies:
        counts = f"{t.cases:,}", f"{t.elements:,}", f"{t.sums:,}", f"{t.error:.1e}" if t.sums else ""
        result.add_row(t.op, t.backend, *counts, "[red]differs[/red]" if t.mismatch else "equal")
    return result
