"""Runs whose images were moved, changed or deleted after training."""

import io
import shutil

import pytest
import timm
import torch
from PIL import Image
from rich.console import Console

from snella_app.config.train import TrainConfig
from snella_app.data.load import load_data
from snella_app.records.record import read
from snella_app.records.run import RunInfo
from snella_app.runs import RunFolder
from snella_app.runs.evaluate import evaluate, rewrite_report
from snella_app.runs.images import absolute_folder, check_splits, find_data, load_splits
from snella_app.runs.predict import load
from snella_app.training.session import TrainingInterrupted
from snella_app.training.train import train
from snella_app.training.trainer import SnellaTrainer


def splits_of(config):
    return load_splits(config.data, config.run.seed)


@pytest.fixture
def my_photos(photos, tmp_path):
    """Copy of the photographs that a test can modify."""
    return shutil.copytree(photos, tmp_path / "my_photos")


@pytest.fixture
def run_of(finished, tmp_path):
    """Return a function that copies a finished run and sets its data to a folder of the same photographs."""

    def make(folder, source=finished):
        run = RunFolder(shutil.copytree(source.path, tmp_path / "copy"))
        config = run.read_config().replace(data=f"folder:{folder}")
        run.write_config(config)
        data = run.read_json("run.json")["data"]
        run.update("finished", data={**data, "spec": config.data.spec, "folder": absolute_folder(config.data.spec)})
        return run

    return make


@pytest.fixture
def interrupted(settings, my_photos, console, monkeypatch, no_report):
    """Settings of a run on `my_photos`, interrupted after one epoch."""
    config = settings(data=f"folder:{my_photos}", epochs=2)
    training_step = SnellaTrainer.training_step

    def stop(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return training_step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SnellaTrainer, "training_step", stop)
        with pytest.raises(TrainingInterrupted, match="checkpoint-4"):
            train(config, console)
    return config


def test_run_json_stores_images_and_folder(finished, photos):
    data = finished.read_json("run.json")["data"]
    assert len(data["digest"]) == 64 and data["folder"] == str(photos)


@pytest.mark.parametrize(
    ("change", "current"), [("added", "train 3"), ("removed", "train 2"), ("renamed", "the same numb")]
)
def test_evaluating_on_changed_images_is_rejected_with_both_sizes(change, current, run_of, my_photos):
    run = run_of(my_photos)
    first = my_photos / "cats" / "000.png"
    if change == "added":
        for number in range(8):
            shutil.copy(first, my_photos / "cats" / f"new{number}.png")
    elif change == "removed":
        for number in range(8):
            (my_photos / "cats" / f"{number:03}.png").unlink()
    else:
        first.rename(my_photos / "cats" / "zzz.png")
    sizes = ", ".join(f"{k} {v}" for k, v in run.read_json("run.json")["data"]["sizes"].items())
    with pytest.raises(
        ValueError,
        match=rf"images of .*copy, {sizes} in .*my_photos, got {current}.*evaluate on other images with --data",
    ):
        evaluate(run.path)
    assert evaluate(run.path, f"folder:{my_photos}")["split"] == "all"


def replace_pixels(path):
    """Replace an image under the same name."""
    Image.eval(Image.open(path), lambda value: 255 - value).save(path)


def test_a_replaced_image_is_detected_in_the_evaluated_split(run_of, my_photos):
    run = run_of(my_photos)
    splits = splits_of(run.read_config())
    before = evaluate(run.path)
    assert before["notes"] == []
    replace_pixels(splits.test.source.paths[splits.test.rows[0]])
    with pytest.raises(
        ValueError, match=r"the same names but different contents in folder:.*my_photos \(test\): .*or train a new run"
    ):
        evaluate(run.path)
    with pytest.raises(ValueError, match=r"different contents in folder:.*my_photos \(test\)"):
        evaluate(run.path, split="all")
    assert evaluate(run.path, split="val")["split"] == "val"
    other = evaluate(run.path, f"folder:{my_photos}")
    assert other["split"] == "all"
    note = "the files have the same names as the run's images but different contents in test: evaluated as other data"
    assert note in other["notes"]


def test_unchecked_images_are_noted(run_of, my_photos):
    run = run_of(my_photos)
    before = evaluate(run.path)
    data = run.read_json("run.json")["data"]
    contents = {name: digest for name, digest in data["contents"].items() if name != "test"}
    run.update("finished", data=data | {"contents": contents})
    after = evaluate(run.path)
    assert after["confusion"] == before["confusion"]
    assert [note for note in after["notes"] if note not in before["notes"]] == [
        "cannot check test for replaced images: the run did not read this split, so run.json has no digest of it"
    ]


def test_unused_test_images_are_not_read(settings, console, no_report):
    run = train(settings(epochs=1), console, evaluate_test=False)
    assert list(run.read_json("run.json")["data"]["contents"]) == ["train", "val"]


def test_resuming_on_replaced_images_is_rejected(interrupted, my_photos):
    train_images = splits_of(interrupted).train
    replace_pixels(train_images.source.paths[train_images.rows[0]])
    with pytest.raises(ValueError, match=r"different contents in folder:.*my_photos \(train\): images were replaced"):
        train(TrainConfig.from_flat(out=interrupted.run.out, resume=True), Console(file=io.StringIO()))


def test_moved_images_are_recognized(run_of, my_photos, any_run, tmp_path):
    run = run_of(my_photos, any_run)
    moved = my_photos.rename(tmp_path / "moved")
    with pytest.raises(
        FileNotFoundError,
        match=r"data of .*copy no longer exists: no folder at folder:.*my_photos; "
        r"pass its new location with --data folder",
    ):
        evaluate(run.path)
    result = evaluate(run.path, f"folder:{moved}")
    assert result["split"] == "test"
    assert result["confusion"] == any_run.read_json("metrics.json")["test"]["confusion"]


def test_a_relative_folder_is_found_from_another_directory(photos, tmp_path, monkeypatch):
    stored = str(photos)
    monkeypatch.chdir(photos.parent)
    assert find_data(tmp_path, "folder:all", stored) == "folder:all"
    assert find_data(tmp_path, "digits", stored) == "digits"
    assert absolute_folder("folder:all") == str(photos) and absolute_folder("digits") is None
    monkeypatch.chdir(tmp_path)
    assert find_data(tmp_path, "folder:all", stored) == f"folder:{photos}"
    (tmp_path / "all").mkdir()  # a different folder of the same name
    assert find_data(tmp_path, "folder:all", stored) == f"folder:{photos}"
    assert find_data(tmp_path, "folder:all", str(tmp_path / "gone")) == "folder:all"
    (tmp_path / "all").rmdir()
    with pytest.raises(FileNotFoundError, match=r"no folder at folder:all or .*gone; pass its new location"):
        find_data(tmp_path, "folder:all", str(tmp_path / "gone"))


def test_relative_datasets_and_shards_are_found_from_another_directory(tmp_path, monkeypatch):
    shards = tmp_path / "data" / "shards"
    shards.mkdir(parents=True)
    (shards / "train-000.tar").touch()
    specs = {
        "hf:data": f"hf:{tmp_path / 'data'}",
        "wds:data/shards": f"wds:{shards}",
        "wds:data/shards/train-{000..000}.tar": f"wds:{shards}/train-{{000..000}}.tar",
    }
    monkeypatch.chdir(tmp_path)
    stored = {spec: absolute_folder(spec) for spec in specs}
    assert all(find_data(tmp_path, spec, stored[spec]) == spec for spec in specs)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert {spec: find_data(tmp_path, spec, stored[spec]) for spec in specs} == specs
    assert find_data(tmp_path, "hf:owner/name", None) == "hf:owner/name"
    with pytest.raises(FileNotFoundError, match=r"no folder at hf:data or .*gone; pass its new location"):
        find_data(tmp_path, "hf:data", str(tmp_path / "gone"))


def test_weights_are_found_from_another_directory(settings, photos, console, no_report, tmp_path, monkeypatch):
    folders = [tmp_path / "first", tmp_path / "second"]
    for seed, folder in enumerate(folders):  # two folders with different weights of the same name
        folder.mkdir()
        torch.manual_seed(seed)
        torch.save(timm.create_model("test_vit").state_dict(), folder / "w.pth")
    monkeypatch.chdir(folders[0])
    config = settings(method="linear", epochs=1, weights="w.pth", pretrained=True, out=str(tmp_path / "run"))
    run = train(config, console)
    expected = load(run.path).predict(photos)
    monkeypatch.chdir(folders[1])
    assert load(run.path).predict(photos) == expected
    (folders[1] / "w.pth").replace(folders[0] / "w.pth")
    with pytest.raises(ValueError, match=r"pre-trained weights of the run have changed: .*first/w.pth differs"):
        load(run.path)


def test_resuming_on_changed_images_is_rejected_and_changes_nothing(interrupted, my_photos):
    run = RunFolder(interrupted.run.out)
    before = (run.path / "run.json").read_bytes()
    (my_photos / "cats" / "000.png").rename(my_photos / "cats" / "zzz.png")
    with pytest.raises(ValueError, match=r"in .*my_photos, got the same numbers of images, but different names"):
        train(TrainConfig.from_flat(out=interrupted.run.out, resume=True), Console(file=io.StringIO()))
    assert (run.path / "run.json").read_bytes() == before


def test_resuming_accepts_moved_images(interrupted, my_photos, tmp_path):
    moved = my_photos.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="pass its new location with --data folder:NEW"):
        train(TrainConfig.from_flat(out=interrupted.run.out, resume=True), Console(file=io.StringIO()))
    config = TrainConfig.from_flat(out=interrupted.run.out, resume=True, data=f"folder:{moved}")
    run = train(config, Console(file=io.StringIO()))
    assert run.status == "finished" and run.read_config().data.spec == config.data.spec
    assert run.read_json("run.json")["data"]["folder"] == str(moved)
    assert evaluate(run.path)["split"] == "test"


def test_resuming_a_run_without_data_digest_on_other_data_is_rejected(interrupted):
    run = RunFolder(interrupted.run.out)
    run.update("interrupted", data={"spec": interrupted.data.spec})
    with pytest.raises(ValueError, match=r"data is 'folder:.*' there and 'digits' here; leave them out"):
        train(TrainConfig.from_flat(out=interrupted.run.out, resume=True, data="digits"), Console(file=io.StringIO()))


@pytest.mark.parametrize("change", ["removed", "renamed"])
def test_a_report_without_images_has_a_note(change, run_of, my_photos, console):
    run = run_of(my_photos)
    rewrite_report(run.path, console)
    assert "<img" in run.report.read_text() and not console.file.getvalue()
    if change == "removed":
        shutil.rmtree(my_photos)
    else:
        (my_photos / "cats" / "000.png").rename(my_photos / "cats" / "zzz.png")
    assert rewrite_report(run.path, console) == run.report
    assert "<img" not in run.report.read_text()
    assert "note: the report has no images: " in console.file.getvalue()


def test_a_report_without_a_run_is_rejected(tmp_path):
    with pytest.raises(FileNotFoundError, match="this is not a run folder"):
        rewrite_report(tmp_path)


def test_unchanged_images_are_accepted(finished):
    check_splits(finished.path, read(RunInfo, finished.path).data, splits_of(finished.read_config()))


def test_a_run_is_evaluated_on_images_of_one_class(finished, my_photos):
    for name in ("dogs", "owls"):
        shutil.rmtree(my_photos / name)
    result = evaluate(finished.path, f"folder:{my_photos}")
    predicted = load(finished.path, "cpu").predict([str(path) for path in sorted((my_photos / "cats").iterdir())])
    assert result["images"] == 16
    assert result["accuracy"] == sum(prediction.label == "cats" for prediction in predicted) / 16
    with pytest.raises(ValueError, match="at least two classes are required, got one: 'cats'"):
        load_data(f"folder:{my_photos}")
