"""``hdrq merge --add``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hdrq.cli.terminal import console, progress_bar


def add_to_file(
    files: Sequence[Path],
    add: Sequence[Path],
    out: Path | None,
    settings: dict[str, Any],
    report: Path | None,
    as_json: bool,
) -> None:
    """Add changes to the one model in ``files``, as the options of ``hdrq merge`` say, and print what is kept."""
    from hdrq.checkpoint.files import write_atomically
    from hdrq.evaluate.files import load_as_calibrated
    from hdrq.merging.adding import add_file
    from hdrq.merging.changes import listed_changes
    from hdrq.report.tables import added_table

    if len(files) != 1:
        raise ValueError(f"files must be one model with --add, got {len(files)}; merge them before, or after")
    minus, scale, alpha, data = (settings.pop(name) for name in ("minus", "scale", "alpha", "data"))
    changes = listed_changes(add, minus, scale, alpha)
    resize, crop, samples = (settings.pop(name) for name in ("resize", "crop", "samples"))
    calibration = None if data is None else load_as_calibrated(files[0], data, samples, resize, crop)
    with progress_bar("adding") as show:
        found = add_file(files[0], changes, out, calibration=calibration, progress=show, **settings)
    text = json.dumps(found.as_dict(), indent=2)
    if report is not None:
        report.mkdir(parents=True, exist_ok=True)
        write_atomically(report / "added.json", text + "\n")
    print(text) if as_json else console.print(added_table(found))
