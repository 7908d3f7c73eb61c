import csv
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from snella_app.data.columns import Columns, columns_in
from snella_app.data.load import load_data
from snella_app.data.options import DataConfig
from snella_app.data.table import table_paths

COLUMNS = ("file", "species", "patient")


@pytest.fixture
def write_table(tmp_path):
    """Return a function that writes a table and its images, and returns the path of the table."""
    (tmp_path / "images").mkdir()

    def write(rows, columns=COLUMNS, name="photos.csv", delimiter=","):
        for index, row in enumerate(rows):
            if row[0].endswith(".png") and "gone" not in row[0]:
                pixels = np.random.default_rng(index).integers(0, 256, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / row[0])
        with (tmp_path / name).open("w", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows([columns, *rows])
        return tmp_path / name

    return write


def rows_of(count, classes=("cat", "dog"), patients=8):
    return [(f"images/{i:02}.png", classes[i % len(classes)], f"p{i // 2 % patients}") for i in range(count)]


def parts_of(data):
    return [part for part in (data.train, data.val, data.test) if part is not None]


def test_columns_are_detected_by_name_and_paths_are_relative_to_the_file(write_table, tmp_path, monkeypatch):
    file = write_table(rows_of(20), ("File Name", "Label", "other"))
    monkeypatch.chdir("/")
    data = load_data(f"csv:{file}")
    assert data.classes == ["cat", "dog"] and data.name == "photos"
    assert [len(part) for part in parts_of(data)] == [12, 4, 4]
    assert data.notes == ["columns: path 'File Name', label 'Label'"]
    for part in parts_of(data):
        for index, (name, label) in enumerate(zip(part.names, part.labels, strict=True)):
            assert int(name[7:9]) % 2 == label
            assert part.image(index).tobytes() == Image.open(tmp_path / name).tobytes()


@pytest.mark.parametrize(("delimiter", "name"), [(";", "x.csv"), ("\t", "x.tsv")])
def test_delimiters_are_detected(delimiter, name, write_table):
    file = write_table(rows_of(20), name=name, delimiter=delimiter)
    assert len(load_data(f"csv:{file}", DataConfig(columns="path=file,label=species,group=none")).train) == 12


def test_given_columns_take_precedence_and_paths_may_be_templates(write_table):
    rows = [(f"images/{i:02}.png", f"{i:02}", "ab"[i % 2], "xy"[i // 10]) for i in range(20)]
    file = write_table(rows, ("image", "id", "label", "kind"))
    assert load_data(f"csv:{file}").classes == ["a", "b"]
    data = load_data(f"csv:{file}", DataConfig(columns="path=images/{id}.png,label=kind"))
    assert data.classes == ["x", "y"]
    assert {name: label for part in parts_of(data) for name, label in zip(part.names, part.labels, strict=True)} == {
        f"images/{i:02}.png": i // 10 for i in range(20)
    }
    with pytest.raises(ValueError, match=r"no column 'images/\{id' for path"):
        load_data(f"csv:{file}", DataConfig(columns="path=images/{id,label=kind"))


def test_a_missing_column_error_describes_all_columns(write_table):
    file = write_table([(*row, str(i)) for i, row in enumerate(rows_of(4))], (*COLUMNS, "age"))
    with pytest.raises(ValueError) as caught:
        load_data(f"csv:{file}", DataConfig(columns="label=specie"))
    assert str(caught.value) == (
        f"csv:{file}: no column 'specie' for label (nearest: 'species'). Columns: "
        "'file' ('images/00.png', 'images/01.png', 'images/02.png'), 'species' ('cat', 'dog'), "
        "'patient' ('p0', 'p1'), 'age' ('0', '1', '2')"
    )
    file = write_table(rows_of(4), ("where", "kind", "of"))
    with pytest.raises(ValueError, match=r"no path column \(path or a similar name\); .*=NAME; no label column"):
        load_data(f"csv:{file}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "file=path",
            "columns must be ROLE=NAME pairs such as path=file,label=species with roles path, .* got 'file=path'",
        ),
        ("labl=species", "got 'labl=species'; nearest: label"),
        ("label", "got 'label'"),
        ("label=a,label=b", r"got 'a' and 'b' for label; for several label columns, use label=a\+b"),
        ("path=a,path=b", "must name each role once, got 'a' and 'b' for path$"),
        ("root=", "group, root, got 'root='"),
    ],
)
def test_invalid_columns_are_rejected(text, message):
    with pytest.raises(ValueError, match=message):
        Columns.parse(text)


def test_images_of_one_group_stay_together_and_classes_are_balanced(write_table):
    rows = [(f"images/{i:02}.png", "ab"[i % 2], f"p{i // 4}") for i in range(60)]
    data = load_data(f"csv:{write_table(rows)}", DataConfig(columns="label=species"), seed=1)
    groups = [set(part.annotations.groups) for part in parts_of(data)]
    assert [len(part) for part in parts_of(data)] == [36, 12, 12]
    assert sum(map(len, groups)) == 15 == len(set.union(*groups))
    assert all(Counter(part.labels)[0] == len(part) / 2 for part in parts_of(data))
    other = load_data(f"csv:{write_table(rows)}", DataConfig(columns="label=species"), seed=2)
    assert other.test.names != data.test.names
    without = load_data(f"csv:{write_table(rows)}", DataConfig(columns="label=species,group=none"), seed=1)
    assert without.train.annotations.groups is None


def test_the_only_group_of_a_class_is_used_for_training(write_table):
    rows = [(f"images/{i:02}.png", "abc"[i % 3], "only" if i % 3 == 2 else f"p{i % 6}-{i // 12}") for i in range(60)]
    data = load_data(f"csv:{write_table(rows)}", DataConfig(columns="label=species"))
    assert Counter(data.train.labels)[2] == 20
    assert "class 'c' has no test images; add test images, or test scores will ignore missing classes" in data.warnings


@pytest.mark.parametrize("patients", [10, 15])
def test_groups_of_numbers_are_split_although_each_range_has_one_group(patients, write_table):
    rows = [(f"images/{i:03}.png", str(20 + 5 * (i // 8)), f"p{i // 8}") for i in range(8 * patients)]
    file = write_table(rows, ("file", "age", "patient"))
    tested = set()
    for seed in range(12):
        data = load_data(f"csv:{file}", DataConfig(columns="label=age"), target="numbers", seed=seed)
        groups = [set(part.annotations.groups) for part in parts_of(data)]
        assert all(groups) and sum(map(len, groups)) == patients == len(set.union(*groups))
        tested |= groups[2]
    assert len(tested) > 0.8 * patients


def test_one_group_cannot_be_split(write_table):
    file = write_table([(*row[:2], "p") for row in rows_of(10)])
    with pytest.raises(
        ValueError, match=r"creating a 'test' split requires at least two groups, .*--columns group=none"
    ):
        load_data(f"csv:{file}")


def test_a_split_column_is_used_and_shared_groups_are_reported(write_table):
    rows = [(*row, ("train", "train", "Valid", "test")[i // 5]) for i, row in enumerate(rows_of(20, patients=3))]
    data = load_data(f"csv:{write_table(rows, (*COLUMNS, 'split'))}")
    assert [len(part) for part in parts_of(data)] == [10, 5, 5]
    assert data.warnings[0] == (
        "3 of 3 groups in val are also in train, e.g. 'p0'; results on val are optimistic; --columns split=none "
        "creates new splits that keep groups together"
    )
    with pytest.raises(ValueError, match=r"the split column must be dev, .*, got 'p0' \(8 rows\), .* split=none"):
        load_data(f"csv:{write_table(rows_of(20, patients=3))}", DataConfig(columns="split=patient,label=species"))


def test_groups_shared_by_validation_and_test_images_are_reported(write_table):
    parts = ("train", "train", "val", "test")
    rows = [(*row[:2], "ab"[part == "train"], part) for row, part in zip(rows_of(20), 5 * parts, strict=True)]
    data = load_data(f"csv:{write_table(rows, (*COLUMNS, 'split'))}")
    text = "1 of 1 groups in test are also in val, e.g. 'a'; results on test are optimistic"
    assert any(warning.startswith(text) for warning in data.warnings)


def test_windows_paths_are_found(write_table):
    file = write_table(rows_of(20))
    file.write_text(file.read_text().replace("/", "\\"))
    assert sum(map(len, parts_of(load_data(f"csv:{file}")))) == 20
    paths = table_paths(file, Columns())
    assert len(paths) == 20 and all(path.is_file() for path in paths)


def test_the_root_folder_of_columns_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert DataConfig(columns="path=file, root=images").columns == f"path=file,root={tmp_path / 'images'}"
    assert DataConfig(columns="path=file").columns == "path=file"


def test_unusable_rows_are_reported_or_skipped(write_table, tmp_path):
    rows = [*rows_of(20), ("images/gone.png", "cat", "p1"), ("images/bad.jpg", "dog", "p2"), ("images/20.png", "", "p")]
    (tmp_path / "images/bad.jpg").write_text("no image")
    file = write_table(rows)
    with pytest.raises(ValueError) as caught:
        load_data(f"csv:{file}")
    message = str(caught.value)
    assert message.startswith(
        f"3 of 23 rows of csv:{file}, 1 no label, 1 no such file, 1 unreadable: images/gone.png (no such file), "
        "images/bad.jpg (unknown image format)"
    )
    assert message.endswith("images/20.png (no label). Fix or remove them, or skip them with --skip-corrupt "
                            "(skip_corrupt=True)")  # fmt: skip
    data = load_data(f"csv:{file}", DataConfig(skip_corrupt=True))
    assert sum(map(len, parts_of(data))) == 20
    assert data.notes[1].startswith(f"skipped 3 of 23 rows of csv:{file}, 1 no label, 1 no")


def test_repeated_rows_are_skipped_and_contradictions_noted(write_table):
    rows = [*rows_of(20), ("images/00.png", "cat", "p0"), ("images/01.png", "cat", "p0")]
    data = load_data(f"csv:{write_table(rows)}", DataConfig(columns="group=none"))
    assert sum(map(len, parts_of(data))) == 21
    assert data.notes[1:3] == [
        "skipped 1 repeated row",
        "1 row with a different label than an earlier row: images/01.png (dog, cat)",
    ]
    rows += [rows[-1]]  # repeats the contradicting row
    data = load_data(f"csv:{write_table(rows)}", DataConfig(columns="group=none"))
    assert sum(map(len, parts_of(data))) == 21 and data.notes[1] == "skipped 2 repeated rows"


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (lambda i: "cat", "at least two classes are required; column 'species' has one: 'cat'"),
        (
            lambda i: str(i),
            "column 'species' must contain classes, got 50 different values in 50 rows, e.g. '0', '1'",
        ),
    ],
)
def test_a_column_without_classes_is_rejected(label, message, write_table):
    file = write_table([(f"images/{i:02}.png", label(i), f"p{i}") for i in range(50)])
    with pytest.raises(ValueError, match=message):
        load_data(f"csv:{file}", DataConfig(columns="label=species"))


def test_numeric_classes_are_sorted_by_number(write_table):
    file = write_table([(f"images/{i:02}.png", str(i % 3 * 5), f"p{i}") for i in range(30)])
    assert load_data(f"csv:{file}", DataConfig(columns="label=species,group=none")).classes == ["0", "5", "10"]


def test_weights_and_raw_labels_follow_their_images(write_table):
    rows = [(f"images/{i:02}.png", "ab"[i % 2], str(i / 10)) for i in range(20)]
    data = load_data(f"csv:{write_table(rows, ('file', 'class', 'weight'))}", DataConfig(train_size=5))
    for part in parts_of(data):
        numbers = [int(name[7:9]) for name in part.names]
        assert part.annotations.weights == [number / 10 for number in numbers]
        assert part.annotations.targets == ["ab"[number % 2] for number in numbers]
    rows[3] = (*rows[3][:2], "-1")
    with pytest.raises(ValueError, match=r"images/03.png \(weight '-1' is not in \[0, 1e\+09\]\)"):
        load_data(f"csv:{write_table(rows, ('file', 'class', 'weight'))}")


@pytest.mark.parametrize("separator", "|;,")
def test_lists_of_labels_are_split_and_strata_follow_the_rarest(separator, write_table):
    sets = [("a",), ("a", "b"), ("b", "c"), ()]
    rows = [(f"images/{i:02}.png", separator.join(sets[i % 4]), "") for i in range(40)]
    data = load_data(f"csv:{write_table(rows)}", DataConfig(columns="label=species,group=none"), target="labels")
    assert data.classes == ["a", "b", "c"]
    for part in parts_of(data):
        assert part.annotations.targets == [sets[int(name[7:9]) % 4] for name in part.names]
        assert [count / len(part) for _, count in Counter(part.labels).most_common()] == [1 / 2, 1 / 4, 1 / 4]


def test_columns_of_zeros_and_ones_are_labels(write_table):
    rows = [(f"images/{i:02}.png", str(i % 2), str(i // 2 % 2)) for i in range(40)]
    data = load_data(f"csv:{write_table(rows, ('file', 'a', 'b'))}", DataConfig(columns="label=a+b"), target="labels")
    assert data.classes == ["a", "b"]
    for name, target in zip(data.train.names, data.train.annotations.targets, strict=True):
        number = int(name[7:9])
        assert target == ("a",) * (number % 2) + ("b",) * (number // 2 % 2)


def test_numbers_are_split_by_ranges(write_table):
    rows = [(f"images/{i:02}.png", str(i / 4), str(-i)) for i in range(60)]
    file = write_table(rows, ("file", "age", "depth"))
    data = load_data(f"csv:{file}", DataConfig(columns="label=age"), target="numbers")
    assert data.classes == ["age"] and data.description.startswith("photos: 60 images with age; train 36")
    assert data.test.annotations.targets == [int(name[7:9]) / 4 for name in data.test.names]
    assert set(Counter(data.test.labels).values()) == {2}
    both = load_data(f"csv:{file}", DataConfig(columns="label=age+depth"), target="numbers")
    assert both.classes == ["age", "depth"]
    assert both.val.annotations.targets == [(int(name[7:9]) / 4, -int(name[7:9])) for name in both.val.names]
    rows[7] = ("images/07.png", "old", "1")
    with pytest.raises(ValueError, match=r"images/07.png \(label 'old' is not a finite number\)"):
        load_data(
            f"csv:{write_table(rows, ('file', 'age', 'depth'))}", DataConfig(columns="label=age"), target="numbers"
        )


def test_parquet_supports_lists_and_numbers(write_table, tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    write_table(rows_of(20))
    names = [row[0] for row in rows_of(20)]
    columns = {"image": names, "tags": [["a"], ["a", "b"]] * 10, "label": [3, 7] * 10, "w": [0.5, None] * 10}
    parquet.write_table(pa.table(columns), tmp_path / "x.parquet")
    assert load_data(f"parquet:{tmp_path}/x.parquet").classes == ["3", "7"]
    data = load_data(f"parquet:{tmp_path}/x.parquet", DataConfig(columns="label=tags"), target="labels")
    assert set(data.train.annotations.targets) == {("a",), ("a", "b")}
    with pytest.raises(ValueError, match="column 'tags' must contain one class per image, got the list 'a' in row 1"):
        load_data(f"parquet:{tmp_path}/x.parquet", DataConfig(columns="label=tags"))
    with pytest.raises(ValueError, match=r"10 of 20 rows .*images/01.png \(weight None is not in \[0, 1e\+09\]\)"):
        load_data(f"parquet:{tmp_path}/x.parquet", DataConfig(columns="weight=w"))
    (tmp_path / "y.parquet").write_text("no")
    with pytest.raises(ValueError, match=r"y\.parquet' must be a Parquet file"):
        load_data(f"parquet:{tmp_path}/y.parquet")


def test_parquet_may_only_reference_files_below_its_folder_or_the_given_root(write_table, tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    write_table(rows_of(20))
    (tmp_path / "tables").mkdir()
    file = tmp_path / "tables" / "x.parquet"
    names = [row[0] for row in rows_of(20)]
    secret = tmp_path / "secret.png"
    Image.new("RGB", (12, 12)).save(secret)
    (tmp_path / "images" / "link.png").symlink_to("/dev/zero")
    for outside in (str(secret), "../secret.png", "/dev/zero", "images/link.png"):
        parquet.write_table(pa.table({"image": [*names, outside], "label": [0, 1] * 10 + [0]}), tmp_path / "x.parquet")
        if outside == str(secret):  # below the folder, and absolute
            load_data(f"parquet:{tmp_path}/x.parquet")
            continue
        with pytest.raises(ValueError, match=r"1 of 21 rows .* is outside '.*'; allow .*--columns root=FOLDER"):
            load_data(f"parquet:{tmp_path}/x.parquet")
        with pytest.raises(ValueError, match=r"x.parquet must list images below its folder: .* is outside '"):
            table_paths(tmp_path / "x.parquet", Columns())
    parquet.write_table(pa.table({"image": names, "label": [0, 1] * 10}), file)
    with pytest.raises(ValueError, match="20 no such file"):
        load_data(f"parquet:{file}")
    assert len(load_data(f"parquet:{file}", DataConfig(columns=f"root={tmp_path}")).train) == 12
    assert table_paths(file, Columns(root=tmp_path))[0] == tmp_path / names[0]


def test_timestamps_out_of_range_in_a_parquet_file_are_a_one_line_error(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"image": ["a.png"], "label": ["a"], "when": pa.array([2**62], pa.timestamp("us"))})
    parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x\.parquet' must be a Parquet file: "):
        load_data(f"parquet:{tmp_path}/x.parquet")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must have one row per image, got an empty table"),
        ("file,label\n", "must have one row per image, got an empty table"),
        ("file,file\na,b\n", "must have unique column names, got duplicates of 'file'"),
        ("file,label\na,b,c\n", "must have 2 values per line, one for each of file, label, but row 1 has 3"),
        (b"file,label\na,caf\xe9\n", r"must be a CSV file in UTF-8: .*; save it as CSV \(UTF-8\)"),
    ],
)
def test_a_damaged_table_is_rejected(content, message, tmp_path):
    (tmp_path / "x.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        load_data(f"csv:{tmp_path}/x.csv")


def test_a_missing_table_error_suggests_similar_names(write_table):
    file = write_table(rows_of(4))
    with pytest.raises(FileNotFoundError, match=r"photo\.csv, which does not exist; nearest: 'photos\.csv'"):
        load_data(f"csv:{file.parent}/photo.csv")


def test_other_data_has_no_columns_and_takes_numbers_from_class_names(write_images):
    with pytest.raises(ValueError, match=r"columns applies only to data with columns \(csv:, .*digits"):
        load_data("digits", DataConfig(columns="label=x"))
    assert load_data("digits", target="numbers").train.annotations.targets[0] in {float(n) for n in range(10)}
    photos = write_images({"cat": 6, "dog": 6})
    with pytest.raises(ValueError, match=r"data must have a column of numbers .* got .* with classes 'cat', 'dog'"):
        load_data(f"folder:{photos}", target="numbers")
    for old, new in (("cat", "3"), ("dog", "nan")):
        (photos / old).rename(photos / new)
    with pytest.raises(ValueError, match=r"data must have a column of numbers .* got .* with classes '3', 'nan'"):
        load_data(f"folder:{photos}", target="numbers")


def test_ten_thousand_rows_are_read_in_order(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "one.png")
    with (tmp_path / "x.csv").open("w") as file:
        file.writelines(["path,label\n", *(f"one.png,{i % 7}\n" for i in range(10_000))])
    paths = table_paths(tmp_path / "x.csv", Columns())
    assert len(paths) == 10_000 and paths[0] == tmp_path / "one.png"


def test_text_instead_of_numbers_is_reported_even_with_skip_corrupt(write_table):
    file = write_table(rows_of(12))
    for skip_corrupt in (False, True):
        with pytest.raises(
            ValueError, match=r"'species' must contain numbers for the regression task, got 'cat' in row 1 and"
        ):
            load_data(f"csv:{file}", DataConfig(columns="label=species", skip_corrupt=skip_corrupt), target="numbers")


def test_the_reasons_for_unusable_rows_are_reported(write_table):
    file = write_table([(f"images/gone{i}.png", "ab"[i % 2], "p") for i in range(4)])
    with pytest.raises(ValueError, match=r"no images to train on; all are unusable: 4 of 4 rows of .*, 4 no such file"):
        load_data(f"csv:{file}", DataConfig(columns="label=species,group=none", skip_corrupt=True))


@pytest.mark.parametrize("weight", ["-1", "1e308", "nan", "x"])
def test_weights_out_of_range_are_rejected(weight, write_table):
    rows = [(*row[:2], weight if index == 3 else "1") for index, row in enumerate(rows_of(12))]
    file = write_table(rows, ("path", "label", "weight"))
    with pytest.raises(
        ValueError, match=rf"1 of 12 rows .*, 1 invalid weight: .* \(weight '{weight}' is not in \[0, 1e\+09"
    ):
        load_data(f"csv:{file}")


def test_zero_weights_are_rejected(write_table):
    file = write_table([(*row[:2], "0") for row in rows_of(12)], ("path", "label", "weight"))
    with pytest.raises(ValueError, match=r"a weight above 0, got 0 for all 12; --columns weight=none ignores"):
        load_data(f"csv:{file}")
    assert len(load_data(f"csv:{file}", DataConfig(columns="weight=none")).train) > 0


def test_classes_without_training_images_are_reported_with_a_remedy(write_table):
    rows = [(*row[:2], "train" if row[1] == "cat" or i < 2 else "test") for i, row in enumerate(rows_of(12))]
    rows = [(path, "fox" if part == "test" else label, part) for path, label, part in rows]
    file = write_table(rows, ("path", "label", "split"))
    with pytest.raises(ValueError) as caught:
        load_data(f"csv:{file}")
    assert str(caught.value).endswith(
        "1 of 3 classes have no training image: 'fox' (5 in other splits); add training images, remove their rows, "
        "or create new splits with --columns split=none"
    )


def test_several_classes_without_test_images_are_one_warning(write_table):
    rows = [(*row[:2], "test" if i in (0, 4) else "train") for i, row in enumerate(rows_of(24, classes="abcd"))]
    data = load_data(f"csv:{write_table(rows, ('path', 'label', 'split'))}")
    assert (
        "3 classes have no test images: 'b', 'c', 'd'; add test images, or test scores will ignore missing classes"
        in data.warnings
    )


def test_a_column_of_a_joined_label_has_no_other_role(write_table):
    rows = [(f"images/{i:02}.png", str(i / 4), str(i)) for i in range(60)]
    file = write_table(rows, ("file", "age", "weight"))
    data = load_data(f"csv:{file}", DataConfig(columns="label=age+weight"), target="numbers")
    assert data.classes == ["age", "weight"] and data.train.annotations.weights is None


def test_a_column_name_may_contain_a_plus(write_table):
    rows = [(f"images/{i:02}.png", "cat" if i % 2 else "dog") for i in range(40)]
    file = write_table(rows, ("file", "kind+breed"))
    assert load_data(f"csv:{file}", DataConfig(columns="label=kind+breed")).classes == ["cat", "dog"]


@pytest.mark.parametrize(
    ("value", "columns"),
    [
        ("c+a+b", ["c", "a+b"]),
        ("a+b+c", ["a+b", "c"]),
        ("a+b", ["a+b"]),
        ("a+c", ["a", "c"]),
        ("c+d", ["c", "d"]),
    ],
)
def test_the_longest_matching_column_names_are_used(value, columns):
    assert columns_in("label", value, ["a", "a+b", "c"]) == columns
    assert columns_in("group", value, ["a", "a+b", "c"]) == [value]


def test_two_exclusive_classes_may_be_multi_hot_vectors(write_table):
    rows = [(f"images/{i:02}.png", str([i % 2, 1 - i % 2])) for i in range(40)]
    data = load_data(f"csv:{write_table(rows, ('file', 'tags'))}", target="labels")
    assert set(data.train.annotations.targets) == {("0",), ("1",)}


def test_a_path_that_is_too_long_is_an_unusable_row(write_table):
    file = write_table([*rows_of(20), ("x" * 300, "cat", "p0")])
    with pytest.raises(ValueError, match=r"1 of 21 rows of .*1 no such file"):
        load_data(f"csv:{file}")
    assert sum(map(len, parts_of(load_data(f"csv:{file}", DataConfig(skip_corrupt=True))))) == 20


def test_lists_written_by_pandas_are_labels(write_table):
    sets = [["sea"], ["sea", "sand"], ["sand", "dune"], []]
    rows = [(f"images/{i:02}.png", str(sets[i % 4])) for i in range(40)]
    data = load_data(f"csv:{write_table(rows, ('file', 'tags'))}", target="labels")
    assert data.classes == ["dune", "sand", "sea"]
    assert data.train.annotations.targets == [tuple(sets[int(name[7:9]) % 4]) for name in data.train.names]


def test_rare_strata_are_merged_within_the_images_that_are_split(write_table):
    # three images have the label "rare", but only one of them is in the training split
    rows = [(f"images/{i:02}.png", "ab"[i % 2], "train" if i < 30 else "test") for i in range(40)]
    for index in (0, 38, 39):
        rows[index] = (rows[index][0], f"{rows[index][1]}|rare", rows[index][2])
    file = write_table(rows, ("file", "tags", "split"))
    data = load_data(f"csv:{file}", target="labels")
    assert len(data.val) == 6 and data.classes == ["a", "b", "rare"]
    numbers = [(f"images/{i:02}.png", str(i), "train" if i < 30 else "test") for i in range(40)]
    data = load_data(f"csv:{write_table(numbers, ('file', 'label', 'split'))}", target="numbers")
    assert (len(data.train), len(data.val), len(data.test)) == (24, 6, 10)


def test_a_column_assigned_to_a_role_has_no_other_role(write_table):
    rows = [(f"images/{i:02}.png", f"site {i // 4}", "ab"[i % 2]) for i in range(40)]
    file = write_table(rows, ("file", "category", "species"))
    data = load_data(f"csv:{file}", DataConfig(columns="group=category"))
    assert data.classes == ["a", "b"] and data.train.annotations.groups[0].startswith("site ")


def test_empty_lines_before_the_header_are_ignored(write_table):
    file = write_table(rows_of(20))
    file.write_text(f"\n\n{file.read_text()}")
    assert load_data(f"csv:{file}", DataConfig(columns="label=species")).classes == ["cat", "dog"]


def test_rows_that_are_not_0_or_1_are_unusable(write_table):
    rows = [(f"images/{i:02}.png", str(i % 2), "1") for i in range(40)]
    rows[3] = ("images/03.png", "1", "NA")
    columns = "label=a+b"
    file = write_table(rows, ("file", "a", "b"))
    with pytest.raises(ValueError, match=r"1 of 40 rows .*, 1 invalid label: images/03.png \(label 'NA' is not 0 or 1"):
        load_data(f"csv:{file}", DataConfig(columns=columns), target="labels")
    data = load_data(f"csv:{file}", DataConfig(columns=columns, skip_corrupt=True), target="labels")
    assert sum(map(len, parts_of(data))) == 39
    file = write_table([(name, "1.5", "2") for name, _, _ in rows], ("file", "a", "b"))
    with pytest.raises(ValueError, match=r"must contain only 0 and 1, got '1.5' in row 1 and no valid row"):
        load_data(f"csv:{file}", DataConfig(columns=columns, skip_corrupt=True), target="labels")


def test_an_image_without_a_multi_hot_vector_has_no_label(write_table):
    rows = [(f"images/{i:02}.png", str([1, i % 2]) if i else "") for i in range(40)]
    data = load_data(f"csv:{write_table(rows, ('file', 'tags'))}", target="labels")
    targets = [target for part in parts_of(data) for target in part.annotations.targets]
    assert data.classes == ["0", "1"] and Counter(targets) == {("0",): 19, ("0", "1"): 20, (): 1}


def test_infinite_numbers_are_unusable(write_table):
    rows = [(f"images/{i:02}.png", "inf" if i == 5 else str(i)) for i in range(20)]
    with pytest.raises(ValueError, match=r"images/05.png \(label 'inf' is not a finite number\)"):
        load_data(f"csv:{write_table(rows, ('file', 'y'))}", target="numbers")


@pytest.mark.parametrize(
    ("path", "message"),
    [("/dev/null", "got csv:/dev/null, which is not a regular file"), ("x" * 300, "xxx, which does not exist")],
)
def test_a_path_that_is_no_file_is_reported(path, message):
    with pytest.raises(FileNotFoundError, match=message):
        load_data(f"csv:{path}")


def test_images_without_any_label_cannot_be_used_for_training(write_table):
    file = write_table([(f"images/{i:02}.png", "") for i in range(20)], ("file", "tags"))
    with pytest.raises(ValueError, match=r"photos.csv: at least one label is required, got none in column 'tags'$"):
        load_data(f"csv:{file}", target="labels")
    assert len(load_data(f"csv:{file}", target="labels", divide=False).train) == 20


@pytest.mark.parametrize("separator", [" ", ", ", "\n "])
def test_lists_as_numpy_prints_them_are_parsed(separator, write_table):
    rows = [(f"images/{i:02}.png", f"['sea'{separator}'{'sand' if i % 2 else 'dune'}']") for i in range(40)]
    data = load_data(f"csv:{write_table(rows, ('file', 'tags'))}", target="labels")
    assert set(data.train.annotations.targets) == {("sea", "sand"), ("sea", "dune")}
    rows = [(f"images/{i:02}.png", f"[{i % 2}{separator}{1 - i % 2}]") for i in range(40)]
    data = load_data(f"csv:{write_table(rows, ('file', 'tags'))}", target="labels")
    assert set(data.train.annotations.targets) == {("0",), ("1",)}


def test_numbers_in_a_quoted_label_are_kept(write_table):
    rows = [(f"images/{i:02}.png", f"['route {i % 2} 2']") for i in range(40)]
    data = load_data(f"csv:{write_table(rows, ('file', 'tags'))}", target="labels")
    assert data.classes == ["route 0 2", "route 1 2"]


def test_the_order_of_labels_has_no_meaning(write_table):
    rows = [(f"images/{i:02}.png", "sea|sand" if i % 2 else "dune") for i in range(40)]
    repeated = [("images/01.png", "sand|sea")]
    data = load_data(f"csv:{write_table([*rows, *repeated], ('file', 'tags'))}", target="labels")
    assert any("skipped 1 repeated row" in note for note in data.notes)
    assert not any("different label" in note for note in [*data.notes, *data.warnings])


def test_images_in_a_parquet_file_need_another_prefix(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    images = [{"bytes": b"\x89PNG" * 1000, "path": None}] * 20
    parquet.write_table(pa.table({"image": images, "label": ["a", "b"] * 10}), tmp_path / "x.parquet")
    with pytest.raises(
        ValueError, match="column 'image' must contain paths, got images; load them with hf:FOLDER"
    ) as e:
        load_data(f"parquet:{tmp_path}/x.parquet")
    assert len(str(e.value)) < 300


def test_unusable_rows_with_one_name_are_counted(write_table):
    file = write_table([*rows_of(20), ("images/gone.png", "cat", "p0"), ("images/gone.png", "dog", "p1")])
    assert len(load_data(f"csv:{file}", DataConfig(skip_corrupt=True)).broken) == 2
