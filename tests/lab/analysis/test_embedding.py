"""t-SNE of features: mutual information of clusters and classes, and identical images in all panels."""

import numpy as np
import pytest

from snella_lab.analysis.images import PRETRAINED, cluster_nmi, features
from snella_lab.analysis.plot import write_plots


def test_nmi_is_one_if_clusters_equal_classes():
    values = np.repeat(np.eye(3, dtype=np.float32), 4, axis=0)
    assert cluster_nmi(values, np.repeat([0, 1, 2], 4)) == pytest.approx(1.0)
    # clusters {0, 1} and {2, 3}, classes {0, 2} and {1, 3}: independent
    pairs = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], np.float32)
    assert cluster_nmi(pairs, np.array([0, 1, 0, 1])) == pytest.approx(0.0, abs=1e-9)


def test_all_models_embed_the_same_images(old_run, save_run, tmp_path):
    (plot,) = features([old_run, save_run("lora")], limit=20, device="cpu")
    assert [row["run"] for row in plot.tables["nmi"]] == [PRETRAINED, "snella", "lora"]
    assert all(row["images"] == 20 and 0 < row["nmi"] < 1 for row in plot.tables["nmi"])
    panels = {
        label: [(row["image"], row["class"]) for row in plot.rows if row["run"] == label]
        for label in ("snella", "lora")
    }
    assert panels["snella"] == panels["lora"] and len(panels["lora"]) == 20
    coordinates = {label: [row["x"] for row in plot.rows if row["run"] == label] for label in ("snella", "lora")}
    assert coordinates["snella"] != coordinates["lora"]
    assert len(write_plots([plot], tmp_path / "plots")) == 6
