"""The table "Supported tasks" of docs/methods.md: supported pairs train, others are rejected."""

import re
from pathlib import Path

import pytest
import torch

from snella_app.backbones.create import create_backbone
from snella_app.backbones.segmenter import create_segmenter
from snella_app.methods import METHODS, SelectionData, build_method, load_trained, save_trained
from snella_app.tasks import create_task
from snella_lab.recipes.dreambooth.config import DreamBoothConfig
from snella_lab.recipes.instruct.config import LanguageConfig

COLUMNS = ("classification", "timm", "sam", "generators")
SMALL = {"shira": "shira-2", "fourierft": "fourierft-20"}


def documented_support(column):
    """Return `(method, is_supported)` from the table."""
    text = (Path(__file__).parents[3] / "docs" / "methods.md").read_text()
    support = []
    for line in text.split("## Supported tasks")[1].split("\n## ")[0].splitlines():
        if "| yes |" in line:
            names, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            for name in re.findall(r"`([^`]+)`", names):
                matching = [m for m in METHODS if re.fullmatch(name.replace("*", ".+"), m)]
                support += [(method, cells[COLUMNS.index(column)] == "yes") for method in matching]
    return support


@pytest.fixture
def make_segmenter(sam_folder):
    def make(column):
        torch.manual_seed(0)
        if column == "sam":
            return create_segmenter(f"sam:{sam_folder}", num_classes=2, img_size=32)
        return create_segmenter("test_vit", num_classes=2, pretrained=False, img_size=32)

    return make


@pytest.fixture
def pairs():
    """Selection data with two batches of images and masks, and the task's loss."""
    draw = torch.Generator().manual_seed(0)
    task = create_task("segmentation", ["background", "polyp"])
    batches = [
        (torch.randn(2, 3, 32, 32, generator=draw), (torch.rand(2, 32, 32, generator=draw) > 0.5).long())
        for _ in range(2)
    ]
    return SelectionData(lambda: batches, lambda: batches, task.loss)


def test_the_table_lists_every_method_and_all_support_classification():
    assert {name for name, is_supported in documented_support("classification") if is_supported} == set(METHODS)


TARGETS = {
    "multilabel": (3, lambda draw: (torch.rand(4, 3, generator=draw) > 0.5).float()),
    "ordinal": (2, lambda draw: torch.randint(0, 3, (4,), generator=draw)),
    "regression": (3, lambda draw: torch.randn(4, 3, generator=draw).double()),
}
LABEL_DEPENDENT = ("gps", "spt-lora-2", "spt-adapter-2", "fixed-mask-2", "noah")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("method", ["linear", "mlp", "vqt", "snella-2", *LABEL_DEPENDENT])
def test_a_method_trains_on_non_class_targets(method, target):
    outputs, make_labels = TARGETS[target]
    task, draw = create_task(target, ["0", "1", "2"]), torch.Generator().manual_seed(0)
    batches = [(torch.randn(4, 3, 32, 32, generator=draw), make_labels(draw)) for _ in range(2)]
    data = SelectionData(lambda: batches, lambda: batches, task.loss, has_class_scores=task.has_class_scores)
    torch.manual_seed(0)
    backbone = create_backbone("test_vit", num_classes=outputs, pretrained=False, img_size=32)
    options = {"supernet_epochs": 1, "population": 4, "generations": 1} if method == "noah" else {}
    model = build_method(method, backbone, batches=data, **options).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=3e-3)
    losses = []
    for _ in range(6):
        loss = sum(task.loss(model(images), labels) for images, labels in batches)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("column", ["timm", "sam"])
@pytest.mark.parametrize("method", [method for method, is_supported in documented_support("timm") if is_supported])
def test_supported_methods_train_segmentation(method, column, make_segmenter, pairs, tmp_path):
    assert dict(documented_support(column))[method]
    torch.manual_seed(0)
    model = build_method(SMALL.get(method, method), make_segmenter(column), head="decoder", batches=pairs).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for images, masks in pairs():
        optimizer.zero_grad()
        pairs.loss(model(images), masks).backward()
        optimizer.step()
    moved = {name for name, p in trained.items() if not torch.equal(before[name], p)}
    assert any("decoder" in name for name in moved)
    assert any("encoder" in name for name in moved) == (method != "linear")
    save_trained(model.eval(), tmp_path)
    with torch.no_grad():
        assert torch.equal(load_trained(tmp_path, make_segmenter(column)).eval()(images), model(images))


@pytest.mark.parametrize("column", ["timm", "sam"])
@pytest.mark.parametrize("method", [method for method, is_supported in documented_support("timm") if not is_supported])
def test_unsupported_methods_are_rejected_with_a_one_line_error(method, column, make_segmenter, pairs):
    assert not dict(documented_support(column))[method]
    reason = (
        "its head 'decoder' must be a linear layer, got"
        if method == "mlp"
        else ("its 'decoder' takes feature maps, to which tokens cannot be added; use a plain ViT classifier")
    )
    with pytest.raises(ValueError, match=f"^method '{method}' cannot be applied to S.*: {reason}") as caught:
        build_method(method, make_segmenter(column), head="decoder", batches=pairs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("method", "is_supported"), documented_support("generators"))
def test_generators_and_language_models_support_the_documented_methods(method, is_supported, tmp_path):
    configs = (
        lambda: DreamBoothConfig.from_flat(
            data="folder:x", pipeline="sd3", out="o", method=method, class_name="dog"
        ).resolved(),
        lambda: LanguageConfig.from_flat(data="x.json", model="llama", out="o", method=method).resolved(),
    )
    for make in configs:
        if is_supported:
            assert make().optim.lr > 0
        else:
            with pytest.raises(ValueError, match=f"method must be .*, got '{method}'"):
                make()
