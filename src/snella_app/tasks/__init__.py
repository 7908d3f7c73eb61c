"""Tasks, the values of `--task`: models, losses, metrics and predictions."""

from collections.abc import Sequence
from typing import Any

from snella_app.tasks.classification import ClassificationTask, OrdinalTask
from snella_app.tasks.multilabel import MultiLabelTask
from snella_app.tasks.regression import RegressionTask
from snella_app.tasks.segmentation import SegmentationTask
from snella_app.tasks.task import ResultTable, Task, check_monitor
from snella_app.text import nearest

__all__ = [
    "ClassificationTask",
    "MultiLabelTask",
    "OrdinalTask",
    "RegressionTask",
    "ResultTable",
    "SegmentationTask",
    "Task",
    "check_monitor",
    "create_task",
    "task_class",
    "task_names",
]

_TASKS: dict[str, type[Task]] = {
    task.name: task for task in (ClassificationTask, MultiLabelTask, OrdinalTask, RegressionTask, SegmentationTask)
}


def task_names() -> list[str]:
    """Return the names of all tasks."""
    return list(_TASKS)


def task_class(name: str) -> type[Task]:
    """Return the class of a task.

    Raises:
        ValueError: If the task is unknown; the message suggests the nearest name.
    """
    if name not in _TASKS:
        raise ValueError(f"task must be one of {', '.join(_TASKS)}, got {name!r}{nearest(name, _TASKS)}")
    return _TASKS[name]


def create_task(name: str, classes: Sequence[str], **settings: Any) -> Task:
    """Create a task.

    Args:
        name: One of `task_names()`.
        classes: Class names by index, or target names of a regression.
        **settings: Settings of a run, or the state of a finished run; settings of other tasks are ignored.

    Raises:
        ValueError: If the task is unknown or a setting is invalid.
    """
    return task_class(name).create(classes, **settings)
