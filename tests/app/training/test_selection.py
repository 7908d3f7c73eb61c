"""Runs of methods that select trainable parameters from data."""

import pytest
import timm
import torch
from safetensors.torch import load_file

from snella_app.config.train import TrainConfig
from snella_app.data.load import load_data
from snella_app.data.options import DataConfig
from snella_app.methods import build_method
from snella_app.runs.merge import merge
from snella_app.runs.model import load_run
from snella_app.tasks import ClassificationTask
from snella_app.training.build import (
    SELECTION,
    LoadedData,
    has_selection,
    read_side,
    selection_data,
    store_selection,
)
from snella_app.training.session import TrainingInterrupted
from snella_app.training.train import train

from .components import interrupt_before

OPTIONS = {"noah": {"sizes": [1], "supernet_epochs": 1, "population": 2, "generations": 1}}


@pytest.fixture
def parts(settings):
    """Return splits and data of a tiny run; each image becomes its first pixel and a random number."""
    config = settings(method="gps")
    splits = load_data(str(config.data.spec), seed=0)
    mark = lambda image: torch.tensor([float(sum(image.getpixel((0, 0)))), float(torch.rand(()))])  # noqa: E731
    task = ClassificationTask(tuple(splits.classes))
    data = LoadedData(config.data, 0, splits, task, 0.0, batch_size=8, shows_progress=False)
    return splits.train.with_transform(mark), splits.val.with_transform(mark), data


def passes(data, split_of, count=2):
    return [[torch.cat([i, labels[:, None]], 1) for i, labels in split_of(data)] for _ in range(count)]


def test_every_pass_has_all_training_images_with_a_new_order_and_augmentation(parts):
    first, second = passes(selection_data(*parts), lambda data: data())
    assert [len(batch) for batch in first] == [8] * 3 + [len(parts[0]) - 24] * (len(parts[0]) > 24)
    images = [torch.cat(batches)[:, [0, 2]] for batches in (first, second)]
    assert not torch.equal(*images)
    assert torch.equal(*(rows[rows[:, 0].argsort(stable=True)][:, 0] for rows in images))
    assert not torch.isin(torch.cat(first)[:, 1], torch.cat(second)[:, 1]).any()


def test_batches_depend_only_on_the_seed_and_do_not_change_the_torch_generator(parts):
    state = torch.random.get_rng_state()
    first, second = (passes(selection_data(*parts), lambda data: data()) for _ in range(2))
    assert all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_selection_keeps_the_order_of_validation_images_and_the_epoch_of_training_images(parts):
    data = selection_data(*parts)
    seen = torch.cat([labels for _, labels in data.validation()])
    assert seen.tolist() == parts[1].labels
    passes(data, lambda data: data())
    assert parts[0].epoch == 0
    assert selection_data(parts[0], None, *parts[2:]).validation is None


@pytest.mark.parametrize(
    "method", ["gps", pytest.param("spt-adapter-2", marks=pytest.mark.slow), "fixed-mask-2", "noah"]
)
def test_a_trained_adapter_is_used_without_the_data(method, settings, console, no_report, tmp_path):
    run = train(settings(method=method, method_options=OPTIONS.get(method, {}), epochs=1), console)
    assert has_selection(run.path)
    assert ("noah: generation 0" in console.file.getvalue()) == (method == "noah")
    model = load_run(run.path).model
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        outputs = model(x)
    assert outputs.isfinite().all()
    if method in ("gps", "fixed-mask-2"):
        merged = load_file(merge(run.path, tmp_path / "merged.safetensors").path)
        assert "blocks.0.attn.qkv.weight" in merged


def test_noah_searches_on_separate_images_that_the_run_also_trains_on(settings, console, no_report, monkeypatch):
    seen = {}

    def record(train, val, *others):
        seen["train"], seen["val"] = (set(part.names) for part in (train, val))
        seen["transforms"] = train.transform is not None and val.transform is not None
        seen["sides"] = {part.source.reading.side for part in (train, val)}
        return selection_data(train, val, *others)

    monkeypatch.setattr("snella_app.training.build.selection_data", record)
    config = settings(method="noah", method_options=OPTIONS["noah"], epochs=1, protocol="final")
    run = train(config, console)
    parts = load_data(str(config.data.spec), DataConfig(protocol="standard"), seed=config.run.seed)
    assert seen["val"] == set(parts.val.names) and seen["train"] == set(parts.train.names) and seen["transforms"]
    assert not (seen["train"] | seen["val"]) & set(parts.test.names)
    assert seen["sides"] == {read_side({"input_size": (3, 32, 32)}, parts.train)}
    assert run.read_json("run.json")["data"]["sizes"]["train"] == len(seen["train"] | seen["val"])


def test_a_resumed_run_reuses_the_selection_and_ends_bit_identical(settings, console, no_report, monkeypatch):
    chosen = {"method": "spt-lora-2", "method_options": {"budget": 0.003, "alpha": 40}, "epochs": 2}
    uninterrupted = train(settings(**chosen, out=settings().run.out + "-uninterrupted"), console)
    config = settings(**chosen)
    with interrupt_before(6, presses=2), pytest.raises(TrainingInterrupted, match="checkpoint-4"):
        train(config, console)
    calls = []
    monkeypatch.setattr("snella_lab.methods.spt.squared_gradients", lambda *args: calls.append(args))
    run = train(TrainConfig.from_flat(out=config.run.out, resume=True, progress=False), console)
    first, second = (load_file(r.path / "adapter" / "trainable.safetensors") for r in (run, uninterrupted))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert not calls


def test_methods_without_selection_store_none(tmp_path):
    model = build_method("bias", timm.create_model("test_vit", num_classes=3, img_size=32))
    store_selection(tmp_path, "bias", model)
    assert not (tmp_path / SELECTION).exists()
