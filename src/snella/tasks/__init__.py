"""Tasks: batches, models, losses, metrics and results of classification, numbers and segmentation."""

from snella.tasks.classification import ClassificationTask
from snella.tasks.multilabel import MultiLabelTask
from snella.tasks.ordinal import OrdinalTask
from snella.tasks.registry import create_task, task_class, task_names
from snella.tasks.regression import RegressionTask
from snella.tasks.segmentation import SegmentationTask
from snella.tasks.task import ResultTable, Task, check_monitor

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
