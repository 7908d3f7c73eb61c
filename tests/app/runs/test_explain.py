"""Heat maps and nearest training images."""

import re
import shutil

import numpy as np
import pytest
from PIL import Image

from snella_app.records.record import write
from snella_app.records.run import FoldResults, FoldRow
from snella_app.runs.explain import explain, explain_validation, nearest_images
from snella_app.runs.images import load_run_splits
from snella_app.runs.predict import load
from snella_app.training.train import train

pytest.importorskip("captum")


def test_nearest_images_have_the_highest_cosine_similarity():
    features, others = np.array([[1.0, 0.0]]), np.array([[0.0, 3.0], [5.0, 0.0], [1.0, 1.0]])
    ((first, second),) = nearest_images(features, others, 2)
    assert first == (1, pytest.approx(1.0)) and second == (2, pytest.approx(0.5**0.5))


def test_images_get_heat_maps_and_their_nearest_training_images(any_run, photos, tmp_path):
    chosen = sorted((photos / "cats").iterdir())[:3]
    explained = explain(any_run.path, chosen, tmp_path / "out", neighbors=2)
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["0001-000.png", "0002-001.png", "0003-002.png", "index.html"] and explained.count == 3
    page = explained.page.read_text()
    assert page.count("<section>") == 3 and not explained.notes
    cosines = [float(c) for c in re.findall(r"cosine (-?[\d.]+)", page)]
    assert len(cosines) == 6 and all(a >= b for a, b in zip(cosines[::2], cosines[1::2], strict=True))
    assert max(cosines) == 1.0  # some are training images
    assert np.asarray(Image.open(tmp_path / "out" / "0001-000.png")).std() > 5
    with pytest.raises(FileExistsError, match=r"out=.*out is not empty"):
        explain(any_run.path, chosen, tmp_path / "out")
    with pytest.raises(ValueError, match="of must be one of the run's classes, cats, dogs, owls, got 'newts'"):
        explain(any_run.path, chosen, tmp_path / "other", of="newts")


@pytest.mark.parametrize("overwrite", [False, True])
def test_heat_maps_are_not_written_to_a_file(overwrite, tmp_path):
    (file := tmp_path / "out.png").write_text("mine")
    with pytest.raises(FileExistsError, match=r"^out must be a folder for the heat maps, got the file '.*/out\.png'$"):
        explain("run", "a.png", file, overwrite=overwrite)
    assert file.read_text() == "mine"


def test_heat_maps_need_no_training_images(finished, photos, tmp_path):
    run = shutil.copytree(finished.path, tmp_path / "run")
    text = (run / "config.yaml").read_text().replace(str(photos), "/nowhere/photos")
    (run / "config.yaml").write_text(text)
    from snella_app.runs import RunFolder

    folder = RunFolder(run)
    folder.update("finished", files={}, data=folder.read_json("run.json")["data"] | {"folder": None})
    explained = explain(run, [photos / "cats" / "000.png"], tmp_path / "out")
    assert explained.count == 1 and explained.notes[0].startswith("no nearest training images: the data of ")


def test_the_report_shows_wrong_and_correct_images_with_their_heat_maps(finished, tmp_path):
    run = shutil.copytree(finished.path, tmp_path / "run")
    page = explain_validation(run).read_text()
    maps = sorted((run / "heat_maps").glob("*.png"))
    assert 0 < len(maps) <= 12 and page.count('alt="Heat map of') == len(maps)
    section = page[page.index('id="heat_maps"') : page.index('id="use"')]
    wrong, right = section.count("✗"), section.count("✓")
    assert wrong + right == len(maps)


def test_blank_heat_maps_are_explained(finished, photos, tmp_path, monkeypatch):
    blank = "blank, because no region raises this output"
    images = [photos / "cats" / "000.png"]
    assert blank not in explain(finished.path, images, tmp_path / "shown", neighbors=0).page.read_text()
    monkeypatch.setattr("snella_app.runs.explain.heat_maps", lambda _, images, outputs: np.zeros((len(images), 8, 8)))
    assert blank in explain(finished.path, images, tmp_path / "blank", neighbors=0).page.read_text()
    page = explain_validation(shutil.copytree(finished.path, tmp_path / "run")).read_text()
    assert 0 < page.count("blank: no region raises this output") == page.count('alt="Heat map of')


def test_rollout_is_selectable_and_labeled(finished, photos, tmp_path):
    image = photos / "cats" / "000.png"
    explained = explain(finished.path, [image], tmp_path / "out", by="rollout", neighbors=0)
    page = explained.page.read_text()
    assert (
        "independent of the class" in page
        and "of attention, independent of the class" in page
        and "HiResCAM" not in page
    )
    explain(finished.path, [image], tmp_path / "gradcam", neighbors=0)
    rolled, grad = (np.asarray(Image.open(tmp_path / name / "0001-000.png")) for name in ("out", "gradcam"))
    assert rolled.shape == grad.shape and np.abs(rolled.astype(int) - grad).mean() > 1
    run = shutil.copytree(finished.path, tmp_path / "run")
    assert "through the attention of all layers" in explain_validation(run, by="rollout").read_text()
    assert "through the attention of all layers" not in explain_validation(run).read_text()
    with pytest.raises(ValueError, match=r"of must be left out with rollout, .* got 'cats'"):
        explain(finished.path, [image], tmp_path / "other", by="rollout", of="cats")
    with pytest.raises(ValueError, match="by must be one of gradcam, rollout, got 'cam'"):
        explain(finished.path, [image], tmp_path / "other", by="cam")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.parametrize(("width", "in_a_row"), [(390, 2), (1280, 5)])
def test_an_image_is_shown_next_to_its_heat_map(width, in_a_row, finished, photos, tmp_path, browser):
    explained = explain(finished.path, [photos / "cats" / "000.png"], tmp_path / "out")
    browser.open(explained.page, width=width)
    tops = browser.evaluate("[...document.querySelectorAll('figure')].map(f => f.getBoundingClientRect().top)")
    assert len(tops) == 5 and tops.count(tops[0]) == in_a_row
    assert browser.evaluate("document.documentElement.scrollWidth") <= width


def test_training_images_are_decoded_as_for_predictions(
    make_photos, settings, console, no_report, monkeypatch, tmp_path
):
    photos = make_photos(tmp_path / "photos", {"cats": 8, "dogs": 8}, side=90)
    run = train(settings(data=f"folder:{photos}", epochs=1), console)
    assert load(run.path).loaded.reading.side is not None
    compared = []
    monkeypatch.setattr(
        "snella_app.runs.explain.nearest_images", lambda *args: compared.append(args) or nearest_images(*args)
    )
    names = load_run_splits(run, load(run.path).loaded.info.data).train.names
    explain(run.path, [photos / name for name in names], tmp_path / "out", neighbors=1)
    ((features, training, _),) = compared
    assert np.allclose(features, training, atol=1e-6)


def test_a_cross_validation_is_rejected(finished, photos, tmp_path):
    shutil.copytree(finished.path, tmp_path / "fold-1")
    write(FoldResults(1, rows=[FoldRow(1, "fold-1", 1, {})]), tmp_path)
    with pytest.raises(ValueError, match=r"is a cross-validation with several models; pass one of its runs, e\.g\. "):
        explain(tmp_path, [photos / "cats" / "000.png"], tmp_path / "out")
    with pytest.raises(ValueError, match=r"but a cross-validation run has several; .* e\.g\. .*fold-1"):
        load(tmp_path).features(photos / "cats" / "000.png")


def test_the_longest_image_name_is_shortened(finished, photos, tmp_path):
    image = shutil.copy(photos / "cats" / "000.png", tmp_path / f"{'ñ' * 125}.png")
    explain(finished.path, image, tmp_path / "out", by="rollout", neighbors=0)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"0001-{'ñ' * 120}.png", "index.html"]
