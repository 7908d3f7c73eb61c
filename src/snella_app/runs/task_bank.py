"""`TaskBank`: one backbone, many tasks, and batches whose images belong to any of them."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from snella.backends.base import MergeCache
from snella.functional import write_effective_weight
from snella.layer import Linear, SnellaLayer
from snella.update import Factors, Update
from snella_app.data import read_image
from snella_app.device import choose_device
from snella_app.records import BackboneInfo
from snella_app.runs.merge import merged_model
from snella_app.runs.model import Ensemble, LoadedRun, load_run, make_backbone

_MIB = 2**20
_LARGEST_PART = 0.25  # of a backbone that a task may replace as a whole: heads, tokens, norms


@dataclass
class _Update:
    """The update of one weight of a task, the pre-trained weight, and what writing it again need not find again."""

    update: Update
    base: Tensor
    is_transposed: bool
    cache: MergeCache = field(default_factory=MergeCache)


@dataclass
class _Task:
    """One task: its run with the bank's model in it, the updates by parameter, and what it replaces as a whole."""

    loaded: LoadedRun
    updates: dict[str, _Update]
    replaced: dict[str, Tensor]


class TaskBank:
    """One backbone that serves many tasks, each a run of SNELLA on it.

        bank = TaskBank({"cells": "runs/cells", "stamps": "runs/stamps"}, memory_mib=512)
        outputs = bank(images, ["cells", "stamps", "cells"])

    In memory are the backbone once, the factors and the head of each task (a few MiB), and the effective weights
    `W0 + scaling·S` of the tasks used last, as many as `memory_mib` allows. Another task costs one merge into the
    memory of the task that was not used for longest; one that is still there costs nothing. Images of a batch are
    grouped by task, and each group's outputs have the bits that the loaded run gives for the same group.

    Args:
        runs: Folders of finished runs by the name of the task.
        memory_mib: Memory of all effective weights together, in MiB.
        device: auto, or a device of torch such as cpu, cuda:1 or mps.

    Raises:
        ValueError: Runs of different backbones, or memory for less than one task.
        NotImplementedError: A run whose method keeps whole weights instead of a sparse update's factors.
    """

    def __init__(
        self, runs: Mapping[str, str | Path] | None = None, *, memory_mib: float = 1024.0, device: str = "auto"
    ) -> None:
        if memory_mib <= 0:
            raise ValueError(f"memory_mib must be more than 0, got {memory_mib}")
        self._limit = int(memory_mib * _MIB)
        self._device = choose_device(device)
        self._model: nn.Module | None = None
        self._described: tuple[Any, ...] = ()
        self._tasks: dict[str, _Task] = {}
        self._cached: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._lock = Lock()
        self.merges = 0
        """How often effective weights were computed."""
        for name, run in (runs or {}).items():
            self.add(name, run)

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return list(self._tasks)

    @property
    def cached_tasks(self) -> list[str]:
        """Tasks whose effective weights are in memory, the one used last at the end."""
        return list(self._cached)

    @property
    def cached_bytes(self) -> int:
        """Bytes of all effective weights in memory."""
        return sum(_bytes(weights.values()) for weights in self._cached.values())

    def classes(self, task: str) -> list[str]:
        """Class names of a task, in the order of its outputs.

        Raises:
            ValueError: No such task.
        """
        return list(self._find(task).loaded.classes)

    def add(self, name: str, run: str | Path) -> None:
        """Add a task, or replace it.

        Args:
            name: Of the task.
            run: Folder of its run.

        Raises:
            FileNotFoundError: This is not the folder of a run, or it has no adapter yet.
            ValueError: The run is of another backbone, or its weights need more than `memory_mib`.
            NotImplementedError: Its method keeps whole weights.
        """
        loaded = load_run(run, "cpu")
        if isinstance(loaded.model, Ensemble):
            raise ValueError(f"run={run} is a cross-validation of several models; add one, e.g. {loaded.folder.path}")
        described = _backbone_key(loaded.info.backbone, loaded.task.name)
        if self._tasks and described != self._described:
            raise ValueError(
                f"run={run} has another backbone than the bank: {described} where it has {self._described}; "
                "make a bank for each"
            )
        base = make_backbone(loaded.info.backbone, loaded.task.name) if self._model is None else self._model
        base = base.to(self._device).eval()
        tensors = base.state_dict(keep_vars=True)
        updates = _updates_of(loaded.model.to(self._device))
        for key, one in updates.items():
            if key not in tensors or not torch.equal(one.base, tensors[key]):
                raise ValueError(
                    f"run={run} was trained on other weights in {key!r} than the bank's; runs of one bank need "
                    "the same pre-trained weights"
                )
            one.base = tensors[key].detach()
        plain = merged_model(loaded.model).state_dict()
        replaced = {
            key: tensor.detach()
            for key, tensor in plain.items()
            if key not in updates and not (key in tensors and torch.equal(tensor, tensors[key]))
        }
        is_small = _bytes(replaced.values()) <= _LARGEST_PART * _bytes(tensors.values())
        if plain.keys() != tensors.keys() or not is_small:
            raise NotImplementedError(
                f"run={run} was trained by {loaded.info.method}, which keeps whole weights: a bank holds factors of "
                "SNELLA; load this run on its own"
            )
        need = _bytes(one.base for one in updates.values())
        if need > self._limit:
            raise ValueError(
                f"memory_mib must be at least {need / _MIB:.1f} for the effective weights of {run}, got "
                f"{self._limit / _MIB:.1f}"
            )
        with self._lock:
            self._model, self._described = base, described
            self._cached.pop(name, None)
            probe = None if loaded.probe is None else loaded.probe.on(base).to(self._device).eval()
            self._tasks[name] = _Task(replace(loaded, model=base, probe=probe), updates, replaced)

    def remove(self, name: str) -> None:
        """Take a task out, with everything that is kept of it.

        Raises:
            ValueError: No such task.
        """
        self._find(name)
        with self._lock:
            del self._tasks[name]
            self._cached.pop(name, None)

    def __call__(self, images: Tensor | Sequence[Tensor], tasks: Sequence[str]) -> list[Tensor]:
        """Outputs of images that belong to different tasks.

        Args:
            images: `[n, C, H, W]`, or `n` images; each as the transform of its task makes it.
            tasks: Name of the task of each image.

        Returns:
            The outputs of each image in the order given: `[classes]` of its task.

        Raises:
            ValueError: Unknown task, or another number of tasks than images.
        """
        groups = self._groups(tasks, len(images))
        outputs: list[Tensor | None] = [None] * len(images)
        for name, places in groups:
            batch = torch.stack([images[place] for place in places])
            for place, output in zip(places, self._run(name, batch), strict=True):
                outputs[place] = output
        return [output for output in outputs if output is not None]

    def predict(self, images: Sequence[str | Path], tasks: Sequence[str], *, batch_size: int = 32) -> list[Any]:
        """Predictions for image files that belong to different tasks.

        Args:
            images: Files.
            tasks: Name of the task of each.
            batch_size: Images at a time.

        Returns:
            What `snella_app.runs.predict.predict` returns for each image by its task's run, in the order given.

        Raises:
            ValueError: As for a call, or an image that cannot be read.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        found: dict[int, Any] = {}
        for name, places in self._groups(tasks, len(images)):
            loaded = self._tasks[name].loaded
            for start in range(0, len(places), batch_size):
                part = places[start : start + batch_size]
                paths = [Path(images[place]) for place in part]
                read = [read_image(path, loaded.reading) for path in paths]
                batch = torch.stack([loaded.transform(image) for image in read])
                outputs = loaded.task.outputs(partial(self._run, name), batch, loaded.info.tta)
                outputs = outputs / loaded.info.temperature
                made = loaded.task.image_predictions(loaded.classes, paths, read, outputs)
                found.update(zip(part, made, strict=True))
        return [found[place] for place in range(len(images))]

    def _groups(self, tasks: Sequence[str], count: int) -> list[tuple[str, list[int]]]:
        """Places of the images of each task; tasks in memory first, so that none of them is merged twice."""
        if len(tasks) != count:
            raise ValueError(f"tasks must name the task of each image, got {len(tasks)} names for {count} images")
        groups: dict[str, list[int]] = {}
        for place, name in enumerate(tasks):
            groups.setdefault(name, []).append(place)
        for name in groups:
            self._find(name)
        return sorted(groups.items(), key=lambda group: group[0] not in self._cached)

    def _find(self, name: str) -> _Task:
        """A task by its name."""
        if name not in self._tasks:
            raise ValueError(f"task must be one of {', '.join(self._tasks) or '(none yet)'}, got {name!r}")
        return self._tasks[name]

    def _run(self, name: str, batch: Tensor) -> Tensor:
        """The outputs of one task's images. One at a time: the model is the same for all."""
        with self._lock:
            loaded = self._tasks[name].loaded
            tensors = {**self._effective_weights(name), **self._tasks[name].replaced}
            if loaded.probe is not None:
                tensors = {f"model.{key}": tensor for key, tensor in tensors.items()}
            with torch.inference_mode():
                outputs: Tensor = functional_call(loaded.network, tensors, (batch.to(self._device),))
        return outputs

    @torch.no_grad()
    def _effective_weights(self, name: str) -> dict[str, Tensor]:
        """The effective weights of a task, computed where they are not in memory."""
        if name in self._cached:
            self._cached.move_to_end(name)
            return self._cached[name]
        task = self._tasks[name]
        free: dict[str, Tensor] = {}
        need = _bytes(one.base for one in task.updates.values())
        while self._cached and self.cached_bytes + need > self._limit:
            _, free = self._cached.popitem(last=False)
        weights = {}
        for key, one in task.updates.items():
            base, out = one.base, free.pop(key, None)
            out = torch.empty_like(base) if out is None else out
            oriented = (base.T, out.T) if one.is_transposed else (base, out)
            write_effective_weight(oriented[0], one.update, oriented[1], one.cache)
            weights[key] = out
        self.merges += 1
        self._cached[name] = weights
        return weights


def _backbone_key(backbone: BackboneInfo, task: str) -> tuple[Any, ...]:
    """What has to be the same for two runs to share a backbone; the seed where it decides the weights."""
    seed = None if backbone.pretrained is not False else backbone.seed
    return (backbone.name, backbone.weights, backbone.img_size, task, seed)


def _updates_of(model: nn.Module) -> dict[str, _Update]:
    """The updates of an adapted model by the names of the weights in its backbone."""
    inner: nn.Module = getattr(getattr(model, "base_model", None), "model", model)
    found = {}
    for name, layer in inner.named_modules():
        if isinstance(layer, SnellaLayer) and "default" not in layer.snella_support:
            update = layer.get_update("default")
            tensors: list[Any] = [None if tensor is None else tensor.detach() for tensor in update.factors]
            factors = Factors(*tensors)
            weight: Tensor = cast(Any, layer.get_base_layer()).weight
            is_transposed = isinstance(layer, Linear) and layer.is_transposed
            found[layer.weight_name(name)] = _Update(update._replace(factors=factors), weight.detach(), is_transposed)
    return found


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


__all__ = ["TaskBank"]
