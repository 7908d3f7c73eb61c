"""Regression of one or several targets, which are standardized for training."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from PIL import Image
from rich.table import Table
from torch import Tensor

from snella.ops import widest_dtype
from snella_app.console import make_table
from snella_app.data.datasets import ImageDataset
from snella_app.records.predictions import NumberPredictions, StoredNumberPrediction
from snella_app.tasks.linear_fit import feature_scale
from snella_app.tasks.predictions import NumberPrediction, check_output
from snella_app.tasks.task import Task, full_precision, paired, weighted_mean

NUMBER_LOSSES: dict[str, Callable[..., Tensor]] = {"mse": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}
"""Losses on standardized targets, by value of `--loss`. The Huber loss is quadratic for errors up to one standard
deviation."""
_RIDGE_PENALTY = 5.0
"""Weight of `‖w‖²` relative to the summed squared errors, for features with mean variance 1."""
_MAX_FLOAT32_RATIO = 1e4
"""Ratio of mean to standard deviation above which float32 rounds targets by about 1e-3 standard deviations or more."""


_FORMATS_OF_SEVERAL_TARGETS = {
    "epoch_format": "R² {val_r2:.4f}",
    "val_format": "R² {r2:.4f}",
    "test_format": "R² {r2:.4f}",
    "result_format": "R² {r2:.4f}, loss {loss:.4f}",
}
"""Formats without MAE and RMSE, which cannot be averaged over targets with different units."""


@dataclass(frozen=True)
class RegressionTask(Task):
    """Loss and metrics for one or several regression targets per image.

    The model predicts `(y - mean) / std`, with the mean and standard deviation of the training targets. Predictions,
    metrics and files use `y`.

    Args:
        names: Target names.
        loss_name: One of `losses`, on standardized targets.
        monitor: Metric for epoch selection.
        mean: Training mean of each target; set by `fitted`.
        std: Training standard deviation of each target, 1 for constant targets; set by `fitted`.
        median: Training median of each target, the baseline for the absolute error; set by `fitted`.
    """

    names: tuple[str, ...]
    loss_name: str = "mse"
    monitor: str = "loss"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    median: tuple[float, ...] = ()

    name: ClassVar[str] = "regression"
    target: ClassVar[Any] = "numbers"
    augment: ClassVar[str] = "flip"
    settings: ClassVar[tuple[str, ...]] = ("loss",)
    outputs_name: ClassVar[str] = "numbers"
    losses: ClassVar[tuple[str, ...]] = tuple(NUMBER_LOSSES)
    monitors: ClassVar[Mapping[str, int]] = {"loss": -1, "mae": -1, "rmse": -1, "r2": 1}
    has_linear_fit: ClassVar[bool] = True
    final_name: ClassVar[str] = "numbers"
    epoch_format: ClassVar[str] = "MAE {val_mae:.4g}  RMSE {val_rmse:.4g}  R² {val_r2:.4f}"
    val_format: ClassVar[str] = "MAE {mae:.4g} (R² {r2:.4f})"
    test_format: ClassVar[str] = val_format
    result_format: ClassVar[str] = "MAE {mae:.4g}, RMSE {rmse:.4g}, R² {r2:.4f}, loss {loss:.4f}"

    def __post_init__(self) -> None:
        """Check the statistics and set missing ones to their defaults."""
        count = len(self.names)
        if not count:
            raise ValueError("names must have at least one entry, got none")
        for name, default in (("mean", 0.0), ("std", 1.0), ("median", 0.0)):
            values = getattr(self, name)
            if values and len(values) != count:
                raise ValueError(f"{name} must have one value for each of {count} targets, got {len(values)}")
            if not values:
                object.__setattr__(self, name, (default,) * count)
        if count > 1:
            for name, text in _FORMATS_OF_SEVERAL_TARGETS.items():
                object.__setattr__(self, name, text)

    def encode(self, target: Any) -> Tensor:
        """Return the targets, `[targets]`, float64."""
        return torch.tensor(target if isinstance(target, tuple | list) else [target], dtype=torch.float64)

    def fitted(self, train: ImageDataset) -> Self:
        """Return the task with the mean, standard deviation, and median of the training targets.

        Raises:
            ValueError: If `monitor` is an error in the targets' units, although there are several targets.
        """
        if len(self.names) > 1 and self.monitor in ("mae", "rmse"):
            raise ValueError(f"monitor must be loss or r2 with several targets, got {self.monitor!r}")
        values = self._values(train)
        std = np.where(np.ptp(values, 0) > 0, values.std(0), 1.0)  # rounding can make the std of equal values positive
        return dataclasses.replace(
            self,
            mean=tuple(values.mean(0).tolist()),
            std=tuple(std.tolist()),
            median=tuple(np.median(values, 0).tolist()),
        )

    def state(self) -> dict[str, Any]:
        """Return the means, standard deviations, and medians."""
        return {"mean": list(self.mean), "std": list(self.std), "median": list(self.median)}

    def loss(self, outputs: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Compute the weighted mean loss of the standardized targets.

        loss = 1/n Σ_i v_i 1/T Σ_t e(z[i, t], (y[i, t] - mean_t) / std_t),   e: squared, absolute, or Huber error

        `outputs` z and `labels` y are `[batch, targets]`; `weights` are the sample weights v.
        """
        outputs = full_precision(outputs)
        targets = self.standardized(labels).to(outputs)
        return weighted_mean(NUMBER_LOSSES[self.loss_name](outputs, targets, reduction="none").mean(-1), weights)

    def standardized(self, values: Tensor) -> Tensor:
        """Standardize targets, `(y - mean) / std`, `[batch, targets]`, in float64 if the device has it."""
        mean, std = self._statistics(values.device)
        return (values.to(mean.dtype) - mean) / std

    def numbers(self, outputs: Tensor) -> Tensor:
        """Convert outputs to target units, `z · std + mean`, `[batch, targets]`, in float64 if the device has it."""
        mean, std = self._statistics(outputs.device)
        return outputs.to(mean.dtype) * std + mean

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the means and standard deviations, each `[targets]`, of dtype `widest_dtype(device.type)`.

        Raises:
            ValueError: If the device has no float64 and a mean exceeds `_MAX_FLOAT32_RATIO` standard deviations.
        """
        dtype = widest_dtype(device.type)
        for name, mean, std in zip(self.names, self.mean, self.std, strict=True):
            if dtype == torch.float32 and abs(mean) > _MAX_FLOAT32_RATIO * std:
                raise ValueError(
                    f"device {device.type} has no float64, which target {name!r} with mean {mean:g} and standard "
                    f"deviation {std:g} requires; subtract a constant from the labels, or use --device cpu"
                )
        return torch.tensor(self.mean, dtype=dtype, device=device), torch.tensor(self.std, dtype=dtype, device=device)

    def final_outputs(self, outputs: Tensor, temperature: float = 1.0) -> Tensor:
        """Return predictions in target units, `[batch, targets]`, float32."""
        return self.numbers(outputs).float()

    def average_outputs(self, outputs: Sequence[Tensor], tasks: Sequence[Any] | None = None) -> Tensor:
        """Average the models' predictions in target units, and standardize them with this task's statistics."""
        pairs = zip(tasks or [self] * len(outputs), outputs, strict=True)
        numbers = [task.numbers(output) for task, output in pairs]
        return self.standardized(torch.stack(numbers).mean(0))

    def metrics(self, outputs: ArrayLike, labels: ArrayLike) -> dict[str, Any]:
        """Compute the errors of each target in its unit, its R², and the means over targets.

        mae = mean |p - y|,   rmse = sqrt(mean (p - y)²),   r2 = 1 - Σ (p - y)² / Σ (y - mean y)²

        The baselines predict the training median (absolute error) or mean (squared error). The loss is the mean squared
        error of the standardized targets, regardless of the training loss. R² of constant targets is NaN and excluded
        from the mean, which is NaN if all are constant.

        Args:
            outputs: Standardized predictions, `[images, targets]`.
            labels: `[images, targets]`, in target units.
        """
        from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error  # lazy: slow import

        scores, truth = paired(outputs, np.asarray(labels, dtype=float))
        predicted = self.numbers(scores).numpy()
        by_target = {"multioutput": "raw_values"}
        mae = mean_absolute_error(truth, predicted, **by_target)
        rmse = root_mean_squared_error(truth, predicted, **by_target)
        is_varying = np.ptp(truth, 0) > 0
        r2 = np.full(len(self.names), np.nan)
        if is_varying.any():
            r2[is_varying] = r2_score(truth[:, is_varying], predicted[:, is_varying], **by_target)
        squares = (scores.double() - self.standardized(torch.as_tensor(truth))).square()
        median_errors = truth - np.asarray(self.median)
        mean_errors = truth - np.asarray(self.mean)
        per_target = [
            {
                "name": name,
                "mae": float(mae[t]),
                "rmse": float(rmse[t]),
                "r2": float(r2[t]),
                "mean": float(truth[:, t].mean()),
                "baseline_mae": float(np.abs(median_errors[:, t]).mean()),
                "baseline_rmse": float(np.sqrt((mean_errors[:, t] ** 2).mean())),
            }
            for t, name in enumerate(self.names)
        ]
        return {
            "mae": float(mae.mean()),
            "rmse": float(rmse.mean()),
            "r2": float(r2[is_varying].mean()) if is_varying.any() else float("nan"),
            "images": len(truth),
            "loss": float(squares.mean(-1).mean()),
            "per_target": per_target,
        }

    def sample_outputs(self, reduced: ArrayLike) -> Tensor:
        """Return predictions in target units, `[images, targets]`."""
        return self.numbers(torch.as_tensor(np.asarray(reduced)))

    def predictions(self, dataset: ImageDataset, sample_outputs: Tensor, split: str, folder: Path) -> NumberPredictions:
        """Return the true and predicted values of each image."""
        rows = zip(dataset.names, self._values(dataset).tolist(), sample_outputs.tolist(), strict=True)
        items: list[StoredNumberPrediction] = []
        for index, (name, values, predicted) in enumerate(rows):
            rounded = [float(f"{number:.7g}") for number in predicted]
            items.append(StoredNumberPrediction(index, name, values, rounded))
        return NumberPredictions(split, items=items)

    def fit_linear(
        self, features: np.ndarray, labels: np.ndarray, outputs: int, weights: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor]:
        """Fit a ridge regression of the standardized targets."""
        from sklearn.linear_model import Ridge  # lazy: slow import

        scale = feature_scale(features)
        ridge = Ridge(alpha=_RIDGE_PENALTY)
        ridge.fit(features / scale, self.standardized(torch.as_tensor(labels)).numpy(), sample_weight=weights)
        return torch.from_numpy(np.atleast_2d(ridge.coef_) / scale), torch.from_numpy(np.atleast_1d(ridge.intercept_))

    def remap_labels(self, label: Tensor, numbers: Sequence[int]) -> Tensor:
        """Put the targets into the run's order.

        Raises:
            ValueError: If the data lacks a target.
        """
        if sorted(numbers) != list(range(len(self.names))):
            missing = [name for index, name in enumerate(self.names) if index not in numbers]
            raise ValueError(f"data must have all targets of the run, got none for {', '.join(map(repr, missing))}")
        mapped = torch.empty_like(label)
        mapped[list(numbers)] = label
        return mapped

    def result_table(self, scores: Mapping[str, Any]) -> Table:
        """Return the errors and R² of each target, and the errors of its baselines (training median or mean)."""
        keys = ("mae", "rmse", "r2", "baseline_mae", "baseline_rmse")
        rows: list[list[str]] = []
        for row in scores["per_target"]:
            values = [f"{row[key]:.4g}" for key in keys]
            rows.append([row["name"], *values])
        columns = ["target", "MAE", "RMSE", "R²", "baseline MAE", "baseline RMSE"]
        return make_table(columns, rows, title="targets")

    def image_predictions(
        self, paths: Sequence[Path], images: Sequence[Image.Image], outputs: Tensor
    ) -> list[NumberPrediction]:
        """Return the predicted values of each image."""
        return [
            NumberPrediction(path, dict(zip(self.names, row, strict=True)))
            for path, row in zip(paths, self.numbers(outputs).cpu().tolist(), strict=True)
        ]

    @staticmethod
    def check_output(out: str | Path | None, top_k: int | None, *, overwrite: bool) -> None:
        """Check the output file, and that `top_k` is not set."""
        if top_k is not None:
            raise ValueError(f"top_k must be omitted for regression, got {top_k}")
        check_output(out, top_k, overwrite=overwrite)

    def decoding_comment(self, outputs: str) -> str:
        """Return a comment with code that converts outputs to target units."""
        mean = [float(f"{value:.7g}") for value in self.mean]
        std = [float(f"{value:.7g}") for value in self.std]
        return f"# {outputs}[0] * torch.tensor({std}) + torch.tensor({mean})"

    def _values(self, dataset: ImageDataset) -> np.ndarray:
        """Return the targets of each image, `[images, targets]`."""
        targets: Sequence[Any] = dataset.annotations.targets or []
        rows = [target if isinstance(target, tuple | list) else (target,) for target in targets]
        return np.asarray(rows, float)
