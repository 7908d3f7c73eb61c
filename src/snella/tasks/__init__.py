"""What a batch is, which model fits, loss, metrics and how results read: one file a task."""

from snella.tasks.classification import ClassificationTask
from snella.tasks.registry import create_task, task_class, task_names
from snella.tasks.segmentation import SegmentationTask
from snella.tasks.task import ResultTable, Task

__all__ = [
    "ClassificationTask",
    "ResultTable",
    "SegmentationTask",
    "Task",
    "create_task",
    "task_class",
    "task_names",
]
