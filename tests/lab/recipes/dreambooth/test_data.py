import shutil

import pytest
from PIL import Image

from snella_lab.recipes.dreambooth.data import load_concept


def write_images(folder, count):
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (12, 10), (40 * number, 90, 10)).save(folder / f"{number:02}.jpg")
    return folder


@pytest.fixture
def dataset(tmp_path):
    """Write a dataset in DreamBooth's layout: one folder per subject and a list of classes."""
    root = tmp_path / "dataset"
    write_images(root / "dog6", 5)
    write_images(root / "vase", 2)
    (root / "prompts_and_classes.txt").write_text("subject_name,class\ndog6,dog\n\nprompt_list = [\n'a {0} {1}'\n]\n")
    return root


def test_dreambooth_subject_has_images_and_class(dataset):
    concept = load_concept(f"dreambooth:{dataset}", "dog6")
    assert (concept.name, concept.class_name, len(concept.paths)) == ("dog6", "dog", 5)
    assert [image.size for image in concept.images()] == [(12, 10)] * 5
    assert load_concept(f"dreambooth:{dataset}", "vase").class_name is None


def test_plain_folder_is_a_subject(dataset):
    (dataset / "vase" / "notes.txt").write_text("mine")
    concept = load_concept(f"folder:{dataset / 'vase'}")
    assert (concept.name, len(concept.paths)) == ("vase", 2)
    assert concept.notes == ["skipped 1 non-image file"]


def test_digest_depends_on_names_and_contents_only(dataset, tmp_path):
    digest = load_concept(f"folder:{dataset / 'vase'}").digest()
    copy = shutil.copytree(dataset / "vase", tmp_path / "elsewhere" / "vase")
    assert load_concept(f"folder:{copy}").digest() == digest
    Image.new("RGB", (12, 10), "red").save(copy / "00.jpg")
    assert load_concept(f"folder:{copy}").digest() != digest


def test_unknown_subject_suggests_similar_names(dataset):
    with pytest.raises(FileNotFoundError, match=r"one of the 2 folders in .*, got 'dog7'; nearest: dog6"):
        load_concept(f"dreambooth:{dataset}", "dog7")
    with pytest.raises(FileNotFoundError, match=r"got 'zzz'; available: dog6, vase"):
        load_concept(f"dreambooth:{dataset}", "zzz")
    with pytest.raises(ValueError, match=r"one of the 2 folders in .*: dog6, vase"):
        load_concept(f"dreambooth:{dataset}")


def test_all_broken_images_are_reported_together(dataset):
    for name in ("01.jpg", "03.jpg"):
        (dataset / "dog6" / name).write_bytes((dataset / "dog6" / name).read_bytes()[:200])
    with pytest.raises(
        ValueError, match=r"2 of 5 images in '.*dog6' cannot be read: 01.jpg \(.+\), 03.jpg \(.+\)\. Rem"
    ):
        load_concept(f"dreambooth:{dataset}", "dog6")
    concept = load_concept(f"dreambooth:{dataset}", "dog6", skip_corrupt=True)
    assert [path.name for path in concept.paths] == ["00.jpg", "02.jpg", "04.jpg"]
    assert concept.notes[0].startswith("skipped 2 broken images: 01.jpg (")


def test_folder_without_valid_images_is_rejected(dataset, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"folder '.*empty' must contain images .*, got an empty folder"):
        load_concept(f"folder:{tmp_path / 'empty'}")
    (tmp_path / "empty" / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="got 1 non-image file"):
        load_concept(f"folder:{tmp_path / 'empty'}")
    (tmp_path / "empty" / "a.png").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"all 1 images in '.*empty' are corrupt: a.png"):
        load_concept(f"folder:{tmp_path / 'empty'}", skip_corrupt=True)
    with pytest.raises(ValueError, match=r"dreambooth:.*empty has no subject folders"):
        load_concept(f"dreambooth:{tmp_path / 'empty'}", "dog")


def test_invalid_specification_is_rejected(dataset):
    with pytest.raises(ValueError, match=r"folder:PATH .* or dreambooth:PATH .*, got 'digits'"):
        load_concept("digits")
    with pytest.raises(ValueError, match=r"subject is only valid with dreambooth:PATH, got 'dog6' with 'folder:"):
        load_concept(f"folder:{dataset}", "dog6")
    with pytest.raises(FileNotFoundError, match=r"folder:.*vas: no folder 'vas' in .*; nearest: 'vase'"):
        load_concept(f"folder:{dataset / 'vas'}")
