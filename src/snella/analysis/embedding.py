"""Features of several runs on the same images, in two dimensions (Figure 13)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.manifold import TSNE
from sklearn.metrics import normalized_mutual_info_score

from snella.analysis.plot import Plot, Row, run_labels
from snella.data.splits import stratified_sample
from snella.methods import build_method
from snella.report.style import MUTED, add_legend, new_panels, shortened, style_of
from snella.runs.evaluate import Split, images_for_run
from snella.runs.model import load_run, make_backbone
from snella.training.linear_probe import head_inputs

PRETRAINED = "pre-trained"
_PERPLEXITY = 30.0


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
    """t-SNE of the inputs to the head, a panel a model, each with the normalized mutual information of its clusters.

        NMI = 2·I(clusters; classes) / (H(clusters) + H(classes)),   clusters by k-means, as many as classes

    The first panel is the pre-trained backbone of the first run. Clusters are found among the features themselves, not
    among their images in two dimensions, which depend on the seed.

    Args:
        runs: Folders of classification runs.
        data: Images for all of them; the first run's own if None.
        split: Part of the data; `auto` is the first run's test part.
        limit: Maximum number of images, stratified by class.
        seed: Decides the images, the clusters and the embedding.
        batch_size: Images at a time.
        device: auto, cpu or cuda.

    Returns:
        One plot: a row of its table is an image in one model, `features-nmi` has a row a model.

    Raises:
        FileNotFoundError: A folder holds no finished run, or the data is not there any more.
        ValueError: A run is no classification.
    """
    labels = run_labels(runs)
    first = load_run(runs[0], device)
    splits, _, parts = images_for_run(first, data, split)
    classes = [label for part in parts for label in part.labels]
    chosen = np.arange(len(classes))
    if len(classes) > limit:
        names = splits.classes
        chosen = np.array(sorted(stratified_sample(classes, limit, seed=seed, classes=names, argument="limit")))
    wanted = np.array(classes)[chosen]
    models: list[tuple[str, NDArray[np.float32]]] = []
    for label, run in zip([PRETRAINED, *labels], [None, *runs], strict=True):
        if run is None:
            model, transform = build_method("linear", make_backbone(first.info.backbone)), first.transform
            model.to(first.device)
        else:
            loaded = load_run(run, device)
            if loaded.task.name != "classification":
                raise ValueError(f"features are of classification runs, got {run} of the task {loaded.task.name!r}")
            model, transform = loaded.model, loaded.transform
        starts = np.cumsum([0, *map(len, parts)])
        own = [
            part.subset((chosen[(chosen >= start) & (chosen < start + len(part))] - start).tolist())
            for part, start in zip(parts, starts, strict=False)
        ]
        shown = [part.with_transform(transform) for part in own if len(part)]
        models.append((label, head_inputs(model, shown, batch_size)))
    points = {label: embed(values, seed) for label, values in models}
    scores: list[Row] = [
        {
            "run": label,
            "images": len(wanted),
            "classes": len(set(wanted.tolist())),
            "nmi": cluster_nmi(values, wanted, seed),
        }
        for label, values in models
    ]
    rows = [
        {"run": label, "image": int(index), "class": splits.classes[number], "x": float(x), "y": float(y)}
        for label, places in points.items()
        for index, number, (x, y) in zip(chosen, wanted, places, strict=True)
    ]
    notes = [f"{row['run']}: NMI {row['nmi']:.3f}" for row in scores]
    return [Plot("features", rows, partial(_draw, rows, scores), notes, {"nmi": scores})]


def embed(values: NDArray[np.float32], seed: int = 0) -> NDArray[np.float64]:
    """t-SNE of features `[images, width]` in two dimensions, `[images, 2]`."""
    perplexity = min(_PERPLEXITY, (len(values) - 1) / 3)
    return (
        TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(_standardized(values)).astype(float)
    )


def cluster_nmi(values: NDArray[np.float32], classes: NDArray[np.int64], seed: int = 0) -> float:
    """Normalized mutual information between classes and the clusters of k-means, as many as there are classes."""
    count = len(set(classes.tolist()))
    found = KMeans(count, n_init=10, random_state=seed).fit_predict(_standardized(values))
    return float(normalized_mutual_info_score(classes, found))


def _standardized(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Features of length 1, so that no single image of great norm decides."""
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    return (values / np.maximum(norms, 1e-12)).astype(np.float32)


def _draw(rows: Sequence[Row], scores: Sequence[Row]) -> Figure:
    """A panel a model, classes by color and marker."""
    columns = min(len(scores), 3)
    lines = -(-len(scores) // columns)
    classes = list(dict.fromkeys(sorted(row["class"] for row in rows)))
    titles = [f"{shortened(row['run'], 20)}: NMI {row['nmi']:.2f}" for row in scores]
    figure, panels = new_panels(
        280 * columns, 275 * lines + 20 * -(-len(classes) // (2 * columns)) + 20, titles, columns
    )
    for axes, score in zip(panels, scores, strict=True):
        for number, name in enumerate(classes):
            color, marker = style_of(number)
            own = [row for row in rows if row["run"] == score["run"] and row["class"] == name]
            places = [row["x"] for row in own], [row["y"] for row in own]
            axes.plot(*places, linestyle="none", marker=marker, color=color, markersize=4, alpha=0.85)
        axes.grid(False)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(visible=True, color=MUTED)
    if len(classes) <= 24:
        handles = [
            Line2D([], [], linestyle="none", marker=style_of(number)[1], color=style_of(number)[0], markersize=5)
            for number in range(len(classes))
        ]
        add_legend(figure, handles, [shortened(name, 16) for name in classes], columns=2 * columns)
    return figure


__all__ = ["cluster_nmi", "embed", "features"]
