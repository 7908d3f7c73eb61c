"""What a batch is, its loss and its metrics, one file a task."""

from snella.tasks.classification import ClassificationTask

__all__ = ["ClassificationTask"]
