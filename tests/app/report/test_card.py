"""The model card of a run."""

import json
import re

import yaml
from markdown_it import MarkdownIt

from snella_app.report.card import model_card


def metadata_of(card):
    """Return the metadata of a card."""
    return yaml.safe_load(card.split("---")[1])


def test_a_card_has_metadata_and_a_results_table(run):
    card = model_card(run.finished().folder, "    snella predict RUN", name="solar cells")
    head, test = metadata_of(card), run.read("metrics.json")["test"]
    assert head["pipeline_tag"] == "image-classification" and head["tags"] == ["snella", "classification"]
    (entry,) = head["model-index"]
    measured = {m["type"]: m["value"] for result in entry["results"] for m in result["metrics"]}
    assert entry["name"] == "solar cells" and entry["results"][0]["dataset"]["split"] == "test"
    assert measured == {key: round(test[key], 6) for key in ("accuracy", "balanced_accuracy")}
    assert f"| test accuracy | {100 * test['accuracy']:.1f}% | 95% margin: ±" in card
    assert '`["defective", "sound"]`' in card and "## How to use\n\nsnella predict RUN\n" in card


def test_results_of_the_final_head_are_no_claims_about_the_trained_head(run):
    run.finished()
    head = {"layers": [1, 2], "is_saved": True, "metric": "accuracy", "val": 0.9, "val_trained": 0.8125}
    run.change("metrics.json", final_head=head)
    assert "model-index" in metadata_of(model_card(run.folder, "x"))
    card = model_card(run.folder, "x", has_final_head=False)
    assert "model-index" not in metadata_of(card) and "## Results" in card
    assert "The code above uses the trained head, whose validation accuracy is 0.8125." in card
    run.change("metrics.json", final_head=head | {"is_saved": False})
    assert "model-index" in metadata_of(model_card(run.folder, "x", has_final_head=False))


def test_a_card_does_not_claim_that_a_last_epoch_saved_for_its_final_head_was_selected(run):
    head = {"layers": [1, 2], "is_saved": True, "metric": "accuracy", "val": 0.9, "val_trained": 0.8}
    run.finished().change("metrics.json", final_head=head | {"replaced_epoch": 9}, best_epoch=10)
    saved = "The last epoch is saved with a final head selected on the validation images"
    assert f"{saved}; the test images were evaluated once." in model_card(run.folder, "x")
    run.change("metrics.json", test=None)
    assert f"{saved}, so these results are optimistic." in model_card(run.folder, "x")


def test_the_license_is_left_to_the_user(run):
    card = model_card(run.finished().folder, "x")
    assert "license" not in metadata_of(card)
    assert "\n# license: fill in" in card and "## License\n\nFill in" in card


def test_missing_or_optimistic_results_are_noted(run):
    run.run_json()
    assert "## Results" not in model_card(run.folder, "x") and "model-index" not in metadata_of(
        model_card(run.folder, "x")
    )
    assert "selected on the validation images; the test images were evaluated once." in model_card(
        run.finished().folder, "x"
    )
    run.change("metrics.json", test=None)
    assert "on the validation images, so these results are optimistic." in model_card(run.folder, "x")
    run.change("metrics.json", selected_on="test", best_metric="test_accuracy")
    assert "these results are optimistic" in model_card(run.folder, "x")
    run.change("metrics.json", selected_on=None)
    assert "results of the last epoch; no epoch was selected" in model_card(run.folder, "x")
    run.change("metrics.json", averaged={"kind": "swa", "epochs": [1, 2], "offered": [1, 2], "is_saved": True})
    card = model_card(run.folder, "x")
    assert "results of the averaged weights; no epoch was selected" in card
    assert "- Epoch: the average of epochs 1, 2 of 10\n" in card


def test_the_base_model_has_its_hub_id(run):
    run.finished()
    assert "base_model" not in metadata_of(model_card(run.folder, "x"))
    backbone = {"name": "vit_base_patch16_224.augreg_in21k", "architecture": "vit_base_patch16_224", "pretrained": True}
    run.change("run.json", backbone=run.read("run.json")["backbone"] | backbone)
    assert metadata_of(model_card(run.folder, "x"))["base_model"] == "timm/vit_base_patch16_224.augreg_in21k"
    for name, expected in (
        ("vit_base_patch16_clip_quickgelu_224.openai", "timm/vit_base_patch16_clip_224.openai"),
        ("vitamin_small_224.datacomp1b_clip", "jienengchen/ViTamin-S"),
        ("gcvit_tiny.in1k", None),  # timm loads these weights from GitHub
    ):
        run.change("run.json", backbone=run.read("run.json")["backbone"] | {"name": name})
        assert metadata_of(model_card(run.folder, "x")).get("base_model") == expected
    run.change("run.json", backbone=run.read("run.json")["backbone"] | {"name": "weights.pth"})
    assert "base_model" not in metadata_of(model_card(run.folder, "x"))


def test_ordered_classes_are_no_outputs(run):
    run.finished(classes=("1 low", "2 mid", "3 high")).change("run.json", task="ordinal")
    assert '3 classes, from lowest to highest: `["1 low", "2 mid", "3 high"]`.' in model_card(run.folder, "x")


def test_untrusted_text_is_escaped(run):
    evil = "<img src=x onerror=alert(1)>`<b>`\n\n# title [a](http://b) | c _a_ **b**"
    run.finished(classes=(evil, "sound")).change("run.json", command=f"snella train --data {evil}")
    data = run.read("run.json")["data"] | {"description": evil, "notes": [evil], "spec": evil}
    run.change("run.json", data=data)
    card = model_card(run.folder, "x", name=evil)
    body = card.split("---", 2)[2]
    shown = MarkdownIt("commonmark").enable("table").render(body)
    assert not re.search("<(img|b|a|em|strong)[ >]", shown)
    assert shown.count("<h1>") == 1 and "<h1>title" not in shown
    names = re.search(r"in this order: `(\[.*?\])`\.", body)
    assert json.loads(names[1]) == [evil, "sound"]
    assert "<" not in names[1] and "`" not in names[1]


def test_the_score_of_another_epoch_is_no_claim_about_the_exported_head(run):
    head = {"layers": [1, 2], "is_saved": True, "metric": "balanced_accuracy", "val": 0.9, "val_trained": 0.8125}
    run.finished().change("metrics.json", final_head=head)
    text = "The code above uses the trained head"
    assert f"{text}, whose validation balanced accuracy is 0.8125." in model_card(run.folder, "x", has_final_head=False)
    run.change("metrics.json", final_head=head | {"replaced_epoch": 9}, best_epoch=10)
    assert f"{text}." in model_card(run.folder, "x", has_final_head=False)


def test_a_method_without_options_has_no_comma(run):
    run.finished().change("run.json", method="linear", method_options={})
    assert "Method: `linear`\n" in model_card(run.folder, "x").replace("** ", " ").replace("**", "")
