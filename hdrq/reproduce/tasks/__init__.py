"""Tasks of multi-target domain adaptation: a labelled source, targets without labels, and a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hdrq import checks
from hdrq.reproduce.tasks.digits import DIGITS, DIGITS_SAM
from hdrq.reproduce.tasks.emoji import EMOJI
from hdrq.reproduce.tasks.given import given
from hdrq.reproduce.tasks.segmentation import SEGMENTATION
from hdrq.reproduce.tasks.task import CALIBRATION, Task
from hdrq.reproduce.tasks.vit import DIGITS_VIT

__all__ = ["CALIBRATION", "TASKS", "Task", "files", "remember", "task_of"]

TASKS = {task.name: task for task in (DIGITS, DIGITS_SAM, DIGITS_VIT, EMOJI, SEGMENTATION)}


_FILES: dict[str, Path] = {}  # of settings, by the names of their tasks, which are in TASKS too


def task_of(name: str) -> Task:
    """A task by its name, or by a file of settings (:mod:`hdrq.reproduce.tasks.given`), known by its name from then on.

    Raises:
        FileNotFoundError, TypeError, ValueError: there is none, or the file's settings are wrong.
    """
    if not name.endswith((".yaml", ".yml")):
        return TASKS[checks.choice("task", name, tuple(TASKS))]
    path = Path(name).resolve()
    if path.stem in TASKS and _FILES.get(path.stem) != path:
        raise ValueError(f"a file of settings must have a name that no other task has, got {path}")
    task = TASKS[path.stem] = given(path)
    _FILES[path.stem] = path
    return task


def files() -> list[str]:
    """The files of settings that are known: :func:`remember` makes another process know them."""
    return [str(path) for path in _FILES.values()]


def remember(paths: Sequence[str]) -> None:
    """Know the tasks of files of settings by their names."""
    for path in paths:
        task_of(path)
