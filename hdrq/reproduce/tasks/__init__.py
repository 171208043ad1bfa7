"""Tasks of multi-target domain adaptation: a labelled source, targets without labels, and a network."""

from __future__ import annotations

from hdrq import checks
from hdrq.reproduce.tasks.digits import DIGITS
from hdrq.reproduce.tasks.task import CALIBRATION, Task
from hdrq.reproduce.tasks.vit import DIGITS_VIT

__all__ = ["CALIBRATION", "TASKS", "Task", "task_of"]

TASKS = {task.name: task for task in (DIGITS, DIGITS_VIT)}


def task_of(name: str) -> Task:
    """A task by its name.

    Raises:
        ValueError: there is none.
    """
    return TASKS[checks.choice("task", name, tuple(TASKS))]
