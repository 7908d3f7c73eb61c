"""`SnellaCallback` in transformers' `Trainer`, with resumption."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from snella import SnellaCallback, create_snella_optimizer
from snella.matrices import adapted_matrices


class Images(torch.utils.data.Dataset):
    def __init__(self, count=20):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(count, 3, 16, 16, generator=generator)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": index % 3}


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = True
            control.should_training_stop = True


def trainer(case, folder, *callbacks, eval_dataset=None, **settings):
    transformers.set_seed(0)
    config = case.config(modules_to_save=["classifier"], target_modules=["q_proj", "v_proj", "fc1"])
    model = get_peft_model(case.base(), config)
    defaults = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_strategy": "no",
    }
    args = TrainingArguments(str(folder), **defaults | settings)
    optimizer = create_snella_optimizer(model, lr=1e-2)
    return Trainer(
        model=model,
        args=args,
        train_dataset=Images(),
        eval_dataset=eval_dataset,
        callbacks=list(callbacks),
        optimizers=(optimizer, None),
    )


@pytest.fixture
def vit(cases):
    return cases["vit"]


def test_callback_reaches_target_budget(vit, tmp_path):
    callback = SnellaCallback()
    run = trainer(vit, tmp_path, callback)
    run.train()
    allocator = callback.allocator
    # 20 images, batch size 4, gradient accumulation over 2 batches: 3 steps per epoch
    assert [(entry["step"], entry["t"]) for entry in allocator.history] == [(0, 0), (3, 1), (6, 2), (9, 3)]
    assert sum(allocator.budgets.values()) == allocator.target_budget
    assert [m.nonzeros() for m in adapted_matrices(run.model)] == list(allocator.budgets.values())
    assert allocator._handles == []


@pytest.mark.parametrize(
    ("settings", "times"),
    [
        ({"max_steps": 7}, [(0, 0), (3, 1), (6, 2), (7, 3)]),
        ({"max_steps": 2}, [(0, 0), (2, 1)]),
        ({"num_train_epochs": 1.5}, [(0, 0), (3, 1), (5, 2)]),
    ],
)
def test_training_that_stops_within_an_epoch_reaches_target_budget(vit, tmp_path, settings, times):
    callback = SnellaCallback()
    trainer(vit, tmp_path, callback, **settings).train()
    assert [(entry["step"], entry["t"]) for entry in callback.allocator.history] == times
    assert sum(callback.allocator.budgets.values()) == callback.allocator.target_budget


@pytest.mark.parametrize("stop", [3, 5])
def test_resumed_training_equals_uninterrupted_training_bit_for_bit(vit, tmp_path, stop):
    uninterrupted = SnellaCallback()
    reference = trainer(vit, tmp_path / "uninterrupted", uninterrupted)
    reference.train()
    first = trainer(vit, tmp_path / "parts", SnellaCallback(), StopAfter(stop), save_strategy="steps", save_steps=1000)
    first.train()
    resumed = SnellaCallback()
    second = trainer(vit, tmp_path / "parts", resumed)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / f"checkpoint-{stop}"))
    assert resumed.allocator.history == uninterrupted.allocator.history
    assert resumed.allocator.budgets == uninterrupted.allocator.budgets
    expected = reference.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in second.model.state_dict().items())


def test_trainer_checkpoint_is_an_adapter(vit, tmp_path):
    run = trainer(vit, tmp_path, SnellaCallback(), save_strategy="epoch")
    run.train()
    loaded = PeftModel.from_pretrained(vit.base(), tmp_path / "checkpoint-9").eval()
    assert torch.equal(vit.predict(loaded), vit.predict(run.model.eval()))


def test_callback_trains_the_given_adapter(vit, tmp_path):
    callback = SnellaCallback("nobody")
    with pytest.raises(ValueError, match=r"adapter_name must be one of \['default'\], got 'nobody'"):
        trainer(vit, tmp_path, callback).train()


def test_trainer_without_callback_warns(vit, tmp_path):
    with pytest.warns(UserWarning, match=r"no budget allocator is attached.*callbacks=\[SnellaCallback\(\)\]"):
        trainer(vit, tmp_path, max_steps=2).train()


def test_callback_outside_trainer_raises(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    state, control = transformers.TrainerState(), transformers.TrainerControl()
    with pytest.raises(
        RuntimeError, match=r"SnellaCallback requires the Trainer's model and optimizer, got .* NoneType"
    ):
        SnellaCallback().on_train_begin(args, state, control)
    SnellaCallback().on_train_end(args, state, control)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(Images()[index] for index in range(20))


@pytest.mark.parametrize("steps", [8, 21])
def test_a_loader_without_length_reaches_the_target_budget_gradually(steps, vit, tmp_path):
    callback = SnellaCallback()
    run = trainer(vit, tmp_path, callback, max_steps=steps)
    run.train_dataset = Stream()
    run.train()
    allocator = callback.allocator
    totals = [sum(entry["budgets"].values()) for entry in allocator.history]
    assert len(totals) >= 9 and totals == sorted(totals, reverse=True)
    assert totals[-1] == allocator.target_budget < totals[len(totals) // 2] < totals[0]
    assert totals[-2] < totals[0] - 0.9 * (totals[0] - totals[-1])


def test_training_again_after_an_interruption_detaches_the_first_allocator(vit, tmp_path):
    class Interrupt(StopAfter):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == self.step:
                raise KeyboardInterrupt

    callback, interrupt = SnellaCallback(), Interrupt(4)
    run = trainer(vit, tmp_path, callback, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    first = callback.allocator
    run.remove_callback(interrupt)
    run.train()
    assert first is not callback.allocator and not first._handles


@pytest.mark.parametrize("schedule_end", [None, 0.3])
def test_a_best_model_above_the_target_budget_is_reported(vit, tmp_path, schedule_end):
    settings = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True}
    settings |= {"metric_for_best_model": "rank", "greater_is_better": False}
    run = trainer(vit, tmp_path, SnellaCallback(), eval_dataset=Images(4), **settings)
    for layer in (module for module in run.model.modules() if hasattr(module, "snella_config")):
        layer.snella_config["default"].schedule_end = schedule_end
    epochs = iter(range(3))
    run.compute_metrics = lambda _: {"rank": next(epochs)}  # the first epoch is the best
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        run.train()
    messages = [str(record.message) for record in records if "best model of the Trainer" in str(record.message)]
    assert len(messages) == (schedule_end is None)
    if messages:
        assert "set schedule_end in SnellaConfig, e.g. to 0.7, or load_best_model_at_end=False" in messages[0]
