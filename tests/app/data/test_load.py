import re
from pathlib import Path

import pytest

from snella_app.data.load import data_names, full_spec, load_data
from snella_app.data.options import DataConfig


def test_the_accepted_forms_are_listed():
    families = "folder:PATH masks:PATH kvasir:PATH csv:FILE parquet:FILE hf:NAME wds:SHARDS vtab:PATH fgvc:PATH"
    bundled = ["digits", "elpv", "fashion-mnist", "mnist5k", "mri", "mri-lobes", "mri-regions", "stamps"]
    assert data_names() == [*families.split(), *bundled]


def names_of(data) -> list[list[str]]:
    return [part.names for part in (data.train, data.val, data.test)]


def test_splits_depend_on_the_seed():
    first, again, other = (load_data("digits", seed=seed) for seed in (5, 5, 6))
    assert names_of(first) == names_of(again)
    assert all(a != b for a, b in zip(names_of(first), names_of(other), strict=True))
    assert first.train.seed == first.val.seed == 5


def test_splits_are_a_partition():
    names = [name for part in names_of(load_data("digits")) for name in part]
    assert len(names) == len(set(names)) == 1797


def test_fractions_are_of_all_images():
    data = load_data("digits", DataConfig(val_fraction=0.3, test_fraction=0.1))
    assert (len(data.train), len(data.val), len(data.test)) == (1078, 539, 180)


def test_a_test_fraction_of_zero_creates_no_test_split():
    data = load_data("digits", DataConfig(test_fraction=0))
    assert data.test is None and len(data.val) == 359
    assert data.description == "digits: 1,797 images in 10 classes; train 1,438 · val 359"


def test_sizes_subsample_splits_independently():
    full, small = load_data("digits"), load_data("digits", DataConfig(train_size=100, val_size=50, test_size=20))
    assert (len(small.train), len(small.val), len(small.test)) == (100, 50, 20)
    assert all(set(a) < set(b) for a, b in zip(names_of(small), names_of(full), strict=True))
    assert load_data("digits", DataConfig(train_size=100)).test.names == full.test.names
    assert names_of(load_data("digits", DataConfig(train_size=100, val_size=50, test_size=20))) == names_of(small)
    counts = [small.train.labels.count(label) for label in range(10)]
    assert min(counts) >= 9 and max(counts) <= 11


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digit", "got 'digit'; nearest: 'digits'"),
        ("fashion_mnist", "nearest: 'fashion-mnist'"),
        ("qqqq", f"data must be a folder, a table or one of {', '.join(data_names())}, got 'qqqq'"),
        ("foldr:photos", "got 'foldr:photos'; did you mean 'folder:photos'?"),
        ("cvs:t.csv", "did you mean 'csv:t.csv'?"),
    ],
)
def test_an_unknown_specification_error_suggests_the_nearest(spec, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_data(spec)


def test_unknown_data_is_reported_before_options_that_do_not_apply():
    with pytest.raises(ValueError, match=r"data must be a folder, a table or one of .*, got 'qqqq'"):
        load_data("qqqq", DataConfig(channels=5))


def test_a_bare_path_is_resolved_by_its_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = "photos/cat lungs/images lungs/masks shards saved digits rows mixed/a named/train hub/data/train flat"
    folders += " nested/data/cat"
    for folder in folders.split():
        Path(folder).mkdir(parents=True)
    files = "t.csv t.tsv t.parquet shards/0.tar saved/state.json x.jpg photos/all.tar rows/0.parquet rows/.cache"
    files += " mixed/0.parquet mixed/a/0.jpg named/train/metadata.csv hub/README.md hub/data/train/0.parquet"
    files += " rows/README.md flat/0.jpg flat/labels.parquet nested/data/cat/0.jpg nested/i.parquet"
    for file in files.split():
        Path(file).write_bytes(b"")
    prefixes = {"photos": "folder:", "lungs": "masks:", "shards": "wds:", "saved": "hf:", "rows": "hf:", "named": "hf:"}
    prefixes |= {"hub": "hf:", "flat": "folder:", "nested": "folder:"}
    prefixes |= {"mixed": "folder:", "t.csv": "csv:", "t.tsv": "csv:", "t.parquet": "parquet:"}
    unchanged = ("digits", "x.jpg", "nowhere", "hf:saved", "~nosuchuser/x")
    for path in (*prefixes, *unchanged):
        assert full_spec(path) == prefixes.get(path, "") + path
    with pytest.raises(ValueError, match=r"got 'x\.jpg', which is not a CSV, TSV, Parquet or tar file"):
        load_data("x.jpg")
    with pytest.raises(ValueError, match="got '/dev/null', which is not a CSV, TSV, Parquet or tar file"):
        load_data("/dev/null")
    with pytest.raises(ValueError, match="got 'photo', which does not exist; nearest: 'photos'"):
        load_data("photo")
    with pytest.raises(ValueError, match="xxx', which does not exist"):
        load_data("x" * 300)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 0.0}, "val_fraction must be in (0, 1), got 0.0"),
        ({"test_fraction": 1.0, "val_fraction": 0.1}, "test_fraction must be in [0, 1), got 1.0"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "must leave images to train on, got 1.0"),
        ({"val_size": 0}, "val_size must be at least 1, got 0"),
        ({"train_size": 1080}, "train_size must be at most 1079, the number of images in the split, got 1080"),
        ({"test_size": 9}, "test_size must be at least 10, one image per class, got 9"),
    ],
)
def test_numbers_out_of_range_are_rejected(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_data("digits", DataConfig(**options))


def test_several_invalid_numbers_are_reported_together():
    with pytest.raises(ValueError, match=r"test_size must be at least 1, got -3; val_fraction must be .* got 0.0"):
        DataConfig(test_size=-3, val_fraction=0.0)


@pytest.mark.parametrize("seed", [-2, 2**32])
def test_seeds_out_of_range_are_rejected(seed):
    with pytest.raises(ValueError, match=rf"seed must be in \[0, 2\^32\), got {seed}"):
        load_data("digits", seed=seed)
    with pytest.raises(ValueError, match=rf"test_seed must be .*, got {seed}"):
        DataConfig(test_seed=seed)


@pytest.mark.parametrize("prefix", ["", "folder:", "csv:", "hf:", "vtab:"])
def test_an_unknown_user_in_a_path_is_an_error_message(prefix):
    with pytest.raises((ValueError, OSError), match="~nobody-here/photos"):  # the Hub may be unreachable
        load_data(f"{prefix}~nobody-here/photos")


def test_the_size_of_a_split_that_the_data_lacks_is_rejected():
    with pytest.raises(ValueError, match=r"val_size must be omitted because 'digits' has no val split, got 5"):
        load_data("digits", DataConfig(val_size=5), divide=False)
    with pytest.raises(ValueError, match=r"val_size must be omitted because protocol=final has no val split, got 5"):
        load_data("digits", DataConfig(val_size=5, protocol="final"))
