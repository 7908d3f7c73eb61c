"""Runs that start from the trained weights of another run."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from snella import BudgetAllocator
from snella_app.config.train import TrainConfig
from snella_app.methods.registry import matrices_of
from snella_app.runs.model import load_run
from snella_app.training.build import load_initial_weights
from snella_app.training.session import TrainingInterrupted
from snella_app.training.train import train

from .components import build_components

pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture
def new_config(finished, tmp_path):
    """Return a function that creates the configuration of a run that starts from the finished one."""

    def make(**changes):
        values = {"init_from": str(finished.path), "out": str(tmp_path / "new"), "device": "cpu", "progress": False}
        return TrainConfig.from_flat(**{**values, **changes})

    return make


def test_a_new_run_starts_with_the_outputs_and_budgets_of_the_initial_run(finished, new_config, console):
    config = finished.init_from_settings(new_config(batch_size=8)).resolved()
    parts = build_components(config)
    images = torch.stack([parts.splits.val[k][0] for k in range(4)])
    with torch.no_grad():
        fresh = parts.model.eval()(images)
    load_initial_weights(parts, config.data.spec, finished)
    BudgetAllocator(parts.model, total_epochs=2, steps_per_epoch=2)
    initial = load_run(finished)
    with torch.no_grad():
        expected = initial.model(images)
        assert torch.equal(parts.model.eval()(images), expected)
    assert not torch.allclose(fresh, expected)
    budgets = [matrix.budget for matrix in matrices_of(initial.model)]
    assert [matrix.budget for matrix in matrices_of(parts.model)] == budgets
    assert len({budget / matrix.size for budget, matrix in zip(budgets, matrices_of(initial.model), strict=True)}) > 1
    assert parts.splits.notes == []


def test_overwriting_a_run_with_checkpoints_starts_from_the_initial_run(new_config, console):
    adapters = []
    for overwrite in (False, True):
        run = train(new_config(epochs=1, batch_size=8, overwrite=overwrite), console)
        assert any(run.checkpoints.iterdir())
        adapters.append(load_file(run.adapter / "adapter_model.safetensors"))
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


def test_unset_settings_are_inherited_from_the_initial_run(finished, new_config, console):
    run = train(new_config(epochs=2, batch_size=8, target_sparsity=0.8), console)
    assert run.status == "finished"
    actual, expected = run.read_config(), finished.read_config()
    inherited = ("method", "r", "backbone", "data")
    assert all(actual.flat()[name] == expected.flat()[name] for name in inherited)
    assert (actual.optim.epochs, actual.method.target_sparsity) == (2, 0.8)
    before, after = (folder.read_json("allocation.json") for folder in (finished, run))
    budgets = [entry["budget"] for entry in after["history"]]
    assert budgets[0] == sum(matrix["budget"] for matrix in before["matrices"])
    assert budgets[-1] == after["total_weights"] - round(0.8 * after["total_weights"]) < budgets[0]
    assert f"trained weights of {finished.path}, including the head" in console.file.getvalue()


def test_relative_data_of_the_initial_run_is_found_from_another_folder(
    settings, new_config, make_photos, tmp_path, console, monkeypatch
):
    make_photos(tmp_path / "photos", {"cats": 16, "dogs": 16})
    monkeypatch.chdir(tmp_path)
    initial = train(settings(data="folder:photos", epochs=1, out=str(tmp_path / "initial")), console)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = train(new_config(init_from=str(initial.path), epochs=1, batch_size=8), console)
    assert run.read_config().data.spec == f"folder:{tmp_path / 'photos'}"


def test_a_new_run_resumes_without_the_initial_run(finished, new_config, tmp_path, console, monkeypatch):
    copied = tmp_path / "other"
    shutil.copytree(finished.path, copied)
    config = new_config(init_from=str(copied), epochs=2, batch_size=8)
    uninterrupted = train(config, console)
    with monkeypatch.context() as patch:
        patch.setattr("snella_app.training.train.finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(TrainingInterrupted, match="--resume"):
            train(new_config(init_from=str(copied), epochs=2, batch_size=8, out=str(tmp_path / "cut")), console)
    shutil.rmtree(copied)
    resumed = train(TrainConfig.from_flat(out=str(tmp_path / "cut"), resume=True, progress=False), console)
    assert resumed.read_json("metrics.json")["history"] == uninterrupted.read_json("metrics.json")["history"]


def test_a_new_run_with_resume_inherits_the_settings_of_the_initial_run(finished, new_config, console):
    run = train(new_config(epochs=1, resume=True), console)
    config, initial = run.read_config(), finished.read_config()
    assert run.status == "finished" and config.model.init_from == str(finished.path)
    assert (config.method.name, config.model.img_size) == (initial.method.name, initial.model.img_size)
    assert train(new_config(resume=True), console).status == "finished"


def test_the_recipe_is_chosen_with_the_weights_of_the_initial_run(finished, new_config, console, monkeypatch):
    loaded = []
    monkeypatch.setattr("snella_app.training.train.load_initial_weights", lambda *_: loaded.append("weights"))
    monkeypatch.setattr("snella_app.training.train.resolve", lambda *_: loaded.append("plan") or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(new_config(), console)
    assert loaded == ["weights", "plan"]


def test_the_selection_of_weights_is_inherited(settings, new_config, tmp_path, console):
    first = train(settings(method="gps", epochs=1, out=str(tmp_path / "gps")), console)
    run = train(new_config(init_from=str(first.path), epochs=1, batch_size=8), console)
    expected, actual = (load_file(folder.path / "selection" / "trainable.safetensors") for folder in (first, run))
    chosen = {name for name, tensor in expected.items() if not tensor.is_floating_point()}
    assert chosen and expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in chosen)


def test_settings_that_contradict_the_initial_run_are_rejected(finished, new_config, make_photos, tmp_path):
    for method in ("lora-2", "snella"):
        with pytest.raises(ValueError, match=f"method is 'snella-2' there and '{method}' here; leave them out"):
            train(new_config(method=method))
    with pytest.raises(ValueError, match=r"init_from must be the folder of a finished run, .*none, which has no run"):
        train(new_config(init_from=str(tmp_path / "none")))
    others = make_photos(tmp_path / "others", {"cats": 16, "dogs": 16})
    with pytest.raises(ValueError, match=r"the classes of init_from=.*, \['cats', 'dogs', 'owls'\], got \['cats', 'do"):
        train(new_config(data=f"folder:{others}"))
    (others / "owl").symlink_to(others / "dogs")
    with pytest.raises(ValueError, match=r"the 3 and 3 classes differ in 'owl', 'owls'$"):
        train(new_config(data=f"folder:{others}"))
    with pytest.raises(ValueError, match="method must not be auto with init_from, which keeps the method"):
        new_config(method="auto")
    with pytest.raises(ValueError, match="out must differ from init_from"):
        new_config(out=str(finished.path))
    for head_init in ("probe", "random"):
        with pytest.raises(ValueError, match=f"head_init does not apply with init_from, .*, got '{head_init}'"):
            new_config(head_init=head_init)
    assert new_config(preset="paper").optim.head_init == "auto"  # "random" without init_from
    with pytest.raises(ValueError, match="init_from does not support folds"):
        new_config(folds=3)


def test_other_images_add_a_note(finished, new_config, make_photos, tmp_path):
    others = make_photos(tmp_path / "others", {"cats": 12, "dogs": 12, "owls": 12})
    config = finished.init_from_settings(new_config(data=f"folder:{others}")).resolved()
    parts = build_components(config)
    load_initial_weights(parts, config.data.spec, finished)
    assert parts.splits.notes[-1].startswith(f"{finished.path} has different splits; its training images")


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({"method_options": {"target_sparsity": 0.6}}, {}, 0.6),
        ({"method_options": {"target_sparsity": 0.6}}, {"target_sparsity": 0.9}, 0.9),
        ({}, {"method_options": {"target_sparsity": 0.9}}, 0.9),
    ],
)
def test_the_target_sparsity_may_be_a_method_option(settings, new_config, tmp_path, console, first, second, expected):
    options = {"epochs": 1, "head_init": "random", "out": str(tmp_path / "first")}  # saves the epoch at the target
    initial = train(settings(**{"method_options": {}, **first, **options}), console)
    config = initial.init_from_settings(new_config(init_from=str(initial.path), **second)).resolved()
    assert config.method.all_options()["target_sparsity"] == expected
    assert 0.5 < config.method.options["init_sparsity"] <= expected


def test_a_folder_is_the_initial_run_under_another_path(finished, new_config):
    other = finished.path.parent / "missing" / ".." / finished.path.name
    with pytest.raises(ValueError, match="out must differ from init_from"):
        new_config(out=str(other), overwrite=True)
