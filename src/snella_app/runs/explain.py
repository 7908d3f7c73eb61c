"""Explain predictions with heat maps and with the nearest training images.

A heat map shows which regions of an image contribute to an output. The nearest training images are those with the
most similar features, which are the inputs of the classifier head.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from sklearn.metrics.pairwise import cosine_similarity
from torch import Tensor, nn

from snella_app.data.datasets import ImageDataset, read_at_side
from snella_app.files import create_folder, write_png
from snella_app.methods.model_parts import base_model
from snella_app.records.predictions import MAX_PREDICTIONS, Predictions
from snella_app.records.record import read
from snella_app.report.examples import EmbeddedImage, choose_examples, image_data_uri
from snella_app.report.report import write_page
from snella_app.runs.evaluate import rewrite_report
from snella_app.runs.image_inputs import ImageInput, check_columns, expand
from snella_app.runs.images import check_splits, load_run_splits
from snella_app.runs.layer_probe import LayerProbe
from snella_app.runs.model import load_single_run
from snella_app.runs.predict import Predictor, check_order, table_columns
from snella_app.text import percent_text, split_text

HeatMap = Literal["gradcam", "rollout"]
"""Heat map method: gradient times activation for a class, or attention rollout of a ViT, which is independent of
the class."""
HEAT_MAPS = "heat_maps"
"""Subfolder of a run for the heat maps of its report, one `INDEX.png` per image."""
_HEAT_OPACITY = (0.15, 0.65)  # opacity at heat 0 and at heat 1
_NUM_EXAMPLES = 12
_MAX_CANDIDATES = 2_000
"""Maximum number of training images that are compared to find the nearest ones."""
_MAX_SIDE = 320  # longer side of images in pages and reports, in pixels
_MAX_STEM_BYTES = 240  # file systems allow 255 bytes, including the number and the suffix


@dataclass(frozen=True)
class ExplainResult:
    """Result of `explain`.

    Attributes:
        page: HTML page with all heat maps.
        count: Number of explained images.
        notes: Notes for the user, e.g. on skipped images.
    """

    page: Path
    count: int
    notes: list[str]


def explain(
    run: str | Path,
    images: Any,
    out: str | Path,
    *,
    by: HeatMap = "gradcam",
    of: str | None = None,
    neighbors: int = 3,
    overwrite: bool = False,
    batch_size: int = 16,
    columns: str | None = None,
    skip_corrupt: bool = False,
    device: str = "auto",
) -> ExplainResult:
    """Write a heat map of each image, `OUT/0001-NAME.png`, and an HTML page of all heat maps, `OUT/index.html`.

    NAME is the file name of the image without its suffix, cut to at most 240 bytes.

    Args:
        run: Folder of a classification run.
        images: As for `snella_app.runs.image_inputs.expand`.
        out: Output folder, which is created if it is missing.
        by: Method: `"gradcam"` (gradient times activation) or `"rollout"` (attention of a ViT, independent of the
            class).
        of: Class to explain. None explains the predicted class of each image.
        neighbors: Number of nearest training images to show, by cosine similarity of features. At most 2,000 evenly
            spaced training images are compared. 0 shows none.
        overwrite: Write into a folder that is not empty.
        batch_size: Batch size.
        columns: As for `expand`.
        skip_corrupt: Skip images that cannot be read.
        device: `"auto"`, or a torch device such as `"cpu"`, `"cuda:1"`, or `"mps"`.

    Raises:
        FileExistsError: If `out` is a file, or if it is a nonempty folder and `overwrite` is not set.
        FileNotFoundError: If the run or an image does not exist. The message suggests similar names.
        ValueError: If the run is not a classification run, is a cross-validation run, or has no class `of`; if `of` is
            combined with rollout, or the model does not support `by`; or if an image cannot be read, `batch_size` is
            less than 1, or `neighbors` is negative.
        ImportError: If `by` is gradcam and Captum is not installed.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"out must be a folder for the heat maps, got the file {str(out)!r}")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(
            f"out={out} is not empty; choose another folder, or write into it with --overwrite (overwrite=True)"
        )
    if by == "rollout" and of is not None:
        raise ValueError(f"of must be left out with rollout, which does not depend on a class, got {of!r}")
    if neighbors < 0:
        raise ValueError(f"neighbors must be at least 0, got {neighbors}")
    paths = [images] if isinstance(images, str | Path) else list(images)
    check_order(Path(run), paths)
    check_columns(columns, paths)
    files = expand(paths, columns, table_columns(run), keep_missing=skip_corrupt)
    model = _load_classifier(run, by, batch_size, device)
    if of is not None and of not in model.classes:
        raise ValueError(f"of must be one of the run's classes, {', '.join(model.classes)}, got {of!r}")
    notes: list[str] = []
    features: list[np.ndarray] = []
    predictions = list(
        model.iter_predictions(
            files,
            skip_corrupt=skip_corrupt,
            on_skipped=lambda path, reason: notes.append(f"skipped {str(path)!r} ({reason})"),
            on_features=features.append if neighbors else None,
        )
    )
    neighbors_by_image: list[list[dict[str, Any]]] = [[] for _ in predictions]
    if features:
        neighbors_by_image = _neighbors(model, features, neighbors, notes)
    targets = [of or prediction.label for prediction in predictions]
    overlays = _overlays(model, [prediction.path for prediction in predictions], targets, by)
    with create_folder(folder):
        entries: list[dict[str, Any]] = []
        explained = zip(predictions, targets, neighbors_by_image, overlays, strict=True)
        for prediction, target, nearest, (image, overlay, is_blank) in explained:
            stem = os.fsdecode(os.fsencode(prediction.path.stem)[:_MAX_STEM_BYTES])
            name = f"{len(entries) + 1:04}-{stem}.png"
            _write_heat_map(folder / name, overlay, by, is_blank=is_blank)
            likely_classes = [f"{label} {percent_text(p)}" for label, p in prediction.ranking[:3]]
            subject = f"for {target}" if by == "gradcam" else "of attention, independent of the class"
            if is_blank:
                reason = "no region raises this output" if by == "gradcam" else "all regions receive equal attention"
                subject += f": blank, because {reason}"
            entries.append(
                {
                    "name": str(prediction.path),
                    "text": ", ".join(likely_classes),
                    "target": subject,
                    "image": EmbeddedImage(*image_data_uri(image, _MAX_SIDE)),
                    "heat": EmbeddedImage(*image_data_uri(overlay, _MAX_SIDE)),
                    "neighbors": nearest,
                }
            )
        context = {"run": model.loaded.info, "entries": entries, "of": of, "by": by}
        page = write_page(folder, "snella_app.report", context, "index.html")
    return ExplainResult(page, len(entries), notes)


def explain_validation(run: str | Path, *, by: HeatMap = "gradcam", batch_size: int = 16, device: str = "auto") -> Path:
    """Add heat maps of the most confident mistakes and of some correct predictions to the report of a run.

    The images are those of `predictions.json`: validation images, or test images if there is no validation split.

    Args:
        run: Folder of a classification run with stored predictions, whose images must still exist.
        by: As for `explain`.
        batch_size: Batch size.
        device: `"auto"`, or a torch device such as `"cpu"`, `"cuda:1"`, or `"mps"`.

    Returns:
        Path of the report.

    Raises:
        FileNotFoundError: If `run` is not a run folder or has no predictions, or its images no longer exist.
        ValueError: If the run is not a classification run, is a cross-validation run, or has more than 5,000 of these
            images or none; if its images were added, removed, or renamed; or if the model does not support `by`, or
            `batch_size` is less than 1.
        ImportError: If `by` is gradcam and Captum is not installed.
    """
    model = _load_classifier(run, by, batch_size, device)
    sizes = model.loaded.info.data.sizes
    split_name = "val" if sizes.get("val") else "test"
    if (count := sizes.get(split_name, 0)) > MAX_PREDICTIONS:
        raise ValueError(
            f"{run} has {count:,} {split_text(split_name)} images, and a run stores predictions of at most "
            f"{MAX_PREDICTIONS:,}; pass images: snella explain RUN IMAGES --out FOLDER"
        )
    if count == 0:
        raise ValueError(
            f"{run} has neither validation nor test images; pass images: snella explain RUN IMAGES --out FOLDER"
        )
    predictions = read(Predictions, run)
    dataset = _load_split(model, predictions.split)
    wrong, correct = choose_examples(predictions.items, _NUM_EXAMPLES)
    items = [*wrong, *correct]
    folder = Path(run) / HEAT_MAPS
    folder.mkdir(exist_ok=True)
    images = [dataset[item.index][0] for item in items]
    # all overlays are computed before the old ones are deleted, so that an error leaves the report as it was
    overlays = list(_overlays(model, images, [model.classes[item.predicted] for item in items], by))
    for old_file in folder.glob("*.png"):
        old_file.unlink()
    for item, (_, overlay, is_blank) in zip(items, overlays, strict=True):
        overlay.thumbnail((_MAX_SIDE, _MAX_SIDE))
        _write_heat_map(folder / f"{item.index}.png", overlay, by, is_blank=is_blank)
    return rewrite_report(run)


def nearest_images(features: np.ndarray, others: np.ndarray, count: int) -> list[list[tuple[int, float]]]:
    """Find the rows of `others` with the highest cosine similarity to each row of `features`.

    Args:
        features: `[images, width]`.
        others: `[others, width]`.
        count: Number of neighbors.

    Returns:
        For each row of `features`, pairs of index and cosine similarity, nearest first.
    """
    cosines = cosine_similarity(features, others)
    nearest_columns = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
    neighbors: list[list[tuple[int, float]]] = []
    for row_cosines, columns in zip(cosines, nearest_columns, strict=True):
        neighbors.append([(int(column), float(row_cosines[column])) for column in columns])
    return neighbors


def _load_classifier(run: str | Path, by: str, batch_size: int, device: str) -> Predictor:
    """Check the heat map method, and load the classification run to explain."""
    if by not in get_args(HeatMap):
        raise ValueError(f"by must be one of {', '.join(get_args(HeatMap))}, got {by!r}")
    check_order(Path(run))
    model = Predictor(load_single_run(run, device), batch_size=batch_size)
    if not model.loaded.task.has_class_scores:
        raise ValueError(f"run must be a classification run for heat maps, got task {model.loaded.info.task!r}")
    return model


def _load_split(model: Predictor, name: str) -> ImageDataset:
    """Load a split of the run's data, decoded as for the model, after checking that the splits have not changed."""
    folder = model.loaded.folder
    data = model.loaded.info.data
    splits = load_run_splits(folder, data)
    check_splits(folder.path, data, splits, ())
    (dataset,) = read_at_side([splits.parts[name]], model.loaded.reading.side)
    return dataset


def _neighbors(
    model: Predictor, features: Sequence[np.ndarray], count: int, notes: list[str]
) -> list[list[dict[str, Any]]]:
    """Describe the nearest training images of each image for the page.

    If the training images cannot be read, add a note and return an empty list for each image.
    """
    try:
        train = _load_split(model, "train")
        step = max(1, -(-len(train) // _MAX_CANDIDATES))  # rounded up
        candidates = range(0, len(train), step)
        train_features: list[np.ndarray] = []
        # only the features are used, not the predictions
        list(model.iter_predictions((train[index][0] for index in candidates), on_features=train_features.append))
    except (OSError, ValueError, ImportError) as error:
        notes.append(f"no nearest training images: {error}")
        return [[] for _ in features]
    if step > 1:
        notes.append(f"neighbors are chosen from {len(candidates):,} evenly spaced training images (of {len(train):,})")

    def describe(index: int, cosine: float) -> dict[str, Any]:
        image = EmbeddedImage(*image_data_uri(train.image(index), _MAX_SIDE))
        label = model.classes[train.labels[index]]
        name = train.names[index]
        return {"image": image, "label": label, "name": name, "cosine": f"{cosine:.2f}"}

    neighbors = nearest_images(np.stack(features), np.stack(train_features), count)
    return [[describe(candidates[position], cosine) for position, cosine in nearest] for nearest in neighbors]


def _overlays(
    model: Predictor, images: Sequence[ImageInput], classes: Sequence[str], by: HeatMap
) -> Iterator[tuple[Image.Image, Image.Image, bool]]:
    """Yield each preprocessed image, without and with its heat map for a class, and whether the heat map is zero."""
    network = model.loaded.network
    targets = [model.classes.index(name) for name in classes]
    for start in range(0, len(images), model.batch_size):
        batch = slice(start, start + model.batch_size)
        tensors = model.preprocess(images[batch]).to(model.device)
        if by == "gradcam":
            maps = heat_maps(network, tensors, torch.tensor(targets[batch]))
        else:
            maps = attention_rollout(network, tensors)
        for tensor, heat_map in zip(tensors, maps, strict=True):
            image = model.to_pil_image(tensor)
            yield image, overlay_heat(image, heat_map), not heat_map.any()


def _write_heat_map(path: Path, image: Image.Image, by: HeatMap, *, is_blank: bool) -> None:
    """Write an image with a heat map as PNG; store the method, and whether the map is zero, in its metadata."""
    metadata = PngInfo()
    metadata.add_text("by", by)
    if is_blank:
        metadata.add_text("blank", "yes")
    write_png(path, image, pnginfo=metadata)


def heat_maps(model: nn.Module, images: Tensor, outputs: Tensor) -> np.ndarray:
    """Return HiResCAM heat maps: gradient times activation at a spatial layer.

    M[i, j] = max(0, Σ_c ∂y/∂A[c, i, j] · A[c, i, j])

    Unlike Grad-CAM, HiResCAM does not average gradients over the grid; averaging can highlight irrelevant regions.
    `A` is the last feature map of a convolutional network or a Swin Transformer. For a ViT, it is the input of the
    last attention module, since a class-token head ignores patch tokens after it. For a `LayerProbe` (a final head on
    several layers), it is the output of the first of these layers, on which the others depend. Each map is scaled to a
    maximum of 1 and then resized to the image.

    Args:
        model: Model from `build_method` or `load_trained` in evaluation mode, a `LayerProbe`, or a plain timm model.
        images: `[images, channels, height, width]`, preprocessed.
        outputs: Index of the output to explain for each image, `[images]`.

    Returns:
        `[images, height, width]`, float32 in [0, 1]. A map is zero if no region raises the output.

    Raises:
        ValueError: If the model has neither ViT blocks nor `feature_info`, or calls the layer several times: the method
            `vqt` also applies it to query tokens.
        ImportError: If Captum is not installed.

    Sources:
        Draelos and Carin, Use HiResCAM instead of Grad-CAM (arXiv 2011.08891); Selvaraju et al., Grad-CAM (arXiv
        1610.02391). Computed by Captum's `LayerGradientXActivation`.
    """
    try:
        from captum.attr import LayerGradientXActivation
    except ImportError as error:
        raise ImportError("heat maps need captum; pip install 'snella[explain]'") from error
    layer, width, patch = _target_layer(model)
    inputs = images.detach().clone().requires_grad_()
    calls: list[nn.Module] = []
    with layer.register_forward_hook(lambda module, *_: calls.append(module)), torch.enable_grad():
        product = LayerGradientXActivation(model, layer).attribute(inputs, target=outputs.to(images.device))
    if len(calls) > 1:  # Captum returns the product of the last call
        raise ValueError(
            f"gradcam needs a layer that is called once per forward pass, got {len(calls)} calls of "
            f"{type(layer).__name__}; use rollout"
        )
    return _resized_heat(_summed_grid(product.detach().float(), width, patch, images.shape[-2:]).clamp_min(0), images)


@torch.no_grad()
def attention_rollout(model: nn.Module, images: Tensor) -> np.ndarray:
    """Return attention rollout maps of a ViT, independent of the class.

    R = Â_L … Â_1,   Â_l = (mean over heads of A_l + I) / 2

    The map is the mean of R over the rows that the head pools, restricted to the patch columns.

    Args:
        model: As for `heat_maps`, but with a timm ViT.
        images: As for `heat_maps`.

    Returns:
        `[images, height, width]`, float32. Each map is scaled to [0, 1] and then resized to the image.

    Raises:
        ValueError: If the model is not a timm ViT or its method adds tokens (prompts).

    Sources:
        Abnar and Zuidema, Quantifying Attention Flow in Transformers (arXiv 2005.00928).
    """
    base, blocks, patch = _vit_parts(model)
    attentions: list[Any] = [getattr(block, "attn", None) for block in blocks]
    is_vit = all(hasattr(attention, "attn_drop") and hasattr(attention, "fused_attn") for attention in attentions)
    if patch is None or not attentions or not is_vit:
        raise ValueError(f"attention rollout needs a timm ViT, got {type(base).__name__}; use gradcam")
    rows, columns = images.shape[-2] // patch[0], images.shape[-1] // patch[1]
    rolled: list[Tensor] = []  # the product over the blocks so far

    def multiply_block(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Multiply the attention of a block (the input of its attention dropout) into the product."""
        mean = inputs[0].float().mean(1)  # [images, tokens, tokens]
        step = (mean + torch.eye(mean.shape[-1], device=mean.device)) / 2
        rolled[:] = [step @ rolled[0] if rolled else step]

    were_fused = [attention.fused_attn for attention in attentions]
    handles = [attention.attn_drop.register_forward_pre_hook(multiply_block) for attention in attentions]
    try:
        for attention in attentions:
            attention.fused_attn = False  # fused attention does not expose its weights
        model(images)
    finally:
        for attention, was_fused, handle in zip(attentions, were_fused, handles, strict=True):
            attention.fused_attn = was_fused
            handle.remove()
    num_prefix = base.num_prefix_tokens
    num_prompts = rolled[0].shape[-1] - rows * columns - num_prefix
    if num_prompts:
        raise ValueError(
            f"attention rollout does not support prompt tokens, but the method adds {num_prompts}; use gradcam"
        )
    # distilled models average the outputs of the class token and the distillation token
    num_class_tokens = 1 if getattr(base, "dist_token", None) is None else 2
    pooled = rolled[0][:, :num_class_tokens] if base.global_pool == "token" else rolled[0][:, num_prefix:]
    grid = pooled.mean(1)[:, num_prefix:].reshape(-1, rows, columns)
    return _resized_heat(grid - grid.amin((1, 2), keepdim=True), images)


def _resized_heat(grid: Tensor, images: Tensor) -> np.ndarray:
    """Scale a nonnegative grid `[images, rows, columns]` to a maximum of 1 and resize it to the images."""
    peaks = grid.amax((1, 2), keepdim=True)
    scaled = grid / torch.where(peaks > 0, peaks, torch.ones_like(peaks))
    sized = F.interpolate(scaled[:, None], images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    return sized.clamp(0, 1).cpu().numpy()


def _vit_parts(model: nn.Module) -> tuple[Any, Sequence[Any], Any]:
    """Return the base model (the model without wrappers), its blocks, and its patch size.

    The blocks are empty if the model has none. The patch size is None if the model has no patch embedding.
    """
    base: Any = base_model(model)
    blocks = getattr(base, "blocks", None) or ()
    patch_size = getattr(getattr(base, "patch_embed", None), "patch_size", None)
    return base, blocks, patch_size


def _target_layer(model: nn.Module) -> tuple[nn.Module, int, tuple[int, int]]:
    """Return the target layer of heat maps, its number of channels, and its patch size.

    The patch size is (1, 1) for layers whose output is a feature map.
    """
    base, blocks, patch = _vit_parts(model)
    earliest = min(model.layers) if isinstance(model, LayerProbe) else None
    if blocks and hasattr(blocks[-1], "norm1") and patch is not None:
        layer = blocks[-1].norm1 if earliest is None else blocks[earliest]
        return layer, int(base.embed_dim), (int(patch[0]), int(patch[1]))
    info = getattr(base, "feature_info", None)
    if not info:
        raise ValueError(f"heat maps need a timm model with feature_info, got {type(base).__name__}")
    entries = info if isinstance(info, list) else info.info
    entry = entries[-1 if earliest is None else earliest]
    return base.get_submodule(entry["module"]), int(entry["num_chs"]), (1, 1)


def _summed_grid(product: Tensor, width: int, patch: tuple[int, int], size: torch.Size) -> Tensor:
    """Sum a product over its `width` channels, and return a grid `[images, rows, columns]`.

    The product is a feature map with channels first or last, or has one row per token.
    """
    if product.ndim == 4:
        return product.sum(1) if product.shape[1] == width else product.sum(-1)
    rows, columns = size[0] // patch[0], size[1] // patch[1]
    sums = product.sum(-1)
    return sums[:, sums.shape[1] - rows * columns :].reshape(-1, rows, columns)  # class and prompt tokens come first


def overlay_heat(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """Overlay a heat map on an image, with an opacity that increases with the heat.

    Args:
        image: PIL image, which is converted to RGB.
        heat: `[height, width]` in [0, 1]; resized to the image.
    """
    from matplotlib import colormaps

    resized = Image.fromarray((heat * 255).round().astype(np.uint8)).resize(image.size, Image.Resampling.BICUBIC)
    values = np.asarray(resized)[..., None] / 255
    colors = colormaps["inferno"](values[..., 0])[..., :3] * 255
    lowest, highest = _HEAT_OPACITY
    opacity = lowest + (highest - lowest) * values
    mixed = np.asarray(image.convert("RGB")) * (1 - opacity) + colors * opacity
    return Image.fromarray(mixed.round().astype(np.uint8))
