"""Sampler, optimizer groups, progress, devices."""

import io
import math
from functools import partial
from types import SimpleNamespace

import psutil
import pytest
import timm
import torch
from rich.console import Console
from transformers import TrainerControl, TrainerState

from snella_app.config.train import TrainConfig
from snella_app.data.load import load_data
from snella_app.data.protocol import PROTOCOLS
from snella_app.device import choose_device
from snella_app.methods import build_method
from snella_app.tasks import ClassificationTask
from snella_app.training.build import EpochSampler, RunComponents, build_optimizer, mix_seed, resolve_data_config
from snella_app.training.callbacks import ProgressDisplay
from snella_app.training.plan import log_summary, shorten_hint
from snella_app.training.sizing import free_memory
from snella_app.training.trainer import SnellaTrainer

TASK = ClassificationTask(("a", "b", "c"))


def config(method, **changes):
    return TrainConfig.from_flat(data="digits", backbone="test_vit", out="x", method=method, **changes).resolved()


def progress_display(console, *, shorten=lambda factor: "", last_loss=math.nan, **settings):
    """Return the display of a trainer with these settings, which has no model."""
    plan = config("linear", **settings)
    trainer = SimpleNamespace(
        plan=plan, task=TASK, protocol=PROTOCOLS[plan.data.protocol], allocator=None, last_loss=last_loss
    )
    trainer.selection_score = partial(SnellaTrainer.selection_score, trainer)
    return ProgressDisplay(console, trainer, shorten)


def vit(method):
    torch.manual_seed(0)
    return build_method(method, timm.create_model("test_vit", num_classes=3, img_size=32))


def test_the_order_depends_only_on_seed_and_epoch():
    sampler = EpochSampler(50, seed=3)
    first = list(sampler)
    torch.manual_seed(99)
    assert list(sampler) == first and sorted(first) == list(range(50)) and len(sampler) == 50
    sampler.set_epoch(1)
    assert list(sampler) != first and list(EpochSampler(50, seed=4)) != first
    sampler.set_epoch(0)
    assert list(sampler) == first


@pytest.mark.parametrize("size", [20, 50, 70])
def test_epochs_of_another_size_continue_through_permutations(size):
    sampler, whole, rows = EpochSampler(50, seed=3, size=size), EpochSampler(50, seed=3), []
    for epoch in range(10):
        sampler.set_epoch(epoch)
        assert len(list(sampler)) == len(sampler) == size
        rows += sampler
    for epoch in range(len(rows) // 50):
        whole.set_epoch(epoch)
        assert rows[epoch * 50 : (epoch + 1) * 50] == list(whole)


def test_weighted_epochs_of_another_size():
    sampler = EpochSampler(50, seed=3, weights=[1.0] + 49 * [0.0], size=8)
    assert list(sampler) == 8 * [0] and len(sampler) == 8


def test_mixed_seeds_depend_on_all_numbers_and_their_order():
    seeds = {mix_seed(a, b) for a in range(40) for b in range(40)}
    assert len(seeds) == 1600 and all(0 <= seed < 2**63 for seed in seeds)


def test_factors_scalars_and_head_have_separate_learning_rates():
    optimizer = build_optimizer(vit("snella-2"), lr=1e-2, scalar_lr=1e-5, head_lr=1e-1, weight_decay=0.5)
    assert {g["name"]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups} == {
        "factors": (1e-2, 0.5), "scalars": (1e-5, 0.0), "head": (1e-1, 0.5), "head_no_decay": (1e-1, 0.0),
    }  # fmt: skip


@pytest.mark.parametrize(("method", "rates"), [("lora-2", {1e-2, 1e-1}), ("linear", {1e-1}), ("full", {1e-2, 1e-1})])
def test_heads_of_other_methods_have_their_learning_rate_and_vectors_no_decay(method, rates):
    model = vit(method)
    optimizer = build_optimizer(model, lr=1e-2, head_lr=1e-1, weight_decay=0.5)
    assert {group["lr"] for group in optimizer.param_groups} == rates
    for group in optimizer.param_groups:
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])
    assert sum(len(g["params"]) for g in optimizer.param_groups) == sum(p.requires_grad for p in model.parameters())
    head = {id(p) for n, p in model.named_parameters() if "head" in n and p.requires_grad}
    assert {id(p) for g in optimizer.param_groups if g["lr"] == 1e-1 for p in g["params"]} == head


def test_a_model_without_trainable_parameters_is_rejected():
    model = vit("linear").requires_grad_(False)
    with pytest.raises(ValueError, match="method 'linear' has no trainable parameters in VisionTransformer"):
        build_optimizer(model, lr=1e-2)


def test_the_bar_is_shown_on_a_terminal_and_removed():
    output = io.StringIO()
    display = progress_display(Console(file=output, force_terminal=True, width=100), last_loss=0.125)
    state = TrainerState(max_steps=10, num_train_epochs=2, epoch=0.2, global_step=1)
    display.on_train_begin(None, state, TrainerControl())
    display.on_step_end(None, state, TrainerControl())
    display._bar.refresh()
    assert "epoch 1/2" in output.getvalue() and "loss 0.125" in output.getvalue() and "1/10" in output.getvalue()
    state.epoch, state.global_step = 1.0, 5  # the last step of the epoch
    display.on_step_end(None, state, TrainerControl())
    display._bar.refresh()
    assert "5/10" in output.getvalue() and "epoch 2/2" not in output.getvalue()
    display.on_epoch_end(None, state, TrainerControl())
    display._bar.refresh()
    assert "evaluating on val images" in output.getvalue()
    display.on_train_end(None, state, TrainerControl())
    assert display._bar is None


def test_without_a_terminal_lines_replace_the_bar_and_mark_the_best_epoch():
    output = io.StringIO()
    display = progress_display(Console(file=output, width=200))
    past = {"train_loss": 1.0, "val_accuracy": 0.5, "val_loss": 0.9, "budget": None}
    state = TrainerState(max_steps=10, num_train_epochs=2, log_history=[past])
    display.on_train_begin(None, state, TrainerControl())
    assert display._bar is None
    for epoch, accuracy in ((1.0, 0.5), (2.0, 0.75)):
        state.epoch = epoch
        row = {"train_loss": 1.0, "val_loss": 1.0, "val_accuracy": accuracy, "val_balanced_accuracy": accuracy}
        display.on_evaluate(None, state, TrainerControl(), metrics=row)
    first, second = output.getvalue().splitlines()
    assert not first.endswith("best") and second.endswith("best")


@pytest.fixture
def printed_by_steps(monkeypatch):
    """Return a function that returns the non-terminal output for steps of the given durations in seconds."""
    now = [0.0]
    monkeypatch.setattr("snella_app.training.callbacks.time", SimpleNamespace(monotonic=lambda: now[0]))

    def steps(seconds, max_steps=100, **options):
        output = io.StringIO()
        display = progress_display(Console(file=output, width=200), last_loss=0.5, **options)
        state = TrainerState(max_steps=max_steps, num_train_epochs=2)
        display.on_train_begin(None, state, TrainerControl())
        for span in seconds:
            now[0] += span
            state.global_step, state.epoch = state.global_step + 1, 0.1
            display.on_step_end(None, state, TrainerControl())
        return output.getvalue().replace("\N{NO-BREAK SPACE}", " ").splitlines()

    return steps


def test_the_remaining_time_is_printed_after_the_first_steps(printed_by_steps):
    assert printed_by_steps([9.0, 1.0, 1.0, 1.0, 1.0]) == ["about 1 min 36 s remaining: 96 steps of 1.0 s"]
    assert printed_by_steps([9.0, 0.1, 0.1, 0.1]) == []


def test_slow_steps_are_reported_after_the_second_with_a_remedy(printed_by_steps):
    factors = []
    first, estimate = printed_by_steps(
        [90.0, 60.0], 82, shorten=lambda factor: factors.append(factor) or "; less with X"
    )
    assert first == "step 1/82  loss 0.5000"  # the first step compiles and is not representative
    assert estimate == "about 1 h 20 min remaining: 80 steps of 1 min 0 s; less with X" and factors == [16.0]


def test_without_a_terminal_a_line_is_printed_every_half_minute_if_enabled(printed_by_steps):
    lines = printed_by_steps([10.0] * 9)
    assert lines[1:] == [
        "step 5/100  loss 0.5000  3 images/s  about 15 min 50 s remaining",
        "step 8/100  loss 0.5000  3 images/s  about 15 min 20 s remaining",
    ]
    assert len(printed_by_steps([10.0] * 9, progress=False)) == 1


@pytest.mark.parametrize(
    ("side", "factor", "expected"),
    [(518, 16, "--img-size 126 takes about 6% of that"), (98, 8, "--train-size or --epochs")],
)
def test_the_suggested_size_is_a_multiple_of_the_patch_size(side, factor, expected):
    model = timm.create_model("test_vit", img_size=112, patch_size=14)
    assert expected in shorten_hint(RunComponents(None, model, TASK, {}, {"input_size": [3, side, side]}), factor)


def test_memory_and_time_warnings_are_printed_before_training(monkeypatch):
    monkeypatch.setattr("snella_app.training.plan.free_memory", lambda device: 2**20)
    model = build_method("linear", timm.create_model("test_vit", num_classes=10, img_size=448))
    parts = RunComponents(
        load_data("digits"), model, ClassificationTask(tuple("0123456789")), {}, {"input_size": [3, 448, 448]}
    )
    output = io.StringIO()
    log_summary(Console(file=output, width=300), config("linear"), parts, 2 << 20)
    text = output.getvalue()
    assert "about 2 MiB of 1 MiB free" in text
    assert "not enough free memory; use --batch-size below 32, --grad-checkpointing or a smaller --img-size" in text
    assert "the model's default of 448×448 px takes about 4 times as long on a CPU as 224×224 px" in text


@pytest.mark.parametrize(
    ("device", "is_available", "is_suggested"), [("auto", True, True), ("auto", False, False), ("cpu", True, False)]
)
def test_an_unused_gpu_of_apple_is_suggested(device, is_available, is_suggested, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: is_available)
    model = build_method("linear", timm.create_model("test_vit", num_classes=10, img_size=32))
    parts = RunComponents(
        load_data("digits"), model, ClassificationTask(tuple("0123456789")), {}, {"input_size": [3, 32, 32]}
    )
    output = io.StringIO()
    log_summary(Console(file=output, width=300), config("linear", device=device), parts, 2 << 20)
    assert ("--device mps trains on the GPU of this machine" in output.getvalue()) == is_suggested


def test_the_memory_warning_suggests_compression_for_snella(monkeypatch):
    monkeypatch.setattr("snella_app.training.plan.free_memory", lambda device: 2**20)
    parts = RunComponents(
        load_data("digits"),
        build_method("snella", timm.create_model("test_vit", num_classes=10, img_size=32)),
        ClassificationTask(tuple("0123456789")),
        {},
        {"input_size": [3, 32, 32]},
    )
    for options, is_suggested in (({}, True), ({"compress_activations": True}, False)):
        output = io.StringIO()
        log_summary(Console(file=output, width=300), config("snella", method_options=options), parts, 2 << 20)
        assert ("--method-options.compress_activations true, --grad-" in output.getvalue()) == is_suggested


RISEN = (
    "the training loss has risen from 2.0000 to 641.0000: the learning rate is probably too "
    "high; stop the run and retry with --lr reduced to a third"
)


@pytest.mark.parametrize(
    ("protocol", "steps", "accuracies", "expected"),
    [
        ("standard", 20, (0.5, 0.6, 0.3, 0.2), [RISEN]),
        ("final", 20, (0.5, 0.6, 0.7, 0.8), [RISEN]),
        ("standard", 20, (0.5, 0.6, 0.7, 0.8), []),  # as with mixup
        ("standard", 4, (0.5, 0.6, 0.3, 0.2), []),  # a linear probe, disturbed by the first steps
    ],
)
def test_a_harmful_loss_increase_is_reported_once(protocol, steps, accuracies, expected):
    output = io.StringIO()
    display = progress_display(Console(file=output, width=200), protocol=protocol)
    state = TrainerState(max_steps=4 * steps, num_train_epochs=4)
    display.on_train_begin(None, state, TrainerControl())
    for epoch, (loss, accuracy) in enumerate(zip((2.0, 1.0, 641.0, 640.0), accuracies, strict=True), 1):
        state.epoch, state.global_step = epoch, epoch * steps // 2
        metrics = {"train_loss": loss, "val_loss": loss, "val_accuracy": accuracy, "val_balanced_accuracy": accuracy}
        display.on_evaluate(None, state, TrainerControl(), metrics=metrics)
    assert [line for line in output.getvalue().splitlines() if "risen" in line] == expected


def test_free_memory_is_positive_and_at_most_the_total():
    assert 0 < free_memory(torch.device("cpu")) <= psutil.virtual_memory().total


def test_a_missing_gpu_is_rejected(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device=cuda is not available"):
        choose_device("cuda")
    assert choose_device("auto").type == "cpu" == choose_device("cpu").type


def test_img_size_overrides_only_the_input_size():
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    changed, default = resolve_data_config(model, 32), resolve_data_config(model, None)
    assert changed["input_size"] == [3, 32, 32] and default["input_size"] == [3, 160, 160]
    assert {k: v for k, v in changed.items() if k != "input_size"} == {
        k: v for k, v in default.items() if k != "input_size"
    }


def test_ties_in_accuracy_go_to_the_lower_loss_then_the_later_epoch():
    rows = [(0.5, 0.1), (0.75, 0.9), (0.75, 0.8), (0.75, 0.8), (0.75, 0.85)]
    history = [{"epoch": n + 1, "val_accuracy": a, "val_loss": loss} for n, (a, loss) in enumerate(rows)]
    for count, expected in ((5, 4), (3, 3), (1, 1)):
        trainer = SimpleNamespace(history=history[:count], selection_score=TASK.selection_score)
        assert SnellaTrainer.best_epoch.fget(trainer) == expected


def test_unknown_public_names_are_rejected():
    import snella_app.runs

    with pytest.raises(AttributeError, match=r"module 'snella_app\.runs' has no attribute 'tarin'"):
        _ = snella_app.runs.tarin
    assert all(getattr(snella_app.runs, name) is not None for name in snella_app.runs.__all__)


def test_cached_files_and_other_processes_count_for_free_memory(tmp_path, monkeypatch):
    for name, text in {"max": "1000", "current": "900", "stat": "anon 1\ninactive_file 300\nactive_file 100\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr("snella_app.training.sizing._CGROUP", tmp_path)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert free_memory(torch.device("cpu")) == 500
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert free_memory(torch.device("cpu")) == 250
