"""Image plots: selection of images, Dice scores and heat maps."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from snella_app.runs import RunFolder
from snella_app.runs.layer_probe import LAYER_PROBE, LayerProbe, layer_features, linear_head, probed_layers
from snella_app.runs.model import load_run
from snella_lab.analysis.images import (
    PRETRAINED,
    _class_balanced_indices,
    center_fraction,
    gradcam,
    images,
    mean_dice,
    samples,
)


def test_samples_cycle_through_the_classes():
    (plot,) = samples(["digits"], limit=4)
    assert [row["class"] for row in plot.rows] == ["0", "1", "2", "3"] and len({r["image"] for r in plot.rows}) == 4
    plot.draw().draw_without_rendering()
    assert _class_balanced_indices([0, 0, 1], 3, seed=1)[0] in (0, 1)
    assert len(_class_balanced_indices([0, 0, 1], 5, seed=0)) == 3


@pytest.fixture
def birds(tmp_path):
    """Return a function that writes an experiment on images with two label columns."""
    table = ["path,id,species"]
    for number in range(12):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
        table.append(f"{number}.png,{'cdef'[number % 4]},{'ab'[number % 2]}")
    (tmp_path / "birds.csv").write_text("\n".join(table))

    def write(label):
        file = tmp_path / f"{label}.yaml"
        file.write_text(
            f"name: birds\nbackbone: test_vit\nmethods: [linear]\n"
            f"data: [{{data: 'csv:{tmp_path / 'birds.csv'}', columns: label={label}}}]\ntrain: {{pretrained: false}}\n"
        )
        return str(file)

    return write


def test_samples_of_an_experiment_use_its_data_settings(birds):
    (plot,) = samples([birds("species")], limit=2)
    assert [row["class"] for row in plot.rows] == ["a", "b"]


def test_captions_of_samples_match_their_row_if_names_of_data_are_equal(birds):
    (plot,) = samples([birds("species"), birds("id")], limit=2)
    texts = [text.get_text() for text in plot.draw().texts]
    assert [text for text in texts if len(text) == 1] == ["a", "b", "c", "d"]


def test_images_are_matched_by_file_name(tmp_path):
    for folder, names in (
        ("subject", ["a.png"]),
        ("lora", ["0-0.png", "1-0.png", "x.png"]),
        ("snella", ["1-0.png", "0-0.png"]),
    ):
        (tmp_path / folder).mkdir()
        for name in names:
            Image.new("RGB", (8, 8)).save(tmp_path / folder / name)
    (plot,) = images([tmp_path / name for name in ("subject", "lora", "snella")])
    shown = [(row["folder"], row["image"]) for row in plot.rows]
    both = ["0-0.png", "1-0.png"]
    assert shown == [("subject", "a.png"), *(("lora", n) for n in both), *(("snella", n) for n in both)]
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="none contains no images"):
        images([tmp_path / "none"])


def test_dice_is_averaged_over_the_classes_present():
    mask, truth = np.array([[1, 1], [2, 0]]), np.array([[1, 0], [0, 0]])
    assert mean_dice(mask, truth) == pytest.approx((2 * 1 / 3 + 0) / 2)
    assert mean_dice(np.zeros((2, 2)), np.zeros((2, 2))) == 1.0


def test_gradcam_uses_the_same_images_for_all_models(old_run):
    pytest.importorskip("captum")
    path = old_run / "adapter" / "adapter_model.safetensors"
    # after two epochs, the update only changes the last bits of a small map
    save_file({name: 10 * value if "snella_A" in name else value for name, value in load_file(path).items()}, path)
    RunFolder(old_run).finish()
    (plot,) = gradcam([old_run], limit=3, device="cpu")
    names = {label: [row["image"] for row in plot.rows if row["run"] == label] for label in (PRETRAINED, "snella")}
    assert names[PRETRAINED] == names["snella"] and len(names["snella"]) == 3
    shares = {label: [row["share_in_middle"] for row in plot.rows if row["run"] == label] for label in names}
    assert shares[PRETRAINED] != shares["snella"]  # the update changes the evidence


def test_gradcam_explains_the_final_head(old_run, save_run):
    pytest.importorskip("captum")
    model = load_run(old_run, "cpu").model
    layers = probed_layers(model)
    width = layer_features(model, torch.zeros(1, 3, 32, 32), layers).shape[1]
    constant = linear_head(torch.zeros(10, width), torch.zeros(10))
    LayerProbe(model, layers, constant).save(old_run / "adapter" / LAYER_PROBE)
    RunFolder(old_run).finish()
    (plot,) = gradcam([old_run, save_run("trained")], limit=3, device="cpu")
    shares = {label: {r["share_in_middle"] for r in plot.rows if r["run"] == label} for label in ("snella", "trained")}
    assert shares["snella"] == {0} != shares["trained"]
    assert {row["share_in_middle"] for row in plot.rows if row["run"] == PRETRAINED} == {0}


def test_only_the_first_run_of_gradcam_needs_a_head_that_fits_the_pretrained_model(old_run, save_run):
    pytest.importorskip("captum")
    wide = save_run("wide", method="mlp-2")
    shutil.copy(old_run / "config.yaml", wide)
    with pytest.raises(ValueError, match=r"first run, .*wide \(method 'mlp-2'\), has neither .*; begin with"):
        gradcam([wide, old_run], data="digits", limit=1, device="cpu")
    (plot,) = gradcam([old_run, wide], limit=1, device="cpu")
    assert [row["run"] for row in plot.rows] == [PRETRAINED, "snella", "wide"]


def test_center_fraction_of_a_constant_map_is_one_ninth():
    assert center_fraction(np.ones((9, 9))) == pytest.approx(1 / 9) and center_fraction(np.zeros((9, 9))) == 0
    corner = np.zeros((6, 6))
    corner[0, 0] = 1
    assert center_fraction(corner) == 0


def test_indices_cycle_through_the_classes():
    labels = [0] * 1000 + [1] * 2
    chosen = _class_balanced_indices(labels, 6, 0)
    assert [labels[index] for index in chosen] == [0, 1, 0, 1, 0, 0]
    assert sorted(_class_balanced_indices(labels, 2000, 0)) == list(range(1002))
