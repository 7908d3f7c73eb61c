"""Tasks: batches, models, losses, metrics and results of classification and segmentation."""

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
