"""`TaskBank`: many tasks on one backbone, with batches that mix tasks.

The effective weight of a layer is its pre-trained weight plus the update of a task. A merge computes the effective
weights of all layers that the task updates.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Lock, RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from snella.kernels import Factors
from snella.layer import SnellaLayer
from snella.merge import MergeCache, write_effective_weight
from snella.update import Update
from snella_app.data.images import check_shape, read_image
from snella_app.device import choose_device
from snella_app.methods import merge_trained
from snella_app.methods.model_parts import base_model
from snella_app.runs.model import LoadedRun, check_batch_size, load_single_run, make_backbone

_MIB = 2**20
_MAX_REPLACED = 0.25  # maximum fraction of the backbone that a task may replace, e.g. its head, tokens, and norms


@dataclass
class _Update:
    """Update that a task makes to one weight.

    Attributes:
        update: Factors and options of the update.
        base: Pre-trained weight of the bank's backbone.
        is_transposed: True if the layer stores its weight as `[in, out]`.
        cache: Cached values for merging.
    """

    update: Update
    base: Tensor
    is_transposed: bool
    cache: MergeCache = field(default_factory=MergeCache)


@dataclass
class _Task:
    """Task of a bank.

    Attributes:
        loaded: Run of the task, with the model of the bank.
        updates: Updates by parameter name.
        replaced: New values of the tensors that the task replaces entirely, e.g. those of the head, by name.
    """

    loaded: LoadedRun
    updates: dict[str, _Update]
    replaced: dict[str, Tensor]


class TaskBank:
    """Bank of SNELLA runs that share one backbone.

        bank = TaskBank({"cells": "runs/cells", "stamps": "runs/stamps"}, memory_mib=512)
        outputs = bank(images, ["cells", "stamps", "cells"])

    The bank stores the backbone once, the factors and head of each task (a few MiB), and the effective weights of the
    most recently used tasks, up to `memory_mib`. A cached task needs no merge. Any other task needs one merge, which
    replaces the effective weights of the least recently used tasks if the memory is full. The images of a batch are
    grouped by task. The outputs of each group are bit-identical to the outputs of the loaded run for this group.
    Several threads may use a bank at the same time.

    Args:
        runs: Run folders, by task name.
        memory_mib: Memory for effective weights, in MiB.
        device: `"auto"`, or a torch device such as `"cpu"`, `"cuda:1"` or `"mps"`.

    Raises:
        FileNotFoundError: If a folder is not a run folder, or has no adapter yet.
        ValueError: If runs differ in backbone, image size, pre-trained weights, or task type; if the effective weights
            of a task exceed `memory_mib`; if a run is damaged or a cross-validation run; if `memory_mib` is not
            positive; or if the device is not available.
        NotImplementedError: If a run changes the architecture, or changes more than a quarter of the backbone by means
            other than SNELLA factors, e.g. by LoRA.
    """

    def __init__(
        self, runs: Mapping[str, str | Path] | None = None, *, memory_mib: float = 1024.0, device: str = "auto"
    ) -> None:
        if not memory_mib > 0:  # also for NaN
            raise ValueError(f"memory_mib must be greater than 0, got {memory_mib}")
        self._limit = memory_mib * _MIB
        self._device = choose_device(device)
        self._model: nn.Module | None = None
        self._key: dict[str, Any] = {}
        self._tasks: dict[str, _Task] = {}
        self._cached: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._lock = RLock()
        self._add_lock = Lock()
        self.merges = 0
        """Number of computed merges."""
        for name, run in (runs or {}).items():
            self.add(name, run)

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        with self._lock:
            return list(self._tasks)

    @property
    def cached_tasks(self) -> list[str]:
        """Names of the tasks whose effective weights are in memory. The most recently used task is last."""
        with self._lock:
            return list(self._cached)

    @property
    def cached_bytes(self) -> int:
        """Size of the effective weights in memory, in bytes."""
        with self._lock:
            return sum(_bytes(weights.values()) for weights in self._cached.values())

    def classes(self, task: str) -> list[str]:
        """Return the class names of a task in the order of its outputs; raise ValueError for an unknown task."""
        return list(self._find(task).loaded.classes)

    def add(self, name: str, run: str | Path) -> None:
        """Add or replace a task.

        Args:
            name: Name of the task.
            run: Folder of its run.

        Raises:
            FileNotFoundError: If `run` is not a run folder, or has no adapter yet.
            ValueError: If the run and the bank differ in backbone, image size, pre-trained weights, or task type; if
                the run's effective weights exceed `memory_mib`; or if the run is damaged or a cross-validation run.
            NotImplementedError: If the run changes the architecture, or changes more than a quarter of the backbone by
                means other than SNELLA factors.
        """
        loaded = load_single_run(run, "cpu")
        with self._add_lock:  # otherwise, two threads could build a backbone each
            self._add(name, run, loaded)

    def _add(self, name: str, run: str | Path, loaded: LoadedRun) -> None:
        """Add or replace the task of a loaded run, while no other thread adds one."""
        backbone = loaded.info.backbone
        bank_key: dict[str, Any] = {
            "backbone": backbone.name,
            "weights": backbone.weights,
            "img_size": backbone.img_size,
            "task": loaded.task.name,
            "seed": backbone.seed if backbone.pretrained is False else None,  # determines random weights
        }
        with self._lock:  # while another thread predicts, the model has the weights of a task
            self._check_key(run, bank_key)
            base = make_backbone(backbone, loaded.task.name) if self._model is None else self._model
            base = base.to(self._device).eval()
            tensors = base.state_dict(keep_vars=True)
        updates = _collect_updates(loaded.model.to(self._device))
        for key, update in updates.items():
            if key not in tensors or not torch.equal(update.base, tensors[key]):
                raise ValueError(
                    f"run={run} was trained from weights that differ from the bank's in {key!r}; all runs of a bank "
                    "need the same pre-trained weights"
                )
            update.base = tensors[key].detach()  # the run's own copy can be freed
        merged = merge_trained(loaded.model).state_dict()
        replaced = {
            key: tensor.detach()
            for key, tensor in merged.items()
            if key not in updates and not (key in tensors and torch.equal(tensor, tensors[key]))
        }
        max_replaced = _MAX_REPLACED * _bytes(tensors.values())
        if merged.keys() != tensors.keys() or _bytes(replaced.values()) > max_replaced:
            raise NotImplementedError(
                f"run={run} must store its update as SNELLA factors for a bank, got method {loaded.info.method!r}; "
                "load this run separately"
            )
        required = _bytes(update.base for update in updates.values())
        if required > self._limit:
            raise ValueError(
                f"memory_mib must be at least {required / _MIB:.1f} for the effective weights of {run}, got "
                f"{self._limit / _MIB:.1f}"
            )
        with self._lock:
            self._model = base
            self._key = bank_key
            self._cached.pop(name, None)
            probe = None if loaded.probe is None else loaded.probe.with_model(base).to(self._device).eval()
            self._tasks[name] = _Task(replace(loaded, model=base, probe=probe), updates, replaced)

    def remove(self, name: str) -> None:
        """Remove a task and its cached weights; raise ValueError for an unknown task."""
        with self._lock:
            self._find(name)
            del self._tasks[name]
            self._cached.pop(name, None)
            if not self._tasks:
                self._model = None  # the next task may have a different backbone

    def __call__(self, images: Tensor | Sequence[Tensor], tasks: Sequence[str]) -> list[Tensor]:
        """Compute the outputs for images of different tasks.

        Args:
            images: `[n, C, H, W]`, or `n` images, each preprocessed by the transform of its task.
            tasks: Task name of each image.

        Returns:
            Outputs for each image in input order: `[outputs]`, or `[classes, H, W]` for masks.

        Raises:
            ValueError: If a task is unknown, or the number of tasks differs from the number of images.
            TypeError: If `tasks` is a string.
        """
        outputs: dict[int, Tensor] = {}
        for name, indices in self._groups(tasks, len(images)):
            batch = torch.stack([images[index] for index in indices])
            outputs.update(zip(indices, self._run(name, batch), strict=True))
        return [outputs[index] for index in range(len(images))]

    def predict(self, images: Sequence[str | Path], tasks: Sequence[str], *, batch_size: int = 32) -> list[Any]:
        """Return the predictions for image files of different tasks.

        Args:
            images: Image files.
            tasks: Task name of each image.
            batch_size: Batch size.

        Returns:
            Predictions in input order, as `Predictor.predict` returns them for the run of each task.

        Raises:
            ValueError: As for `__call__`, or if an image cannot be read or `batch_size` is less than 1.
        """
        check_batch_size(batch_size)
        if isinstance(images, (str, Path)):
            raise TypeError(f"images must be a list of files, got {str(images)!r}")
        predictions: dict[int, Any] = {}
        for name, indices in self._groups(tasks, len(images)):
            loaded = self._find(name).loaded
            for start in range(0, len(indices), batch_size):
                batch_indices = indices[start : start + batch_size]
                paths = [Path(images[index]) for index in batch_indices]
                decoded = [read_image(path, loaded.reading) for path in paths]
                for image, path in zip(decoded, paths, strict=True):
                    check_shape(image, path)
                batch = torch.stack([loaded.transform(image) for image in decoded])
                outputs = loaded.task.outputs(partial(self._run, name), batch, loaded.info.tta)
                outputs = outputs / loaded.info.temperature
                batch_predictions = loaded.task.image_predictions(paths, decoded, outputs)
                predictions.update(zip(batch_indices, batch_predictions, strict=True))
        return [predictions[index] for index in range(len(images))]

    def _groups(self, tasks: Sequence[str], num_images: int) -> list[tuple[str, list[int]]]:
        """Group image indices by task, with cached tasks first, because merging other tasks could evict them."""
        if isinstance(tasks, str):
            raise TypeError(f"tasks must be a list of names, one per image, got {tasks!r}")
        if len(tasks) != num_images:
            raise ValueError(f"tasks must have one name per image, got {len(tasks)} names for {num_images} images")
        groups: dict[str, list[int]] = {}
        for index, name in enumerate(tasks):
            groups.setdefault(name, []).append(index)
        for name in groups:
            self._find(name)
        cached = self.cached_tasks
        return sorted(groups.items(), key=lambda group: group[0] not in cached)

    def _find(self, name: str) -> _Task:
        """Return a task by name; raise ValueError if it is unknown."""
        with self._lock:
            if name not in self._tasks:
                raise ValueError(f"task must be one of {', '.join(self._tasks) or '(none yet)'}, got {name!r}")
            return self._tasks[name]

    def _check_key(self, run: str | Path, key: dict[str, Any]) -> None:
        """Raise ValueError if a run cannot share the backbone of the bank. The caller holds the lock."""
        if not self._tasks or key == self._key:
            return
        pairs = [(name, value, self._key[name]) for name, value in key.items() if value != self._key[name]]
        different = ", ".join(f"{name} {value!r} instead of {shared!r}" for name, value, shared in pairs)
        raise ValueError(
            f"run={run} must have the backbone and task of the bank, got {different}; create another bank for it"
        )

    def _run(self, name: str, batch: Tensor) -> Tensor:
        """Compute the outputs for one task. The lock protects the model, which all tasks share."""
        with self._lock:
            task = self._find(name)
            loaded = task.loaded
            tensors = {**self._effective_weights(name), **task.replaced}
            if loaded.probe is not None:  # the probe contains the model as `model`
                tensors = {f"model.{key}": tensor for key, tensor in tensors.items()}
            with torch.inference_mode():
                outputs: Tensor = functional_call(loaded.network, tensors, (batch.to(self._device),))
        return outputs

    @torch.no_grad()
    def _effective_weights(self, name: str) -> dict[str, Tensor]:
        """Return the effective weights of a task, after computing them if necessary. The caller holds the lock."""
        if name in self._cached:
            self._cached.move_to_end(name)
            return self._cached[name]
        task = self._tasks[name]
        required = _bytes(update.base for update in task.updates.values())
        evicted: dict[str, Tensor] = {}
        while self._cached and self.cached_bytes + required > self._limit:
            _, evicted = self._cached.popitem(last=False)
        weights = {}
        for key, entry in task.updates.items():
            base = entry.base
            out = evicted[key] if key in evicted else torch.empty_like(entry.base)
            weights[key] = out
            if entry.is_transposed:
                base, out = base.T, out.T
            write_effective_weight(base, entry.update, out, entry.cache)
        self.merges += 1
        self._cached[name] = weights
        return weights


def _collect_updates(model: nn.Module) -> dict[str, _Update]:
    """Return the updates in an adapted model, by the name of the updated weight in the backbone."""
    updates = {}
    for name, layer in base_model(model).named_modules():
        if isinstance(layer, SnellaLayer):
            update = layer.get_update("default")
            factors: list[Any] = [None if tensor is None else tensor.detach() for tensor in update.factors]
            base: Any = layer.get_base_layer()
            update = update._replace(factors=Factors(*factors))
            updates[layer.weight_name(name)] = _Update(update, base.weight.detach(), isinstance(base, Conv1D))
    return updates


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Return the size of tensors in bytes."""
    return sum(tensor.nbytes for tensor in tensors)
