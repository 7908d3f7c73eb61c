"""`snella.load`: predictions for one or several images of all input types."""

import dataclasses
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import snella
from snella_app.console import make_console
from snella_app.data.images import read_image
from snella_app.data.options import Reading
from snella_app.methods import build_method
from snella_app.records.record import plain
from snella_app.records.run import Calibration
from snella_app.runs import RunFolder
from snella_app.runs.evaluate import evaluate
from snella_app.runs.image_inputs import expand, new_files, read_input
from snella_app.runs.layer_probe import LayerProbe, linear_head, probed_layers
from snella_app.runs.predict import Predictor, _head, check_shape, load
from snella_app.runs.prediction_files import _collect_signals, predict_to_files, write_features
from snella_app.tasks import RegressionTask
from snella_app.tasks.task import MAX_VIEWS
from tests.processes import command


@pytest.fixture(scope="module")
def model(finished):
    return snella.load(finished.path)


@pytest.fixture
def calibrated(finished, tmp_path):
    """Run with temperature 2 and a threshold."""
    run = RunFolder(shutil.copytree(finished.path, tmp_path / "calibrated"))
    run.update("finished", calibration=plain(Calibration(2.0, 0.4)))
    return run.path


def assert_same(a, b):
    assert list(a.probabilities) == list(b.probabilities)
    assert list(a.probabilities.values()) == pytest.approx(list(b.probabilities.values()), abs=1e-6)


def test_three_lines_predict(finished, photos):
    model = snella.load(finished.path)
    prediction = model.predict(photos / "dogs" / "003.png")
    assert_same(prediction, load(finished.path).predict([photos / "dogs" / "003.png"])[0])
    assert model.classes == ["cats", "dogs", "owls"] and prediction.path == photos / "dogs" / "003.png"
    assert "snella-2, 3 classes, on cpu" in repr(model)


def test_all_input_types_give_the_same_prediction(model, photos):
    path = photos / "owls" / "004.png"
    image, array = Image.open(path), np.asarray(Image.open(path))
    tensor = torch.from_numpy(array.copy()).movedim(-1, 0)
    kinds = [str(path), image, path.read_bytes(), array, array / 255.0, tensor, tensor / 255, tensor.bfloat16() / 255]
    for kind in kinds[:-1]:
        assert_same(model.predict(kind), model.predict(path))
    assert model.predict(kinds[-1]).probability == pytest.approx(model.predict(path).probability, abs=0.05)
    assert [p.path.name for p in model.predict([path, image, array])] == ["004.png", "004.png", "[2]"]


def test_gray_and_transparent_arrays_are_converted_like_files(model):
    gray = np.arange(64, dtype=np.uint8).reshape(8, 8)
    assert_same(model.predict(gray), model.predict(np.stack([gray] * 3, axis=2)))
    assert_same(model.predict(gray[..., None]), model.predict(torch.from_numpy(gray)[None]))
    clear = np.zeros((8, 8, 4), np.uint8)
    assert_same(model.predict(clear), model.predict(np.full((8, 8, 3), 255, np.uint8)))


@pytest.mark.parametrize("white", [65535, 4095])
def test_16_bit_arrays_are_converted_like_files(white, tmp_path):
    values = np.linspace(0, white, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "gray.png")
    reading = Reading(white=white)
    expected = np.asarray(read_image(tmp_path / "gray.png", reading))
    colors = np.stack([values] * 3, axis=2)
    for array in (
        values,
        values.astype(">u2"),
        colors,
        torch.from_numpy(values),
        torch.from_numpy(np.moveaxis(colors, 2, 0).copy()),
    ):
        assert (np.asarray(read_input(array, "[0]", reading)) == expected).all()
    many = np.stack([values] * 5, axis=2)
    tensor = read_input(many, "[0]", Reading(channels=5, white=white))
    assert tensor.shape == (5, 8, 8) and tensor[2] == pytest.approx(values / white)


def test_one_image_gives_one_prediction_and_several_a_list(model, photos):
    batch = torch.rand(3, 3, 32, 32)
    together = model.predict(batch)
    for image, prediction in zip(batch, together, strict=True):
        assert_same(model.predict(image), prediction)
    assert len(model.predict(batch[:1])) == 1
    assert len(model.predict(photos / "cats")) == 16 and len(model.predict(str(photos / "**" / "00?.png"))) == 30


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (torch.zeros(2, 8, 8), ValueError, r"\[1, 3 or 4, height, width\] as a tensor, got \[2, 8, 8\] for \[0\]"),
        (
            np.zeros((8, 8, 3), np.int64),
            ValueError,
            r"uint8, uint16, or floating point from 0 to 1, got int64 for \[0\]$",
        ),
        (torch.randn(3, 8, 8) * 3 - 5, ValueError, "values from 0 to 1, got -.*before normalization"),
        (np.full((8, 8), np.nan), ValueError, "values from 0 to 1, got nan to nan"),
        (b"no image", ValueError, r"'\[0\]' is not a readable image"),
        (3.5, TypeError, "must be one or more files, PIL images, arrays or tensors, got float 3.5"),
        ([None], TypeError, r"got NoneType for \[0\]"),
        ([], ValueError, "images must name at least one file or folder, got none"),
        (np.zeros((0, 8, 8, 3), np.uint8), ValueError, "images must name at least one file or folder, got none"),
    ],
)
def test_an_invalid_input_is_reported(model, image, error, message):
    with pytest.raises(error, match=message):
        model.predict(image)


def test_load_reports_a_missing_run(finished):
    with pytest.raises(FileNotFoundError, match=r"no run .*rum; nearest: 'run'"):
        snella.load(finished.path.parent / "rum")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        snella.load(finished.path, batch_size=0)


def test_threads_share_a_model(model):
    images = torch.rand(8, 3, 32, 32)
    expected, actual = model.predict(images), {}

    def work(index):
        actual[index] = model.predict(images[index])

    threads = [threading.Thread(target=work, args=[i]) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, prediction in enumerate(expected):
        assert_same(actual[index], prediction)


def test_logits_are_divided_by_the_temperature_of_the_run(uncalibrated, calibrated, photos):
    for before, after in zip(uncalibrated.predict([photos]), load(calibrated).predict([photos]), strict=True):
        roots = {name: math.sqrt(p) for name, p in before.ranking}
        for name, p in after.ranking:
            assert p == pytest.approx(roots[name] / sum(roots.values()), abs=1e-6)


def test_views_are_averaged_as_probabilities(model, photos):
    """A temperature fitted to two views divides their average; one fitted to one view divides each view."""
    image = Image.open(photos / "cats" / "002.png")
    view, both = model.loaded.transform(image), model.predict(image)
    assert model.loaded.info.tta == 2 and model.temperature != 1
    assert_same(both, model.predict(image, tta=2))
    one_view = dataclasses.replace(model.loaded, info=dataclasses.replace(model.loaded.info, tta=1))
    each = Predictor(one_view).predict(image, tta=2)
    with torch.inference_mode():
        logits = model.loaded.model(torch.stack([view, view.flip(-1)]))
    of_average = (logits.softmax(1).mean(0).log() / model.temperature).softmax(0)
    average_of_each = (logits / model.temperature).softmax(1).mean(0)
    assert (of_average - average_of_each).abs().max() > 1e-4
    for actual, expected in ((both, of_average), (each, average_of_each)):
        for name, p in zip(model.classes, expected.tolist(), strict=True):
            assert actual.probabilities[name] == pytest.approx(p, abs=1e-5)
    alone = dict(zip(model.classes, (logits[0] / model.temperature).softmax(0).tolist(), strict=True))
    for actual in (model.predict(image, tta=1), Predictor(one_view).predict(image)):
        assert actual.probabilities == pytest.approx(alone, abs=1e-5)
    many = model.predict(image, tta=MAX_VIEWS)
    assert sum(many.probabilities.values()) == pytest.approx(1, abs=1e-5)
    assert many.probabilities != both.probabilities
    uniform = model.predict(np.full((32, 32, 3), 77, np.uint8))
    assert_same(uniform, model.predict(np.full((32, 32, 3), 77, np.uint8), tta=MAX_VIEWS))
    with pytest.raises(ValueError, match="tta must be between 1 and 10 views, got 11"):
        model.predict(image, tta=11)


def test_features_are_the_inputs_of_the_head(model, photos):
    features = model.features([photos / "cats"])
    head = model.loaded.model.get_base_model().get_classifier()
    with torch.no_grad():
        logits = head(torch.from_numpy(features)) / model.temperature
    for prediction, row in zip(model.predict([photos / "cats"], tta=1), logits.softmax(1), strict=True):
        assert prediction.probability == pytest.approx(float(row.max()), abs=1e-5)
    assert np.allclose(model.features(photos / "cats" / "000.png"), features[0], atol=1e-5)


def test_predictions_and_features_are_written_in_one_call(any_run, photos, tmp_path):
    table, features, model = tmp_path / "p.json", tmp_path / "f.npz", load(any_run.path)
    predict_to_files(str(any_run.path), [str(photos / "cats")], out=str(table), features=str(features))
    rows, predictions = json.loads(table.read_text()), model.predict(photos / "cats")
    assert [row["label"] for row in rows] == [prediction.label for prediction in predictions]
    assert [row["probability"] for row in rows] == pytest.approx([p.probability for p in predictions], abs=1e-6)
    with np.load(features) as file:
        assert file["images"].tolist() == [str(prediction.path) for prediction in predictions]
        assert np.allclose(file["features"], model.features(photos / "cats"), atol=1e-5)


def test_features_are_written_with_their_images(tmp_path):
    rows, names = [np.arange(3, dtype=np.float32), np.ones(3, np.float32)], ["a.jpg", "b.jpg"]
    with np.load(write_features(tmp_path / "f.npz", names, rows)) as file:
        assert file["images"].tolist() == names and np.array_equal(file["features"], np.stack(rows))
    assert np.array_equal(np.load(write_features(tmp_path / "f.npy", names, rows)), np.stack(rows))
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(write_features(tmp_path / "f.parquet", names, rows)).to_pydict()
    assert table == {"images": names, "features": [[0, 1, 2], [1, 1, 1]]}
    with pytest.raises(FileExistsError, match=r"features=.*f\.npy exists; .*--overwrite"):
        write_features(tmp_path / "f.npy", names, rows)
    with pytest.raises(ValueError, match=r"features must end with \.npz, \.npy, \.parquet, got '.*f\.txt'"):
        write_features(tmp_path / "f.txt", names, rows)


def test_predictions_below_a_threshold_are_unsure(calibrated, photos, tmp_path):
    model = snella.load(calibrated)
    for prediction in model.predict([photos], unsure="auto"):
        assert prediction.is_unsure == (prediction.probability < 0.4)
    assert not any(p.is_unsure for p in model.predict([photos]))
    assert all(p.is_unsure for p in model.predict([photos], unsure=1.0))
    predict_to_files(str(calibrated), [str(photos)], out=str(tmp_path / "p.csv"), unsure="auto", top_k=1)
    head, *rows = (tmp_path / "p.csv").read_text().splitlines()
    assert head == "image,label,probability,unsure"
    assert all((row.split(",")[3] == "yes") == (float(row.split(",")[2]) < 0.4) for row in rows)


@pytest.mark.parametrize(
    ("unsure", "message"),
    [
        ("auto", r"unsure must be a probability for a run without calibration, got 'auto'; use e\.g\. 0\.5"),
        (1.5, r"unsure must be auto or a probability in \(0, 1\], got 1\.5"),
        ("0.5", r"unsure must be auto or a probability in \(0, 1\], got '0\.5'"),
    ],
)
def test_an_invalid_threshold_is_rejected(uncalibrated, unsure, message):
    with pytest.raises(ValueError, match=message):
        uncalibrated.predict(torch.zeros(3, 8, 8), unsure=unsure)
    with pytest.raises(ValueError, match=r"unsure must be auto or a probability in \(0, 1\], got 'often'"):
        predict_to_files(str(uncalibrated.loaded.folder.path), ["x.jpg"], unsure="often")


@pytest.fixture
def uncalibrated(finished, tmp_path):
    """Run without temperature."""
    run = RunFolder(shutil.copytree(finished.path, tmp_path / "uncalibrated"))
    run.update("finished", calibration=None)
    return snella.load(run.path)


def test_paths_come_from_standard_input_tables_and_patterns(photos, tmp_path, monkeypatch):
    cats = sorted((photos / "cats").iterdir())
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{cats[0]}\n\n{cats[2]}\n"))
    assert expand(["-"]) == [cats[0], cats[2]]
    table = photos.parent / "table.csv"
    table.write_text(f"label,Path\ncats,all/cats/{cats[1].name}\ncats,all/cats/{cats[3].name}\n")
    assert expand([table]) == [photos.parent / "all/cats" / cats[i].name for i in (1, 3)]
    table.write_text("label,place\ncats,a.png\n")
    with pytest.raises(ValueError, match=r"table\.csv: no path column .*Columns: 'label'"):
        expand([table])
    assert expand([str(photos / "*" / "00[01].png")]) == sorted(photos.glob("*/00[01].png"))


def test_a_very_elongated_image_is_skipped_like_a_corrupt_one(finished, photos, tmp_path):
    Image.new("RGB", (3000, 2)).save(tmp_path / "line.png")
    model = load(finished.path)
    with pytest.raises(ValueError, match=r"its sides may differ by a factor of at most 200, got 3000×2; remove it"):
        model.predict(tmp_path / "line.png")
    images = [tmp_path / "line.png", photos / "cats" / "000.png"]
    assert [prediction.path for prediction in model.predict(images, skip_corrupt=True)] == images[1:]
    with pytest.raises(ValueError, match="at most 200, got 10000×1"):
        check_shape(torch.zeros(5, 1, 10_000), Path("array.npy"))


def test_a_table_with_a_prefix_may_have_any_suffix(photos):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cat = sorted((photos / "cats").iterdir())[0]
    parquet.write_table(pa.table({"path": [f"all/cats/{cat.name}"]}), photos.parent / "table.pq")
    (photos.parent / "table.txt").write_text(f"path\nall/cats/{cat.name}\n")
    for spec in ("parquet:table.pq", "csv:table.txt"):
        kind, _, name = spec.partition(":")
        assert expand([f"{kind}:{photos.parent / name}"]) == [photos.parent / "all/cats" / cat.name]


def test_new_files_are_yielded_once_when_complete(tmp_path, photos, monkeypatch):
    (tmp_path / "inner").mkdir()
    monkeypatch.setattr("snella_app.runs.image_inputs._POLL_S", 0.0)
    done = set()
    polls = new_files([tmp_path, tmp_path / "inner"], done)
    assert next(polls) == []
    content = (photos / "cats" / "000.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[:100])
    assert next(polls) == []
    (tmp_path / "a.png").write_bytes(content)
    assert next(polls) == []
    assert next(polls) == [tmp_path / "a.png"]
    (tmp_path / "b.txt").write_text("no image")
    assert next(polls) == [] and next(polls) == []
    (tmp_path / "inner" / "c.png").write_bytes(content)
    assert next(polls) == []
    assert next(polls) == [tmp_path / "inner" / "c.png"]
    for is_done in (False, True):
        (tmp_path / "a.png").write_bytes(content + b"0" * (1 + is_done))
        if is_done:
            done.add((tmp_path / "a.png").resolve())
        assert next(polls) == []
        assert next(polls) == ([] if is_done else [tmp_path / "a.png"])


def test_watching_appends_rows_and_is_resumed(finished, photos, tmp_path, monkeypatch, capsys):
    inbox, out = tmp_path / "inbox", tmp_path / "rows.csv"
    inbox.mkdir()
    shutil.copy(photos / "cats" / "000.png", inbox / "a.png")

    def arrivals(names):
        def new_files(folders, done):
            for name in names:
                if name.endswith(".png"):
                    shutil.copy(photos / "dogs" / "001.png", inbox / name)
                else:
                    (inbox / name).write_bytes(b"no image")
                yield [inbox / name]
            raise KeyboardInterrupt

        return new_files

    monkeypatch.setattr("snella_app.runs.prediction_files.new_files", arrivals(["a.png", "broken.jpg", "b.png"]))
    predict_to_files(str(finished.path), [str(inbox)], out=str(out), watch=True, top_k=1)
    captured = capsys.readouterr()
    assert [row.split(",")[0] for row in out.read_text().splitlines()] == [
        "image",
        *map(str, (inbox / "a.png", inbox / "b.png")),
    ]
    assert captured.out.endswith(f"2 images: {out}\n")
    assert captured.err == f"skipped '{inbox / 'broken.jpg'}' (unknown image format)\n"
    monkeypatch.setattr("snella_app.runs.prediction_files.new_files", arrivals(["c.png"]))
    predict_to_files(str(finished.path), [str(inbox)], out=str(out), watch=True, top_k=1)
    assert len(out.read_text().splitlines()) == 4
    with pytest.raises(ValueError, match=r"out must have the columns .*label_2.*, got image,label,probability in"):
        predict_to_files(str(finished.path), [str(inbox)], out=str(out), watch=True, top_k=2)
    monkeypatch.setattr("snella_app.runs.prediction_files.new_files", arrivals(["d.png"]))
    lines = tmp_path / "rows.jsonl"
    predict_to_files(str(finished.path), [str(inbox)], out=str(lines), watch=True)
    assert [json.loads(line)["image"] for line in lines.read_text().splitlines()] == [str(inbox / "d.png")]
    for name in ("p.json", "p.txt", "p"):
        with pytest.raises(ValueError, match=rf"out must end with \.csv or \.jsonl with watch, .*, got '{name}'"):
            predict_to_files(str(finished.path), [str(inbox)], out=name, watch=True)
    with pytest.raises(ValueError, match=r"watch needs a folder among the images, got a\.png"):
        predict_to_files(str(finished.path), ["a.png"], watch=True)
    with pytest.raises(ValueError, match="features must be left out with watch"):
        predict_to_files(str(finished.path), [str(inbox)], watch=True, features="f.npz")


@pytest.fixture
def table_with_gaps(photos, tmp_path):
    """Table of ten images; eight are missing and one is empty."""
    (tmp_path / "empty.png").write_bytes(b"")
    image = photos / "cats" / "000.png"
    names = [str(image), "empty.png", *(f"gone-{number}.png" for number in range(8))]
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["path", *names]), encoding="utf-8")
    return table


def test_missing_images_of_a_table_are_counted_with_a_remedy(model, table_with_gaps):
    with pytest.raises(FileNotFoundError, match=r"8 of 10 images are missing: .*gone-0\.png, .* and 3 more; fix .*"):
        model.predict(table_with_gaps)
    assert len(model.predict(table_with_gaps, skip_corrupt=True)) == 1
    assert len(model.predict([table_with_gaps], skip_corrupt=True)) == 1


def test_the_path_column_of_a_table_can_be_chosen(model, photos, tmp_path):
    table = tmp_path / "table.csv"
    table.write_text(f"path,photo\ngone.png,{photos / 'cats' / '000.png'}\n", encoding="utf-8")
    assert [prediction.path.name for prediction in model.predict(table, columns="path=photo")] == ["000.png"]
    other = photos / "cats" / "001.png"
    predictions = model.predict([other, table], columns="path=photo")
    assert [prediction.path.name for prediction in predictions] == ["001.png", "000.png"]
    for images in (photos, [other], Image.new("RGB", (8, 8))):
        message = r"columns applies only to tables .* got columns='path=photo' without a table; leave it out"
        with pytest.raises(ValueError, match=message):
            model.predict(images, columns="path=photo")


def test_images_of_a_table_keep_their_names(finished, photos, tmp_path, monkeypatch):
    shutil.copytree(photos / "cats", tmp_path / "mine" / "cats")
    (tmp_path / "mine" / "table.csv").write_text("path\ncats/000.png\n", encoding="utf-8")
    for folder, table, expected in (
        ("mine", "table.csv", "cats/000.png"),
        (".", "mine/table.csv", "mine/cats/000.png"),
    ):
        monkeypatch.chdir(tmp_path / folder)
        assert [str(prediction.path) for prediction in load(finished.path).predict([table])] == [expected]


def test_the_first_of_many_skipped_images_are_listed(finished, table_with_gaps, tmp_path, capsys):
    predict_to_files(str(finished.path), [str(table_with_gaps)], out=str(tmp_path / "out.csv"), skip_corrupt=True)
    text = capsys.readouterr().err
    assert text.startswith("skipped 9 images: ") and text.endswith("gone-3.png' (no such file) and 4 more\n")
    assert "empty.png' (the file is empty)" in text and "Errno" not in text


def test_a_terminal_shows_progress(finished, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich treats it as a terminal
    predict_to_files(str(finished.path), [str(photos)], out=str(tmp_path / "out.csv"))
    evaluate(finished.path, console=make_console(sys.stderr))
    text = capsys.readouterr().err
    assert "predicting" in text and "reading images" in text and "evaluating" in text
    monkeypatch.delenv("FORCE_COLOR")
    predict_to_files(str(finished.path), [str(photos)], out=str(tmp_path / "out.csv"), overwrite=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_watch_predicts_new_files_and_stops_cleanly(stop, finished, photos, tmp_path):
    inbox, out, errors = tmp_path / "inbox", tmp_path / "rows.csv", tmp_path / "errors.txt"
    inbox.mkdir()
    shutil.copy(photos / "cats" / "000.png", inbox / "a.png")
    args = ["predict", str(finished.path), str(inbox), "--watch", "--out", str(out), "--top-k", "1"]
    with errors.open("w") as file, command(args, stderr=file) as process:
        assert process.stdout.readline().startswith(f"{inbox / 'a.png'}: ")
        (inbox / "b.png").write_bytes(b"no image")
        shutil.copy(photos / "owls" / "000.png", inbox / "c.png")
        assert process.stdout.readline().startswith(f"{inbox / 'c.png'}: ")
        assert [row.split(",")[0] for row in out.read_text().splitlines()[1:]] == [
            str(inbox / "a.png"),
            str(inbox / "c.png"),
        ]
        assert errors.read_text() == f"skipped '{inbox / 'b.png'}' (unknown image format)\n"
        process.send_signal(stop)
        assert process.communicate(timeout=120)[0] == f"2 images: {out}\n" and process.returncode == 0
    assert errors.read_text().count("\n") == 1


@pytest.fixture
def _default_signals():
    """Restore the default handlers, since SIGINT is ignored in background processes of a shell."""
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_default_signals")
def test_first_signal_raises_nothing_and_a_second_one_ends_the_block(monkeypatch):
    class Finalized:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    ignored = []
    monkeypatch.setattr("sys.unraisablehook", ignored.append)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    signals = []
    with _collect_signals(signals):
        Finalized()
        assert signals == [signal.SIGTERM] and not ignored
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the block continued")
    assert signals == [signal.SIGTERM, signal.SIGINT]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.usefixtures("_default_signals")
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_watch_stops_after_the_current_image(stop, finished, photos, tmp_path, capsys, monkeypatch):
    def interrupt_once(console, text):
        if not printed:
            signal.raise_signal(stop)
        printed.append(text)

    printed = []
    monkeypatch.setattr("snella_app.runs.prediction_files.print_line", interrupt_once)
    out = tmp_path / "rows.csv"
    predict_to_files(str(finished.path), [str(photos / "cats")], watch=True, out=str(out))
    assert len(out.read_text().splitlines()) == 2  # the header and one row
    assert len(printed) == 2 and printed[1] == f"1 image: {out}"


@pytest.mark.usefixtures("_default_signals")
def test_watch_stops_after_an_unreadable_image(finished, photos, tmp_path, monkeypatch):
    def interrupt(console, text):
        if text.startswith("skipped"):
            signal.raise_signal(signal.SIGINT)
        printed.append(text)

    printed = []
    monkeypatch.setattr("snella_app.runs.prediction_files.print_line", interrupt)
    inbox, out = tmp_path / "inbox", tmp_path / "rows.csv"
    shutil.copytree(photos / "cats", inbox)
    (inbox / "000.png").write_bytes(b"no image")
    predict_to_files(str(finished.path), [str(inbox)], watch=True, out=str(out), batch_size=1)
    assert [text.split()[0] for text in printed] == ["skipped", "0"] and not out.exists()


def test_a_leading_tilde_is_the_home_folder(finished, photos, monkeypatch):
    monkeypatch.setenv("HOME", str(photos))
    paths = sorted((photos / "cats").iterdir())
    assert expand(["~/cats", "~/cats/000.*"]) == [*paths, paths[0]]
    assert snella.load(finished.path).predict("~/cats/000.png").path == paths[0]
    with pytest.raises(FileNotFoundError, match="no image ~nobody-here/cats"):
        expand(["~nobody-here/cats"])


def test_hidden_folders_are_ignored_as_in_training(photos, tmp_path):
    for folder in (".ipynb_checkpoints", "cats/.thumbnails", "cats/old"):
        shutil.copytree(photos / "cats", tmp_path / folder)
    assert {path.parent for path in expand([tmp_path])} == {tmp_path / "cats/old"}


def test_linked_folders_are_searched_as_in_training(photos, tmp_path):
    (tmp_path / "linked").symlink_to(photos / "cats")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert expand([tmp_path]) == sorted(tmp_path.glob("linked/*.png"))


def test_a_blank_path_is_not_the_current_folder(photos, monkeypatch):
    monkeypatch.chdir(photos)
    for path in ("", " "):
        with pytest.raises(ValueError, match=f"images must name a file or folder, got '{path}'"):
            expand([path])


def test_features_of_an_mlp_head_are_its_inputs(finished):
    model = build_method("mlp-3", timm.create_model("test_vit", num_classes=3, img_size=32))
    width = model.num_features
    probe = LayerProbe(model, probed_layers(model), linear_head(torch.zeros(3, 5 * width), torch.zeros(3)))
    head, count = _head(dataclasses.replace(snella.load(finished.path).loaded, model=model, probe=probe))
    assert head is probe.head and count == width


def test_watching_continues_an_edited_table_but_no_other_file(finished, photos, tmp_path, monkeypatch):
    def new_files(*_):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr("snella_app.runs.prediction_files.new_files", new_files)
    images, out = [str(photos / "cats" / "000.png"), str(tmp_path)], tmp_path / "rows.csv"
    out.write_text("image,label,probability\nold.png,cats,0.5")  # no end of line
    predict_to_files(str(finished.path), images, out=str(out), watch=True, top_k=1)
    assert [line.split(",")[0] for line in out.read_text().splitlines()] == ["image", "old.png", images[0]]
    for text in ('{"image": "a.png"}\n{"image": "b.p', "[1]\n", '{"image": 5}\n'):
        (tmp_path / "rows.jsonl").write_text(text)
        with pytest.raises(
            ValueError, match=r"out=.*rows\.jsonl has rows that are not predictions: .*; choose another"
        ):
            predict_to_files(str(finished.path), images, out=str(tmp_path / "rows.jsonl"), watch=True)


def test_a_table_with_windows_line_ends_is_continued(finished, photos, tmp_path, monkeypatch):
    known = set()

    def new_files(folders, done):
        known.update(done)
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr("snella_app.runs.prediction_files.new_files", new_files)
    images, out = [str(photos / "cats" / "000.png"), str(photos)], tmp_path / "rows.csv"
    out.write_bytes(b"image,label,probability\r\nold.png,cats,0.5\r\n")
    predict_to_files(str(finished.path), images, out=str(out), watch=True, top_k=1)
    assert [line.split(",")[0] for line in out.read_text().splitlines()] == ["image", "old.png", images[0]]
    assert known == {
        Path("old.png").resolve(),
        Path(images[0]).resolve(),
    }  # not predicted again when it is found in the folder


def test_other_data_may_be_a_path(finished, photos):
    assert evaluate(finished.path, photos, split="train")["data"] == str(photos)


def test_watching_with_overwrite_starts_a_new_table(finished, photos, tmp_path, monkeypatch):
    inbox, out = tmp_path / "inbox", tmp_path / "rows.csv"
    inbox.mkdir()
    shutil.copy(photos / "cats" / "000.png", inbox / "a.png")
    out.write_text(f"image,label,probability\n{inbox / 'a.png'},unicorn,1.0\n")

    def new_files(folders, known, poll_s=0.5):
        yield [path for path in (inbox / "a.png",) if path not in known]
        raise KeyboardInterrupt

    monkeypatch.setattr("snella_app.runs.prediction_files.new_files", new_files)
    with pytest.raises(ValueError, match="tta must be"):
        predict_to_files(str(finished.path), [str(inbox)], out=str(out), watch=True, overwrite=True, tta=99)
    assert "unicorn" in out.read_text()
    predict_to_files(str(finished.path), [str(inbox)], out=str(out), watch=True, top_k=1, overwrite=True)
    assert "unicorn" not in out.read_text() and len(out.read_text().splitlines()) == 2


def test_settings_that_never_apply_are_rejected_before_prediction(finished):
    model = load(finished.path, "cpu")
    regression = dataclasses.replace(model.loaded, task=RegressionTask(("age",)))
    with pytest.raises(ValueError, match=r"unsure=0\.5 needs a task with one class per image, not regression"):
        Predictor(regression).resolve_threshold(None, 0.5)


def test_names_on_standard_input_may_have_any_character(photos, tmp_path):
    names = ["a\u2028b.png", "c\x0cd.png", "caf\udce9.png"]
    for name in names:
        shutil.copy(photos / "cats" / "000.png", tmp_path / name)
    code = "from snella_app.runs.image_inputs import expand; print(ascii([path.name for path in expand(['-'])]))"
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    lines = b"".join(os.fsencode(tmp_path / name) + b"\n" for name in names)
    listed = subprocess.run([sys.executable, "-c", code], input=lines, env=environment, capture_output=True, check=True)
    assert listed.stdout.decode().strip() == ascii(names)


def test_a_single_corrupt_image_has_no_remedy_that_does_not_apply(finished, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    model = load(finished.path)
    for call in (model.features, model.predict, partial(model.predict, skip_corrupt=True)):
        with pytest.raises(ValueError, match=r"unknown image format; remove it$"):
            call(tmp_path / "bad.png")
    with pytest.raises(ValueError, match=r"remove it, or pass --skip-corrupt \(skip_corrupt=True\)$"):
        model.predict([tmp_path / "bad.png"])


def test_a_pattern_is_not_suggested_for_a_run(photos, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no run .*runs\*; .* has no similar name"):
        predict_to_files(str(tmp_path / "runs*"), [str(photos)])


def test_a_watched_folder_may_start_with_a_tilde(finished, tmp_path, monkeypatch):
    (tmp_path / "inbox").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match="tta must be"):
        predict_to_files(str(finished.path), ["~/inbox"], watch=True, tta=99)
