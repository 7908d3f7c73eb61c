"""Tasks by the names of `--task`: batches, models, losses, metrics and results of classes, numbers and masks."""

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
    """Names that `task_class` knows."""
    return list(_TASKS)


def task_class(name: str) -> type[Task]:
    """The class of a task.

    Raises:
        ValueError: No such task; the nearest is given.
    """
    if name not in _TASKS:
        raise ValueError(f"task must be one of {', '.join(_TASKS)}, got {name!r}{nearest(name, _TASKS)}")
    return _TASKS[name]


def create_task(name: str, classes: Sequence[str], **settings: Any) -> Task:
    """Make a task for some classes.

    Args:
        name: One of `task_names()`.
        classes: Names by number, of a regression those of its numbers.
        **settings: Settings of a run, or the state of a finished one; the task takes its own.

    Raises:
        ValueError: No such task, or values that it refuses.
    """
    return task_class(name).create(classes, **settings)
