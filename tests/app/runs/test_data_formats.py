"""Runs on tables, Python objects and other channel counts: training, evaluation, prediction, resuming and merging."""

import csv

import datasets
import numpy as np
import pytest
import timm
import torch
from PIL import Image

from snella_app.backbones.create import create_backbone
from snella_app.data.images import read_image
from snella_app.runs import load_run
from snella_app.runs.evaluate import evaluate
from snella_app.runs.merge import merge
from snella_app.runs.predict import load
from snella_app.training.session import TrainingInterrupted
from snella_app.training.train import train

from ..training.components import interrupt_before


@pytest.fixture
def table(photos):
    """Table of the photographs in groups of four images."""
    rows = [
        (f"{p.parent.name}/{p.name}", p.parent.name, f"{p.parent.name}-{int(p.stem) // 4}")
        for p in photos.rglob("*.png")
    ]
    file = photos / "labels.csv"
    with file.open("w", newline="") as lines:
        csv.writer(lines).writerows([("where", "species", "patient"), *sorted(rows)])
    return file


@pytest.fixture
def fast(settings, no_report):
    """Return the configuration of a one-epoch run."""
    return lambda **changes: settings(**{"method": "linear", "epochs": 1, **changes})


def test_a_run_on_a_table_trains_evaluates_and_predicts(fast, table, console, tmp_path):
    run = train(fast(data=f"csv:{table}", columns="path=where"), console)
    assert "columns: path 'where', label 'species', group 'patient'" in console.file.getvalue()
    metrics = run.read_json("metrics.json")
    assert evaluate(run.path)["confusion"] == metrics["test"]["confusion"]
    folder = f"folder:{table.parent}"
    assert evaluate(run.path, folder)["confusion"] == evaluate(run.path, f"csv:{table}", split="all")["confusion"]
    small = table.parent / "small.csv"
    small.write_text("where,species\ncats/000.png,cats\nowls/001.png,owls\n")
    assert evaluate(run.path, f"csv:{small}")["images"] == 2
    named, direct = load(run.path).predict([f"csv:{table}"]), load(run.path).predict([small])
    assert len(named) == 48 and [str(p.path) for p in direct] == [
        f"{table.parent}/cats/000.png",
        f"{table.parent}/owls/001.png",
    ]
    for prediction in direct:
        other = next(p for p in named if p.path == prediction.path)
        assert [name for name, _ in prediction.ranking] == [name for name, _ in other.ranking]
        assert other.probabilities == pytest.approx(prediction.probabilities, abs=1e-6)  # of another batch size
    small.unlink()


def test_replaced_pixels_and_changed_groups_are_detected(fast, photos, tmp_path, console):
    root = tmp_path / "copy"
    for file in photos.rglob("*.png"):
        (root / file.parent.name).mkdir(parents=True, exist_ok=True)
        (root / file.parent.name / file.name).write_bytes(file.read_bytes())
    names = sorted(f"{p.parent.name}/{p.name}" for p in root.rglob("*.png"))

    def write(groups):
        lines = [f"{name},{name[:4]},{groups}{index // 4}" for index, name in enumerate(names)]
        (root / "x.csv").write_text("\n".join(["file,label,group", *lines]))

    write("g")
    run = train(fast(data=f"csv:{root}/x.csv"), console)
    first = load(run.path).predict([root / "cats/000.png"])
    evaluate(run.path)
    write("h")
    with pytest.raises(ValueError, match=r"data must contain the images of "):
        evaluate(run.path)
    write("g")
    Image.new("RGB", (32, 32)).save(root / load_run(run.path).folder.read_json("predictions.json")["items"][0]["name"])
    with pytest.raises(ValueError, match="files with the same names but different contents"):
        evaluate(run.path, split="val")
    assert first[0].label in ("cats", "dogs", "owls")


class Noise(torch.utils.data.Dataset):
    classes = ("dark", "bright")

    def __len__(self):
        return 24

    def __getitem__(self, row):
        pixels = np.random.default_rng(row).integers(0, 120, (32, 32, 3)) + 130 * (row % 2)
        return Image.fromarray(pixels.astype(np.uint8)), row % 2


def test_a_run_on_a_python_object_trains_and_resumes(fast, console):
    config = fast(data="python:noise", epochs=2, head_init="random")
    with interrupt_before(1), pytest.raises(TrainingInterrupted, match="checkpoint-2") as caught:
        train(config, console, data=Noise())
    assert str(caught.value).endswith(f"; resume with: snella.train(data=..., out={config.run.out!r}, resume=True)")
    with pytest.raises(ValueError, match="data python:noise is a Python object; pass it to train or evaluate"):
        train(config.replace(resume=True), console)
    run = train(config.replace(resume=True), console, data=Noise())
    info = run.read_json("run.json")
    assert info["classes"] == ["dark", "bright"] and info["data"]["spec"] == "python:noise"
    assert evaluate(run.path, Noise())["confusion"] == run.read_json("metrics.json")["test"]["confusion"]
    with pytest.raises(ValueError, match="data python:noise is a Python object; pass it to train or evaluate"):
        evaluate(run.path)
    rows = [Noise()[row] for row in range(24)]
    hub = datasets.Dataset.from_dict({"image": [image for image, _ in rows], "label": [label for _, label in rows]})
    assert (
        evaluate(run.path, hub.cast_column("label", datasets.ClassLabel(names=["dark", "bright"])), split="all")[
            "accuracy"
        ]
        == evaluate(run.path, Noise(), split="all")["accuracy"]
    )


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_the_first_convolution_is_converted_as_in_timm(channels):
    torch.manual_seed(0)
    plain = create_backbone("test_vit", num_classes=2, pretrained=False)
    torch.manual_seed(0)
    model = create_backbone("test_vit", num_classes=2, pretrained=False, channels=channels)
    weight, adapted = plain.patch_embed.proj.weight, model.patch_embed.proj.weight
    if channels == 1:
        assert torch.equal(adapted, weight.sum(1, keepdim=True))
    else:
        assert torch.equal(adapted, torch.cat([weight, weight], 1)[:, :channels] * (3 / channels))
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"][0] == channels == len(config["mean"]) == len(config["std"])
    assert model(torch.zeros(1, *config["input_size"])).shape == (1, 2)


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_a_run_on_images_with_other_channel_counts_trains_and_merges(channels, fast, console, tmp_path):
    for label in range(2):
        (tmp_path / "x" / "ab"[label]).mkdir(parents=True)
        for index in range(8):
            values = np.random.default_rng([label, index]).integers(0, 150, (channels, 32, 32)).astype(np.uint8)
            values[label % channels] += 90 if channels > 1 else 90 * label
            file = tmp_path / "x" / "ab"[label] / f"{index}"
            if channels == 6:
                np.save(file.with_suffix(".npy"), values)
            else:
                Image.fromarray(np.moveaxis(values, 0, -1).squeeze()).save(file.with_suffix(".png"))
    changes = {"channels": channels, "method": "snella-2", "method_options": {}, "final_head": "auto"}
    run = train(fast(data=f"folder:{tmp_path}/x", **changes), console)
    assert f"is adapted to {channels} channel" in console.file.getvalue()
    assert run.read_json("run.json")["data_config"]["input_size"] == [channels, 32, 32]
    assert evaluate(run.path)["confusion"] == run.read_json("metrics.json")["test"]["confusion"]
    image = sorted((tmp_path / "x/a").iterdir())[0]
    (prediction,) = load(run.path).predict([image])
    result = merge(run.path, tmp_path / "merged")
    merged, use = result.path, result.snippet.splitlines()[-1].removeprefix("# ")
    if channels != 6:  # the printed code gives the class
        names: dict = {"image": Image.open(image)}
        exec(result.snippet, names)
        assert eval(use, names) == prediction.label
    else:
        assert "convert" not in use
    model = timm.create_model(f"local-dir:{merged}", pretrained=True).eval()
    loaded = load_run(run.path)
    inputs = loaded.transform(read_image(image, loaded.reading))[None]
    with torch.inference_mode():
        assert torch.allclose(model(inputs), loaded.model(inputs), atol=1e-5)
        assert prediction.label == loaded.classes[int(loaded.probe(inputs).argmax())]


def test_mismatched_channel_counts_are_rejected(fast, console, photos):
    for augment in ("imagenet", "randaugment", "trivialaugment", "3augment"):
        message = f"augment must be none, flip, crop or crop-no-flip for 4 channels, got '{augment}'"
        with pytest.raises(ValueError, match=message):
            fast(channels=4, augment=augment)
    with pytest.raises(ValueError, match="channels must be 3 with task 'segmentation', got 1"):
        fast(channels=1, task="segmentation")
    with pytest.raises(
        ValueError,
        match=r"channels and white apply only to folder:, csv:.*, got channels=1 with digits",
    ):
        train(fast(data="digits", channels=1), console)
    with pytest.raises(ValueError, match=r"48 of 48 images .*it must have 6 channels, got an array|cannot be read"):
        train(fast(channels=6), console)
