"""Image plots: data samples, masks, heat maps, generated images, and feature embeddings.

Figure numbers refer to the SNELLA paper (arXiv 2510.24037).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from PIL import Image
from sklearn.cluster import KMeans
from sklearn.manifold import TSNE
from sklearn.metrics import f1_score, normalized_mutual_info_score
from sklearn.preprocessing import normalize
from torch import Tensor, nn

from snella_app.data.datasets import ImageDataset
from snella_app.data.images import is_image, read_image
from snella_app.data.load import DataSplits
from snella_app.data.options import DataConfig
from snella_app.data.splits import stratified_sample
from snella_app.methods import build_method, spec_of
from snella_app.report.examples import overlay
from snella_app.report.style import INK, MUTED, add_legend, new_panels, shortened
from snella_app.runs.evaluate import Split, images_for_run
from snella_app.runs.explain import heat_maps, overlay_heat
from snella_app.runs.images import load_splits
from snella_app.runs.model import LoadedRun, load_run, make_backbone
from snella_app.runs.predict import Predictor
from snella_app.training.linear_probe import base_and_head
from snella_lab.analysis.plot import Plot, Row, run_labels
from snella_lab.comparison.experiment import LINEAR_PROBE, DataEntry, data_entry
from snella_lab.comparison.experiment_files import bundled_experiments, read_experiment
from snella_lab.comparison.run_cell import head_inputs
from snella_lab.style import style_of

PRETRAINED = "pre-trained"
_PERPLEXITY = 30.0
"""Perplexity of t-SNE, if there are enough images."""
_CELL_SIZE = 96
"""Height and width of a cell, in pixels."""
_GAP = 12
"""Gap between cells, in pixels."""
_TITLE_HEIGHT = 24
"""Height of a row's title, in pixels."""
_CAPTION_HEIGHT = 17
"""Height of an image's caption, in pixels."""
_CAPTION_LENGTH = 13
"""Maximum number of characters of a caption, which must fit above a cell."""
_MAX_LEGEND = 24
"""Maximum number of classes in a legend."""


def samples(sources: Sequence[str], *, limit: int = 6, seed: int = 0) -> list[Plot]:
    """Plot sample images of different classes, with one row per dataset, ordered by task group (Figure 11).

    Args:
        sources: Data specifications as in `snella train`, or names or files of experiments.
        limit: Maximum number of images per dataset.
        seed: Seed for splitting the data and selecting the images.

    Raises:
        FileNotFoundError: If data or an experiment does not exist.
        ValueError: If data or an experiment is invalid.
    """
    datasets: list[tuple[DataEntry, DataConfig]] = []
    for source in map(str, sources):
        if source in bundled_experiments() or source.endswith((".yaml", ".yml")):
            experiment = read_experiment(source)
            datasets += [(entry, experiment.config(LINEAR_PROBE, entry).data) for entry in experiment.data]
        else:
            datasets.append((data_entry(source), DataConfig(spec=source)))
    groups = list(dict.fromkeys(entry.group for entry, _ in datasets))
    datasets.sort(key=lambda dataset: groups.index(dataset[0].group))
    rows: list[Row] = []
    images: list[list[Image.Image]] = []
    titles: list[str] = []
    captions: list[list[str]] = []
    for entry, config in datasets:
        splits = load_splits(config, seed)
        selected = _class_balanced_indices(splits.train.labels, limit, seed)
        images.append([splits.train.image(index) for index in selected])
        group = "" if entry.group == entry.name else f"{entry.group}: "
        titles.append(f"{group}{entry.name}")
        names = [""] * len(selected)
        if splits.label_names:
            names = [splits.label_names[splits.train.labels[index]] for index in selected]
        captions.append([shortened(name, _CAPTION_LENGTH) for name in names])
        rows += [
            {"group": entry.group, "data": entry.name, "class": name, "image": splits.train.names[index]}
            for index, name in zip(selected, names, strict=True)
        ]
    return [Plot("samples", rows, partial(_draw_grid, images, titles, captions))]


def masks(runs: Sequence[str | Path], *, split: Split = "auto", limit: int = 6, device: str = "auto") -> list[Plot]:
    """Plot images, their true masks, and each run's predicted masks (Figure 8).

    The images are evenly spaced in a split of the first run's data; see `PlotOptions`. The table contains each run's
    Dice score for each image, averaged over the foreground classes.

    Raises:
        FileNotFoundError: If a folder contains no run with an adapter, or the data no longer exists.
        ValueError: If a run's task is not segmentation.
    """
    labels = run_labels(runs)
    models = [_load(run, "segmentation", device) for run in runs]
    _, items = _images_of_split(models[0], None, split)
    count = min(limit, len(items))
    selected = [items[number * len(items) // count] for number in range(count)]
    images = [dataset.image(index) for dataset, index in selected]
    true_masks = [np.asarray(dataset.mask(index)) for dataset, index in selected]  # type: ignore[attr-defined]
    rows: list[dict[str, object]] = [{"image": dataset.names[index]} for dataset, index in selected]
    grid = [images, _overlays(images, true_masks)]
    captions = [[""] * count, [""] * count]
    for label, loaded in zip(labels, models, strict=True):
        predicted_masks = [_predict_mask(loaded, image) for image in images]
        scores = [mean_dice(mask, truth) for mask, truth in zip(predicted_masks, true_masks, strict=True)]
        for row, score in zip(rows, scores, strict=True):
            row[f"dice {label}"] = score
        grid.append(_overlays(images, predicted_masks))
        captions.append([f"Dice {score:.2f}" for score in scores])
    return [Plot("masks", rows, partial(_draw_grid, grid, ["image", "true mask", *labels], captions))]


def _load(run: str | Path, task: str, device: str) -> LoadedRun:
    """Load a run and check its task."""
    loaded = load_run(run, device)
    if loaded.task.name != task:
        raise ValueError(f"runs must be {task} runs, got {run} with task {loaded.task.name!r}")
    return loaded


def _images_of_split(
    loaded: LoadedRun, data: str | None, split: Split
) -> tuple[DataSplits, list[tuple[ImageDataset, int]]]:
    """Return the splits of a run's data, and the images of one split as pairs of a dataset and an index."""
    splits, _, datasets = images_for_run(loaded, data, split)
    return splits, [(dataset, index) for dataset in datasets for index in range(len(dataset))]


@torch.inference_mode()
def _predict_mask(loaded: LoadedRun, image: Image.Image) -> np.ndarray:
    """Return the predicted mask of an image, at the resolution of the image."""
    scores = loaded.network(loaded.transform(image)[None].to(loaded.device)).float()
    size = (image.height, image.width)
    resized = torch.nn.functional.interpolate(scores, size, mode="bilinear", align_corners=False)
    return resized.argmax(1)[0].to(torch.uint8).cpu().numpy()


def _overlays(images: Sequence[Image.Image], masks: Sequence[np.ndarray]) -> list[Image.Image]:
    """Draw each mask over its image."""
    return [overlay(image, mask) for image, mask in zip(images, masks, strict=True)]


def gradcam(
    runs: Sequence[str | Path],
    *,
    data: str | None = None,
    split: Split = "auto",
    limit: int = 6,
    seed: int = 0,
    device: str = "auto",
) -> list[Plot]:
    """Plot class activation maps of the true class for the pre-trained model and each run (Figure 15).

    The shown images are cropped by the first run's transform, but each model receives images from its own run's
    transform. `snella_app.runs.explain.heat_maps` computes the maps of ViT, Swin, ConvNeXt, and other timm models, with
    the head used for predictions: the final head fitted after training, if the run has one, or else the trained head.
    The pre-trained model combines the pre-trained backbone and the head of the first run. The table contains the
    fraction of each map's sum in the central ninth of the image. See `PlotOptions` for the arguments.

    Raises:
        FileNotFoundError: If a folder contains no run with an adapter, or the data no longer exists.
        ValueError: If a run's task is not classification, a run lacks a class of the images, the first run's head does
            not fit its pre-trained model, or a model has no feature map.
        ImportError: If Captum is not installed.
    """
    labels = run_labels(runs)
    models = [_load(run, "classification", device) for run in runs]
    first = models[0]
    splits, items = _images_of_split(first, data, split)
    chosen = _class_balanced_indices([dataset.labels[index] for dataset, index in items], limit, seed)
    selected = [items[index] for index in chosen]
    classes = [splits.classes[dataset.labels[index]] for dataset, index in selected]
    inputs = [_model_input_image(first, tensor) for tensor in _inputs(first, selected)]
    grid: list[list[Image.Image]] = [inputs]
    rows: list[Row] = []
    networks = [_pretrained_with_head(first), *(loaded.network for loaded in models)]
    for label, loaded, model in zip([PRETRAINED, *labels], [first, *models], networks, strict=True):
        if missing := sorted(set(classes) - set(loaded.classes)):
            raise ValueError(
                f"the data contains classes that {label} lacks: {', '.join(missing)}; pass other runs or --data"
            )
        true_outputs = torch.tensor([loaded.classes.index(name) for name in classes])
        batch = _inputs(loaded, selected).to(loaded.device)
        maps = heat_maps(model.to(loaded.device), batch, true_outputs)
        grid.append([overlay_heat(image, heat) for image, heat in zip(inputs, maps, strict=True)])
        rows += [
            {"run": label, "image": dataset.names[index], "class": name, "share_in_middle": center_fraction(heat)}
            for (dataset, index), name, heat in zip(selected, classes, maps, strict=True)
        ]
    class_captions = [shortened(name, _CAPTION_LENGTH) for name in classes]
    no_captions = [""] * len(inputs)
    captions = [class_captions, *[no_captions] * (len(grid) - 1)]
    return [Plot("gradcam", rows, partial(_draw_grid, grid, ["image", PRETRAINED, *labels], captions))]


def _pretrained_with_head(loaded: LoadedRun) -> nn.Module:
    """Combine the pre-trained backbone of a run with the run's final head or, if there is none, its trained head."""
    model = make_backbone(loaded.info.backbone)
    if loaded.probe is not None:
        return loaded.probe.with_model(model).eval()
    trained_state = base_and_head(loaded.model)[1].state_dict()
    head = model.get_submodule(spec_of(loaded.model).head)
    shapes = {key: value.shape for key, value in head.state_dict().items()}
    if any(key not in trained_state or trained_state[key].shape != shape for key, shape in shapes.items()):
        raise ValueError(
            f"the first run, {loaded.folder.path} (method {loaded.info.method!r}), has neither a final head nor a "
            "linear head on the last layer; begin with a different run"
        )
    head.load_state_dict({key: trained_state[key] for key in shapes})
    return model.eval()


def _inputs(loaded: LoadedRun, selected: Sequence[tuple[ImageDataset, int]]) -> Tensor:
    """Return the images with the run's transform and number of channels, `[images, channels, height, width]`."""
    return torch.stack([dataset.with_transform(loaded.transform)[index][0] for dataset, index in selected])


def _model_input_image(loaded: LoadedRun, image: Tensor) -> Image.Image:
    """Convert a model input back to an image, resized to a cell, as the background of a heat map."""
    shown = Predictor(loaded).to_pil_image(image)
    return shown.resize((_CELL_SIZE, _CELL_SIZE), Image.Resampling.BICUBIC)


def center_fraction(heat: np.ndarray) -> float:
    """Return the fraction of a map's sum in the central third of its height and width, or 0 for a zero map."""
    height, width = heat.shape
    center = heat[height // 3 : height - height // 3, width // 3 : width - width // 3]
    return float(center.sum() / heat.sum()) if heat.any() else 0.0


def images(folders: Sequence[str | Path], *, limit: int = 6) -> list[Plot]:
    """Plot generated images of several runs, matched by file name (Figures 9 and 14).

    Args:
        folders: Image folders, e.g. from `snella generate`, which names files by prompt and seed. The plot shows the
            images whose file names occur in the most folders. For folders without such names, e.g. with photos of
            a DreamBooth subject, it shows the first images.
        limit: Maximum number of images per folder.

    Raises:
        FileNotFoundError: If a folder does not exist or contains no images.
    """
    files: dict[Path, list[Path]] = {}
    for folder in map(Path, folders):
        files[folder] = sorted(path for path in folder.iterdir() if is_image(path))
    for folder, paths in files.items():
        if not paths:
            raise FileNotFoundError(f"folder {folder} contains no images")
    folder_counts = Counter(path.name for paths in files.values() for path in paths)
    max_count = max(folder_counts.values())
    common_names: list[str] = []
    if max_count > 1:
        common_names = sorted(name for name, count in folder_counts.items() if count == max_count)
    paths_by_folder: list[list[Path]] = []
    for folder, paths in files.items():
        selected = [folder / name for name in common_names if folder / name in paths] or paths
        paths_by_folder.append(selected[:limit])
    labels = run_labels(folders)
    rows = [
        {"folder": label, "image": path.name}
        for label, paths in zip(labels, paths_by_folder, strict=True)
        for path in paths
    ]
    loaded_images = [[read_image(path) for path in paths] for paths in paths_by_folder]
    captions = [[shortened(path.stem, _CAPTION_LENGTH) for path in paths] for paths in paths_by_folder]
    return [Plot("images", rows, partial(_draw_grid, loaded_images, labels, captions))]


def mean_dice(mask: np.ndarray, truth: np.ndarray) -> float:
    """Compute the Dice score 2·|A ∩ B| / (|A| + |B|), averaged over the nonzero classes of either mask.

    The score is 1 if both masks are zero.
    """
    classes = [label for label in np.union1d(mask, truth) if label > 0]
    return float(f1_score(truth.ravel(), mask.ravel(), labels=classes, average="macro")) if classes else 1.0


def _class_balanced_indices(labels: Sequence[int], count: int, seed: int) -> list[int]:
    """Sample up to `count` indices, cycling through the classes and in random order within each class."""
    order = np.random.default_rng(seed).permutation(len(labels)).tolist()
    by_class: dict[int, list[int]] = {}
    for index in order:
        by_class.setdefault(labels[index], []).append(index)
    classes = [by_class[label] for label in sorted(by_class)]
    longest = max(map(len, classes), default=0)
    cycled = (indices[cycle] for cycle in range(longest) for indices in classes if cycle < len(indices))
    return list(islice(cycled, count))


def _draw_grid(
    grid: Sequence[Sequence[Image.Image]], titles: Sequence[str], captions: Sequence[Sequence[str]]
) -> Figure:
    """Draw a grid of images, with a title for each row and a caption above each image."""
    columns = max(map(len, grid))
    header_heights = [_TITLE_HEIGHT + (_CAPTION_HEIGHT if any(texts) else 0) for texts in captions]
    width = (_CELL_SIZE + _GAP) * columns + _GAP
    height = (_CELL_SIZE + _GAP) * len(grid) + sum(header_heights) + _GAP
    figure, panels = new_panels(width, height, [""] * (columns * len(grid)), columns)
    figure.set_layout_engine("none")  # all positions are set below
    bottom = height
    for row, cells in enumerate(grid):
        bottom -= _GAP + header_heights[row] + _CELL_SIZE
        title = shortened(titles[row], 10 * columns)
        title_y = (bottom + _CELL_SIZE + header_heights[row] - 3) / height
        figure.text(_GAP / width, title_y, title, color=INK, fontsize=11, fontweight="bold", va="top")
        for column in range(columns):
            axes = panels[row * columns + column]
            axes.set_axis_off()
            left = _GAP + (_CELL_SIZE + _GAP) * column
            axes.set_position((left / width, bottom / height, _CELL_SIZE / width, _CELL_SIZE / height))
            if column < len(cells):
                image = cells[column].convert("RGB")
                image.thumbnail((2 * _CELL_SIZE, 2 * _CELL_SIZE), Image.Resampling.LANCZOS)
                axes.imshow(np.asarray(image), interpolation="none" if min(image.size) > 40 else "nearest")
                caption_y = (bottom + _CELL_SIZE + 4) / height
                figure.text(left / width, caption_y, captions[row][column], color=INK, fontsize=9)
    return figure


@dataclass(frozen=True)
class ImageFeatures:
    """Head inputs of images, for the pre-trained backbone and each run.

    Attributes:
        positions: Positions of the images in their split.
        labels: Class number of each image.
        classes: Class names.
        by_run: Head inputs, `[images, features]`, of `PRETRAINED` and of each run by label.
    """

    positions: Sequence[int]
    labels: NDArray[np.int64]
    classes: Sequence[str]
    by_run: Mapping[str, NDArray[np.float32]]


def image_features(
    runs: Sequence[str | Path],
    *,
    data: str | None = None,
    split: Split = "auto",
    limit: int = 500,
    seed: int = 0,
    batch_size: int = 32,
    device: str = "auto",
) -> ImageFeatures:
    """Compute the head inputs that `features` plots, with the same arguments and errors."""
    models = [_load(run, "classification", device) for run in runs]
    first = models[0]
    splits, items = _images_of_split(first, data, split)
    labels = [dataset.labels[index] for dataset, index in items]
    selected = list(range(len(items)))
    if len(items) > limit:
        selected = sorted(stratified_sample(labels, limit, seed=seed, classes=splits.classes, argument="limit"))
    indices_by_dataset: dict[ImageDataset, list[int]] = {}  # keeps the order of `selected`, which is ascending
    for position in selected:
        dataset, index = items[position]
        indices_by_dataset.setdefault(dataset, []).append(index)
    pretrained = build_method("linear", make_backbone(first.info.backbone)).to(first.device)
    networks = [pretrained, *(loaded.model for loaded in models)]
    by_run: dict[str, NDArray[np.float32]] = {}
    for run, loaded, model in zip([PRETRAINED, *run_labels(runs)], [first, *models], networks, strict=True):
        inputs = [
            dataset.subset(indices).with_transform(loaded.transform) for dataset, indices in indices_by_dataset.items()
        ]
        by_run[run] = head_inputs(model, inputs, batch_size)
    return ImageFeatures([int(position) for position in selected], np.array(labels)[selected], splits.classes, by_run)


def features(
    runs: Sequence[str | Path],
    *,
    data: str | None = None,
    split: Split = "auto",
    limit: int = 500,
    seed: int = 0,
    batch_size: int = 32,
    device: str = "auto",
) -> list[Plot]:
    """Plot t-SNE embeddings of head inputs, one panel per model, with the normalized mutual information of clusters.

        NMI = 2·I(clusters; classes) / (H(clusters) + H(classes)),   clusters by k-means, one per class

    The first panel shows the pre-trained backbone of the first run. Clusters are computed on the features, not on the
    two-dimensional embedding. See `PlotOptions` for the arguments.

    Returns:
        One plot. Its table has one row per image and model. The additional table `features-nmi` has one row per model.

    Raises:
        FileNotFoundError: If a folder contains no run with an adapter, or the data no longer exists.
        ValueError: If a run's task is not classification, or `limit` is below the number of classes.
    """
    images = image_features(runs, data=data, split=split, limit=limit, seed=seed, batch_size=batch_size, device=device)
    num_classes = len(set(images.labels.tolist()))
    scores: list[Row] = [
        {
            "run": run,
            "images": len(images.labels),
            "classes": num_classes,
            "nmi": cluster_nmi(values, images.labels, seed),
        }
        for run, values in images.by_run.items()
    ]
    rows = [
        {"run": run, "image": position, "class": images.classes[label], "x": float(x), "y": float(y)}
        for run, values in images.by_run.items()
        for position, label, (x, y) in zip(images.positions, images.labels, embed(values, seed), strict=True)
    ]
    notes = [f"{row['run']}: NMI {row['nmi']:.3f}" for row in scores]
    return [Plot("features", rows, partial(_draw_features, rows, scores), notes, {"nmi": scores})]


def embed(values: NDArray[np.float32], seed: int = 0) -> NDArray[np.float64]:
    """Embed features `[images, width]`, normalized to unit length, in two dimensions with t-SNE, `[images, 2]`."""
    perplexity = min(_PERPLEXITY, (len(values) - 1) / 3)  # must be less than the number of images
    embedding = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(normalize(values))
    return embedding.astype(float)


def cluster_nmi(values: NDArray[np.float32], classes: NDArray[np.int64], seed: int = 0) -> float:
    """Compute the normalized mutual information between classes and k-means clusters, one cluster per class."""
    num_classes = len(set(classes.tolist()))
    clusters = KMeans(num_classes, n_init=10, random_state=seed).fit_predict(normalize(values))
    return float(normalized_mutual_info_score(classes, clusters))


def _draw_features(rows: Sequence[Row], scores: Sequence[Row]) -> Figure:
    """Draw one panel per model, with a color and marker for each class."""
    columns = min(len(scores), 3)
    panel_rows = math.ceil(len(scores) / columns)
    classes = sorted({row["class"] for row in rows})
    titles = [f"{shortened(row['run'], 20)}: NMI {row['nmi']:.2f}" for row in scores]
    has_legend = len(classes) <= _MAX_LEGEND
    legend_height = 20 * math.ceil(len(classes) / (2 * columns)) if has_legend else 0
    figure, panels = new_panels(280 * columns, 275 * panel_rows + legend_height + 20, titles, columns)
    for axes, score in zip(panels, scores, strict=True):
        for number, name in enumerate(classes):
            color, marker = style_of(number)
            points = [row for row in rows if row["run"] == score["run"] and row["class"] == name]
            coordinates = [row["x"] for row in points], [row["y"] for row in points]
            axes.plot(*coordinates, linestyle="none", marker=marker, color=color, markersize=4, alpha=0.85)
        axes.grid(False)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(visible=True, color=MUTED)
    if has_legend:
        handles: list[Line2D] = []
        for number in range(len(classes)):
            color, marker = style_of(number)
            handles.append(Line2D([], [], linestyle="none", marker=marker, color=color, markersize=5))
        add_legend(figure, handles, [shortened(name, 16) for name in classes], columns=2 * columns)
    return figure
