"""Tasks (the values of `--task`), which define models, losses, metrics, and predictions."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from snella_app.tasks.classification import ClassificationTask, OrdinalTask
from snella_app.tasks.multilabel import MultiLabelTask
from snella_app.tasks.regression import RegressionTask
from snella_app.tasks.segmentation import SegmentationTask
from snella_app.tasks.task import Task as Task
from snella_app.text import nearest

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (ClassificationTask, MultiLabelTask, OrdinalTask, RegressionTask, SegmentationTask)
}


def task_class(name: str) -> type[Task]:
    """Return the class of a task.

    Raises:
        ValueError: If the task is unknown; the message suggests a similar name, if there is one.
    """
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}{nearest(name, TASKS)}")
    return TASKS[name]


def create_task(name: str, classes: Sequence[str], **settings: Any) -> Task:
    """Create a task.

    Args:
        name: Key of `TASKS`.
        classes: Class names by index, or target names of a regression.
        **settings: Settings of a run, or the state of a finished run. Settings of other tasks are ignored; None selects
            the default. The values are checked by `TrainConfig`.

    Raises:
        ValueError: If the task is unknown, or the number of classes or the length of a list is invalid.
    """
    task: type[Any] = task_class(name)
    settings["loss_name"] = settings.get("loss") if task.losses else None
    arguments: dict[str, Any] = {}
    for field in fields(task):
        value = settings.get(field.name)
        if value is not None:
            arguments[field.name] = tuple(value) if isinstance(value, list) else value
    return task(tuple(classes), **arguments)
