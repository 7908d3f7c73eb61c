"""Cross-validation: folds, the table over them, resuming, and the ensemble."""

import csv
import functools
import shutil
import statistics

import pytest
import torch
from rich.console import Console

from snella_app.cli.main import main
from snella_app.config.train import TrainConfig
from snella_app.data.load import load_data
from snella_app.data.options import DataConfig
from snella_app.records.record import read
from snella_app.records.run import FoldResults, FoldRow
from snella_app.runs import RunFolder, load_run
from snella_app.runs.evaluate import evaluate
from snella_app.runs.predict import load
from snella_app.training.folds import _cells, train_folds
from snella_app.training.session import RunInUseError, TrainingInterrupted, lock_run

from .components import interrupt_before

SHORT = {"method": "linear", "epochs": 1, "folds": 3}


@pytest.fixture
def fast(settings, no_report):
    """Return the configuration of three folds with one epoch each."""
    return lambda **changes: settings(**{**SHORT, **changes})


@pytest.fixture(scope="module")
def finished_folds(photos, tiny_run, tmp_path_factory):
    """Return a function that trains `SHORT` once per final head and returns its folder, only to read or copy it."""

    @functools.cache
    def make(final_head):
        values = {**tiny_run, **SHORT, "method_options": {}, "final_head": final_head}
        root = tmp_path_factory.mktemp("folds") / "run"
        config = TrainConfig.from_flat(**values, data=f"folder:{photos}", out=str(root))
        train_folds(config, Console(quiet=True), render_report=False)
        return root

    return make


def test_every_image_is_held_out_once_with_stratified_classes(photos):
    held_out = []
    for fold in (1, 2, 3, 4):
        data = load_data(f"folder:{photos}", DataConfig(folds=4, fold=fold), seed=2)
        names = [part.names for part in (data.train, data.val, data.test)]
        assert sum(map(len, names)) == 48 == len({name for part in names for name in part})
        assert [data.test.labels.count(label) for label in range(3)] == [4, 4, 4]
        assert data.fold_part == "test" and f"fold {fold} of 4 is the test split" in data.notes
        held_out += data.test.names
    assert len(set(held_out)) == 48
    with pytest.raises(
        ValueError, match="folds must be at most the number of images of each class, got 20; 'cats' has"
    ):
        load_data(f"folder:{photos}", DataConfig(folds=20, fold=1))


def test_groups_are_never_split_across_folds(photos, tmp_path):
    rows = [(str(p), p.parent.name, f"g{int(p.stem) // 4}-{p.parent.name}") for p in photos.rglob("*.png")]
    with (tmp_path / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "group"), *sorted(rows)])
    groups = [
        load_data(f"csv:{tmp_path}/x.csv", DataConfig(folds=4, fold=fold)).test.annotations.groups
        for fold in (1, 2, 3, 4)
    ]
    assert sorted(map(len, groups)) == [12] * 4 and len(set().union(*groups)) == 12 == sum(len(set(g)) for g in groups)
    with pytest.raises(
        ValueError, match="folds must be at most 12, the number of groups or of images in the largest class, got 13"
    ):
        load_data(f"csv:{tmp_path}/x.csv", DataConfig(folds=13, fold=1))


def test_folds_are_validation_splits_for_data_with_a_test_split(make_photos, tmp_path):
    make_photos(tmp_path / "x/train", {"a": 9, "b": 9})
    make_photos(tmp_path / "x/test", {"a": 3, "b": 3}, contrast=40)
    data = load_data(f"folder:{tmp_path}/x", DataConfig(folds=3, fold=2))
    assert [len(part) for part in (data.train, data.val, data.test)] == [12, 6, 6] and data.fold_part == "val"


def test_the_table_lists_each_fold_and_the_mean(finished_folds):
    root = finished_folds("trained")
    results = read(FoldResults, root)
    assert results.held_out == "test"
    accuracies = [RunFolder(root / f"fold-{k}").read_json("metrics.json")["test"]["accuracy"] for k in (1, 2, 3)]
    assert [row.scores["accuracy"] for row in results.rows] == accuracies
    last = (root / "folds.md").read_text().splitlines()[-1]
    assert f"{statistics.mean(accuracies):.4f} ± {statistics.stdev(accuracies):.4f}" in last
    page = (root / "folds.html").read_text()
    assert 'href="fold-2/report.html"' in page and "mean ± standard deviation" in page
    assert evaluate(root / "fold-2")["accuracy"] == accuracies[1]


def test_numbers_of_images_have_no_decimals():
    rows = [FoldRow(fold, f"fold-{fold}", 1, {"dice": 0.5, "images": 52.0 + fold}, {}) for fold in (1, 2)]
    columns, cells = _cells(FoldResults(2, "test", rows))
    assert columns == ["fold", "test dice", "test images", "best epoch"]
    assert cells[0] == ["1", "0.5000", "53", "1"] and cells[-1][1:3] == ["0.5000 ± 0.0000", "53.5 ± 0.7"]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_phone_shows_the_mean_without_scrolling(finished_folds, browser):
    browser.open(finished_folds("trained") / "folds.html", width=390)
    right = browser.evaluate("document.querySelector('tbody tr:last-child td').getBoundingClientRect().right")
    assert right < 390 and browser.evaluate("document.documentElement.scrollWidth") <= 390


def test_an_interrupted_cross_validation_is_resumed(fast, console, tmp_path, monkeypatch):
    from snella_app.training import folds

    def stop_at_two(config, *rest, **options):
        if config.data.fold == 2:
            raise KeyboardInterrupt
        return original(config, *rest, **options)

    original = folds.train
    monkeypatch.setattr(folds, "train", stop_at_two)
    with pytest.raises(KeyboardInterrupt):
        train_folds(fast(), console)
    root = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match=r"has 1 of 3 folds; finish it with snella train --out .*run --resume"):
        load_run(root)
    with pytest.raises(FileExistsError, match="contains a cross-validation with 3 folds; continue it with --resume"):
        train_folds(fast(), console)
    with pytest.raises(
        ValueError, match=r"resume continues .* with its stored settings, but epochs is 1 there and 2 here"
    ):
        train_folds(fast(epochs=2, resume=True), console)
    assert folds._prepare_config(fast(resume=True, shard=True), RunFolder(root)).run.shard
    before = (root / "fold-1/metrics.json").read_bytes()
    monkeypatch.setattr(folds, "train", original)
    results = train_folds(fast(resume=True, data=None, backbone=None), console)
    assert len(results.rows) == 3 and (root / "fold-1/metrics.json").read_bytes() == before
    assert main(["train", "--out", str(root), "--resume"]) == 0


def test_folds_store_the_content_of_a_class_weights_file(fast, tmp_path):
    from snella_app.training import folds

    weights = tmp_path / "weights.json"
    weights.write_text('{"cats": 1, "dogs": 3}')
    folder = RunFolder(tmp_path / "run")
    folds._prepare_config(fast(class_weights=str(weights)), folder)
    assert folder.read_config().optim.class_weights == {"cats": 1.0, "dogs": 3.0}
    folds._prepare_config(fast(class_weights=str(weights), resume=True), folder)
    weights.write_text('{"cats": 1, "dogs": 4}')
    with pytest.raises(ValueError, match=r"class_weights is \{.*3\.0\} there and \{.*4\.0\} here"):
        folds._prepare_config(fast(class_weights=str(weights), resume=True), folder)


def test_an_interrupted_fold_is_resumed_with_the_cross_validation(fast, console, tmp_path):
    with interrupt_before(0), pytest.raises(TrainingInterrupted, match=rf"--out '{tmp_path}/my run' --resume"):
        train_folds(fast(out=str(tmp_path / "my run")), console)


def test_a_finished_cross_validation_is_read_from_a_read_only_disk(
    finished_folds, fast, console, tmp_path, monkeypatch
):
    expected = read(FoldResults, shutil.copytree(finished_folds("trained"), tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write", lambda *_: pytest.fail("results were written"))
        patch.setattr("snella_app.training.folds.write_text", lambda *_: pytest.fail("the table was written"))
        assert train_folds(fast(resume=True, data=None, backbone=None), console) == expected
    (tmp_path / "run" / "folds.html").unlink()
    train_folds(fast(resume=True, data=None, backbone=None), console)
    assert (tmp_path / "run" / "folds.html").is_file()


def test_an_output_file_is_rejected(fast, console, tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(FileExistsError, match=f"out must be a folder, got the file '{tmp_path}/run'; choose another"):
        train_folds(fast(), console)


def test_overwriting_spares_the_folds_of_a_running_process(finished_folds, fast, console, tmp_path):
    shutil.copytree(finished_folds("trained"), tmp_path / "run")
    runs = [RunFolder(tmp_path / "run" / f"fold-{fold}") for fold in (1, 2)]
    with lock_run(runs[1]), pytest.raises(RunInUseError, match="is locked by running process"):
        train_folds(fast(overwrite=True), console)
    assert [run.status for run in runs] == ["finished"] * 2


@pytest.mark.parametrize("final_head", ["trained", "auto"])
def test_predictions_average_all_models(final_head, finished_folds, photos, capsys):
    root, image = finished_folds(final_head), photos / "cats/000.png"
    assert (load_run(root / "fold-1").probe is not None) == (final_head == "auto")
    single = [load(root / f"fold-{k}").predict([image])[0] for k in (1, 2, 3)]
    (together,) = load(root).predict([image])
    for name, probability in together.ranking:
        assert probability == pytest.approx(
            statistics.mean(dict(prediction.ranking)[name] for prediction in single), abs=1e-6
        )
    assert main(["evaluate", str(root)]) == 0
    assert f"accuracy {evaluate(root)['accuracy']:.4f}" in capsys.readouterr().out
    assert isinstance(load_run(root).model(torch.zeros(1, 3, 32, 32)), torch.Tensor)
    for tta in (1, 2):
        message = rf"tta must be left out for a cross-validation run \(got {tta}\); its models use the tta of their"
        with pytest.raises(ValueError, match=message):
            load(root).predict([image], tta=tta)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"folds": 1}, "folds must be at least 2, got 1"),
        ({"fold": 4}, "fold must be at most folds, got 4 with folds 3"),
        ({"folds": None, "fold": 1}, "fold must be at most folds, got 1 with folds unset"),
        ({"protocol": "final"}, "protocol must be standard with folds, got 'final'"),
    ],
)
def test_invalid_folds_are_rejected(changes, message, fast):
    with pytest.raises(ValueError, match=message):
        fast(**changes)


def test_a_started_fold_is_resumed_with_its_resolved_settings(fast, console, tmp_path):
    config = fast(batch_size="auto", method="snella-2", epochs=2)
    with interrupt_before(1), pytest.raises(TrainingInterrupted):
        train_folds(config, console)
    root = tmp_path / "run"
    assert RunFolder(root / "fold-1").status == "interrupted"
    results = train_folds(TrainConfig.from_flat(out=str(root), resume=True, progress=False), console)
    assert len(results.rows) == 3


def test_a_resumed_cross_validation_rejects_added_images(fast, console, tmp_path, monkeypatch, make_photos):
    from snella_app.training import folds

    original, data = folds.train, tmp_path / "photos"
    make_photos(data, {"a": 9, "b": 9})

    def stop_at_two(config, *rest, **options):
        if config.data.fold == 2:
            raise KeyboardInterrupt
        return original(config, *rest, **options)

    monkeypatch.setattr(folds, "train", stop_at_two)
    config = fast(data=f"folder:{data}")
    with pytest.raises(KeyboardInterrupt):
        train_folds(config, console)
    shutil.copy(data / "a/000.png", data / "a/new.png")
    with pytest.raises(ValueError, match=r"data must contain the images of .*fold-1.* files were added"):
        train_folds(config.replace(resume=True), console)
