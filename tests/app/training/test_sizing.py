"""`--batch-size auto` and `--time-budget`: selected values, printed reasons and unchanged results."""

import dataclasses
import re
import time
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from snella_app.config.sections import budget_seconds
from snella_app.config.train import TrainConfig
from snella_app.device import choose_device
from snella_app.methods.registry import matrices_of
from snella_app.records.record import read
from snella_app.records.run import RunInfo
from snella_app.runs.model import load_run
from snella_app.training import sizing
from snella_app.training.build import build, load
from snella_app.training.memory import predict_step_memory
from snella_app.training.plan import resolve
from snella_app.training.sizing import fit_batch_size, fit_epochs, fit_image_size, size_step
from snella_app.training.train import train

from .components import build_components

pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture
def many_images(make_photos, tmp_path):
    """Data specification of enough images for batches of 16."""
    return f"folder:{make_photos(tmp_path / 'many_images', {'cats': 200, 'dogs': 100}, side=8)}"


@pytest.mark.parametrize("share", [2.0, 0.99, 0.3])
def test_auto_selects_the_largest_batch_size_that_fits_into_memory(share, many_images, settings, console, monkeypatch):
    config = settings(data=many_images, batch_size="auto").resolved()
    parts = build_components(config)
    assert len(parts.splits.train) // 10 >= 16
    sizes = {batch: predict_step_memory(parts.model, (3, 32, 32), batch).total for batch in (1, 2, 4, 8, 16)}
    free = share * sizes[16] / 0.8
    monkeypatch.setattr(sizing, "free_memory", lambda device: free)
    fitting = [batch for batch, size in sizes.items() if size <= 0.8 * free]
    chosen = fit_batch_size(parts, config.optim, console)
    assert chosen == max(fitting, default=1) and (chosen == 16) == (share > 1)
    assert f"batch size {chosen}: a step uses about" in console.file.getvalue()


def test_auto_batch_size_leaves_ten_optimizer_steps_with_gradient_accumulation(many_images, settings, console):
    config = settings(data=many_images, batch_size="auto", accumulate=4).resolved()
    parts = build_components(config)
    chosen = fit_batch_size(parts, config.optim, console)
    assert 2 * chosen * 4 * 10 > len(parts.splits.train) >= chosen * 4 * 10


def test_an_out_of_memory_step_halves_the_batch_size(many_images, settings, console, monkeypatch):
    config = settings(data=many_images, batch_size="auto").resolved()
    parts = build_components(config)
    tried = []

    def step(parts, precision, batch):
        tried.append(len(batch["labels"]))
        if len(batch["labels"]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sizing, "_trial_step", step)
    assert fit_batch_size(parts, config.optim, console) == 4 and tried == [16, 8, 4]
    monkeypatch.setattr(sizing, "_trial_step", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit_batch_size(parts, config.optim, console)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
            True,
        ),
        (RuntimeError("CUDA error: out of memory"), True),
        (torch.OutOfMemoryError("CUDA"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("required rank 4 tensor to use channels_last memory format"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_only_failed_allocations_are_out_of_memory_errors(error, expected):
    assert sizing.is_out_of_memory(error) == expected


def test_a_trial_step_restores_the_model(settings):
    config = settings(method="full", method_options={}).resolved()
    parts = build_components(config)
    before = {name: tensor.clone() for name, tensor in parts.model.state_dict().items()}
    state = torch.random.get_rng_state()
    parts.model.eval()
    images = [parts.splits.train[index] for index in range(3)]
    sizing._trial_step(parts, config.optim.precision, parts.task.collate(images))
    assert torch.equal(torch.random.get_rng_state(), state) and not parts.model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in parts.model.state_dict().items())
    assert all(parameter.grad is None for parameter in parts.model.parameters())


def test_timed_steps_search_for_thresholds_like_the_steps_after_the_first_epoch(settings, monkeypatch):
    config = settings(time_budget="10s", batch_size=4).resolved()
    parts, during = build_components(config), []
    matrices = matrices_of(parts.model)
    before = [matrix.budget for matrix in matrices]
    assert before == [matrix.size for matrix in matrices]  # all entries exceed the threshold 0
    trial_step = sizing._trial_step

    def step(*args):
        trial_step(*args)
        during.append([matrix.budget for matrix in matrices])

    monkeypatch.setattr(sizing, "_trial_step", step)
    sizing._measure_times(parts, config)
    assert during and all(budgets == [int(0.65 * size) for size in before] for budgets in during)
    assert [matrix.budget for matrix in matrices] == before


def test_a_run_with_the_selected_settings_is_bit_identical(settings, console, monkeypatch, tmp_path):
    monkeypatch.setattr(sizing, "_MAX_EPOCHS", 2)
    config = settings(epochs=9, batch_size="auto", time_budget="60s", train_size=20)
    run = train(config, console)
    stored = run.read_config()
    assert stored.optim.batch_size == 2 and 1 <= stored.optim.epochs <= 2  # 20 images: 10 steps of 2
    text = console.file.getvalue()
    assert "batch size 2: a step uses about" in text and re.search(r"\d+ epochs? of 20 images in 60s: one takes", text)
    values = {**stored.stored(), "time_budget": None, "out": str(tmp_path / "again")}
    again = train(TrainConfig.from_flat(**values, progress=False), console)
    first, second = (load_file(folder.adapter / "adapter_model.safetensors") for folder in (run, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_default_run_ends_soon_after_its_time_budget(photos, console, tmp_path):
    settings = {"backbone": "test_vit", "pretrained": False, "device": "cpu", "progress": False}
    start = time.monotonic()
    config = TrainConfig.from_flat(**settings, data=f"folder:{photos}", time_budget="10s", out=str(tmp_path / "run"))
    run = train(config, console)
    assert run.status == "finished" and time.monotonic() - start < 30
    assert run.read_config().optim.final_head == "layers" and load_run(run).probe is not None


@pytest.mark.parametrize(
    ("budget", "changes", "epochs", "images", "message"),
    [
        # 3.7 epochs of 28 · 0.5 + 3 · 0.1 s fit into the 54 s that are not reserved, minus 0.6 s for test images
        ("60s", {}, 4, 24, "4 epochs of 24 images in 60s: one takes about 12.3 s"),
        ("2h", {}, 100, None, "100 epochs of 28 images in 2h: one takes about 14.3 s; 100 is the maximum"),
        ("15s", {}, 1, 24, "1 epoch of 24 images in 15s: one takes about 12.3 s"),
        (
            "4s",
            {},
            1,
            20,
            "1 epoch of 20 images in 4s: one takes about 10.3 s, more than the time left in the budget of 4s",
        ),
        (
            "4s",
            {"head_init": "probe"},
            0,
            None,
            "no epochs: an epoch of 20 images takes about 10.3 s, more than the time left",
        ),
        # 19 of 100 epochs are evaluated under the official protocol: 100 · 14 + 19 · 0.6 s
        ("1535s", {"protocol": "official", "val_size": None}, 100, None, "100 epochs of 28 images in 1535s"),
    ],
)
def test_epochs_fill_the_time_budget(budget, changes, epochs, images, message, settings, console, monkeypatch, clock):
    values = {"batch_size": 1, "accumulate": 2, "train_size": 28, "val_size": 3, "test_size": 6, "tta": 1, **changes}
    config = settings(**values, time_budget=budget).resolved()
    parts = build_components(config)
    seconds = {sizing._trial_step: 0.5, sizing._trial_evaluation: 0.1, sizing._only_read: 0.0}
    monkeypatch.setattr(sizing, "_step_seconds", lambda parts, optim, dataset, batch, step: seconds[step])
    assert len(parts.splits.train) == 28
    assert fit_epochs(parts, config, console, clock.now) == (epochs, images)
    assert message in console.file.getvalue().replace("\N{NO-BREAK SPACE}", " ")


def test_cached_features_need_no_time_for_training(settings, console, monkeypatch, clock):
    config = settings(method="linear", method_options={}, augment="none", time_budget="2m", train_size=28).resolved()
    parts = build_components(config)
    seconds = {sizing._trial_evaluation: 0.01, sizing._only_read: 0.0}  # no training step is timed
    monkeypatch.setattr(sizing, "_step_seconds", lambda parts, optim, dataset, batch, step: seconds[step])
    assert fit_epochs(parts, config, console, clock.now) == (100, None)


def test_the_features_of_the_probe_are_computed_before_epochs_are_chosen(settings, console, monkeypatch):
    config = settings(epochs=2, head_init="probe", time_budget="1h", augment="flip", train_size=20)
    computed = []

    def fit(parts, *others):
        computed.append(parts.probe_features is not None)
        return 1, None

    monkeypatch.setattr("snella_app.training.plan.fit_epochs", fit)
    train(config, console)
    assert computed == [True]


@pytest.fixture
def clock(monkeypatch):
    """Frozen clock of the time budget; tests change `now`."""
    clock = SimpleNamespace(now=time.monotonic())
    monkeypatch.setattr(sizing, "time", SimpleNamespace(monotonic=lambda: clock.now, perf_counter=time.perf_counter))
    return clock


@pytest.fixture
def timed_by_pixels(monkeypatch, clock):
    """Training steps take one second at 160 px and less with fewer pixels; evaluation steps take no time."""
    timing = SimpleNamespace(sides=[], power=2, measuring_s=0.0)

    def step_seconds(parts, optim, dataset, batch, step):
        side = parts.data_config["input_size"][-1]
        assert next(iter(dataset))[0].shape[-1] == side
        if step is not sizing._trial_step:
            return 0.0
        timing.sides.append(side)
        clock.now += timing.measuring_s
        return (side / 160) ** timing.power

    monkeypatch.setattr(sizing, "_step_seconds", step_seconds)
    return timing


def select_size(settings, console, **changes):
    """Return the size selected for 16 training images at batch size 1, and the output."""
    values = {"img_size": None, "batch_size": 1, "train_size": 16, "val_size": 3, "epochs": 4, **changes}
    config = settings(**values).resolved()
    data, device = load(config.data, config.optim, config.run), choose_device(config.run.device)

    def at_size(size):
        return build(dataclasses.replace(config.model, img_size=size), config.method, data, device)

    started_at = sizing.time.monotonic()
    return fit_image_size(at_size(None), config, at_size, console, started_at), console.file.getvalue()


@pytest.mark.parametrize(
    ("budget", "power", "size", "sides", "message"),
    [
        ("72s", 2, None, [48, 160], "measuring step times to fit 4 epochs into 72s"),  # 0.9 · 72 / (16 · 1) = 4.05
        (
            "70s",
            2,
            144,
            [48, 144, 160],
            "one epoch takes about 13.0 s (at 160 px, the backbone's default size: about 16.0 s); use --img-size",
        ),
        (
            "30s",
            2,
            96,
            [48, 96, 112],
            "16.0 s, estimated from the number of pixels); use --img-size to set the size",
        ),  # 0.9 · 30 / (16 · 0.36) = 4.7
        (
            "30s",
            4,
            128,
            [48, 160, 96, 128, 144],
            "image size 128 px: 4 epochs fit into 30s; one epoch takes about 6.6 s",
        ),
        (
            "3s",
            2,
            48,
            [48],
            "image size 48 px: 4 epochs exceed 3s even at the smallest size",
        ),
    ],
)
def test_the_largest_size_at_which_the_epochs_fit_is_selected(
    budget, power, size, sides, message, settings, console, timed_by_pixels
):
    timed_by_pixels.power = power
    chosen, text = select_size(settings, console, time_budget=budget)
    assert chosen == size and message in text.replace("\N{NO-BREAK SPACE}", " ")
    assert timed_by_pixels.sides == sides


def test_time_spent_measuring_is_not_left_for_epochs(settings, console, timed_by_pixels):
    timed_by_pixels.measuring_s = 5.0
    size, _ = select_size(settings, console, time_budget="70s")
    # 0.9 · 70 − 15 = 48 s are left after three measurements: 4 epochs of 12 s; 144 px take 13 s
    assert timed_by_pixels.sides == [48, 144, 160] and size == 128


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"folds": 2, "fold": 1, "train_size": None}, "image size stays 160 px: all folds use the same size"),
        ({"method": "gps"}, "image size stays 160 px: gps selects parameters at this size"),
    ],
)
def test_a_required_size_is_unchanged(changes, message, settings, console, timed_by_pixels):
    size, text = select_size(settings, console, time_budget="30s", **changes)
    assert size is None and message in text and timed_by_pixels.sides == []


def test_sizes_that_run_out_of_memory_are_too_large(settings, console, timed_by_pixels, monkeypatch):
    step_seconds = sizing._step_seconds

    def limited(parts, optim, dataset, batch, step):
        if parts.data_config["input_size"][-1] > 96:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step_seconds(parts, optim, dataset, batch, step)

    monkeypatch.setattr(sizing, "_step_seconds", limited)
    size, text = select_size(settings, console, time_budget="1000s")
    assert size is not None and 80 <= size <= 96
    assert "does not support" not in text and ", estimated from the number of pixels)" in text and " h " not in text
    monkeypatch.setattr(sizing, "_step_seconds", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA")))
    assert "a step does not fit into memory at any size" in select_size(settings, console, time_budget="1000s")[1]


@pytest.fixture
def seconds_of_a_second(monkeypatch):
    """Every step takes one second, and reading takes no time."""
    monkeypatch.setattr(sizing, "_step_seconds", lambda *arguments: float(arguments[-1] != sizing._only_read))
    monkeypatch.setattr(sizing, "layer_fit_seconds", lambda *_: 1.0)


@pytest.mark.parametrize(("changes", "passes"), [({"soup": 2}, 2), ({"swa": 2}, 1)])
def test_the_time_budget_includes_the_evaluation_of_averages(changes, passes, settings, seconds_of_a_second):
    values = {"epochs": 2, "time_budget": "60s", "batch_size": 1, "train_size": 14, "val_size": 4, "test_size": 3}
    plain, averaged = (settings(**values, **options).resolved() for options in ({}, changes))
    parts = build_components(plain)
    difference = sizing._measure_times(parts, averaged).final_s - sizing._measure_times(parts, plain).final_s
    assert difference == passes * 4  # images


def test_the_time_budget_includes_the_final_head_without_other_splits(settings, seconds_of_a_second):
    values = {"epochs": 2, "time_budget": "60s", "batch_size": 1, "tta": 1, "protocol": "final", "test_fraction": 0.0}
    config = settings(**values, final_head="layers").resolved()
    parts = build_components(config)
    assert list(parts.splits.parts) == ["train"]
    assert sizing._measure_times(parts, config).final_s == len(parts.splits.train) + 1.0


def test_an_epoch_has_the_steps_of_the_automatic_batch_size(settings, seconds_of_a_second, monkeypatch):
    monkeypatch.setattr(sizing, "fit_batch_size", lambda *_: 5)
    config = settings(batch_size="auto", train_size=14, val_size=4, tta=1, time_budget="60s").resolved()
    times = sizing._measure_times(build_components(config), config)
    assert (times.steps, times.step_s) == (3, 1.0) and times.selection_s == pytest.approx(4 / 5)


def test_a_time_budget_replaces_the_given_number_of_images_per_epoch(settings, console, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "snella_app.training.plan.fit_epochs",
        lambda parts, config, *_: seen.append(config.optim.epoch_images) or (1, 8),
    )
    config = settings(epoch_images=3, time_budget="60s").resolved()
    data = load(config.data, config.optim, config.run)
    parts = build(config.model, config.method, data, choose_device(config.run.device))
    assert resolve(config, data, parts, console)[0].optim.epoch_images == 8 and seen == [None]


def test_the_default_batch_is_at_most_an_epoch(settings, console):
    config = settings(epoch_images=3, batch_size=None).resolved()
    data = load(config.data, config.optim, config.run)
    parts = build(config.model, config.method, data, choose_device(config.run.device))
    assert resolve(config, data, parts, console)[0].optim.batch_size == 3


def test_a_time_budget_does_not_add_epochs_to_zero(settings, console, monkeypatch):
    monkeypatch.setattr("snella_app.training.plan.fit_epochs", lambda *_: pytest.fail("epochs were fitted"))
    config = settings(epochs=0, time_budget="60s", head_init="probe").resolved()
    data = load(config.data, config.optim, config.run)
    parts = build(config.model, config.method, data, choose_device(config.run.device))
    assert resolve(config, data, parts, console)[0].optim.epochs == 0


@pytest.mark.parametrize("changes", [{"img_size": 80}, {"time_budget": None}])
def test_an_explicit_size_or_a_missing_budget_disables_size_selection(changes, settings, console, monkeypatch):
    monkeypatch.setattr("snella_app.training.plan.fit_image_size", lambda *_: pytest.fail("sizes were measured"))
    monkeypatch.setattr("snella_app.training.plan.fit_epochs", lambda *_: (1, None))
    values = {"img_size": None, "time_budget": "30s", "train_size": 16, "batch_size": 1, **changes}
    config = settings(**values).resolved()
    data = load(config.data, config.optim, config.run)
    parts = build(config.model, config.method, data, choose_device(config.run.device))
    plan, unchanged = resolve(config, data, parts, console)
    assert plan.model.img_size == config.model.img_size and unchanged is parts


@pytest.fixture
def head_by_pixels(monkeypatch, clock):
    """Evaluation steps take one second at 160 px and less with fewer pixels, training steps `factor` times as long."""
    timing = SimpleNamespace(factor=3.0)

    def step_seconds(parts, optim, dataset, batch, step):
        seconds = (parts.data_config["input_size"][-1] / 160) ** 2
        return {sizing._only_read: 0.0, sizing._trial_evaluation: seconds}.get(step, timing.factor * seconds)

    monkeypatch.setattr(sizing, "_step_seconds", step_seconds)
    monkeypatch.setattr(sizing, "layer_fit_seconds", lambda *_: 0.0)
    monkeypatch.setattr(sizing, "_SMALL_SIDE", 160)  # the images are smaller
    return timing


_HEAD = {"final_head": "layers", "head_init": "probe", "tta": 1, "test_size": 4}


@pytest.mark.parametrize(
    ("budget", "factor", "size", "message"),
    [
        # 16 training images, validation images twice (start, final head) and test images: 26 steps, after training also
        # the trained head: 29 steps
        ("20s", 3, 128, "128 px: the final head fits into 20s; it takes about 16.6 s (at 160 px"),
        ("40s", 3, None, ""),  # the head takes 26 s at 160 px, four epochs and the head 58 s at 80 px
        ("70s", 3, 80, "80 px: 4 epochs fit into 70s; one epoch takes about 14.6 s"),
        ("70s", 1, 112, "112 px: 4 epochs fit into 70s; one epoch takes about 12.9 s"),
        ("1s", 3, 48, "48 px: the final head exceeds 1s even at the smallest size; it takes about 2.3 s"),
    ],
)
def test_the_final_head_replaces_epochs_below_half_its_size(
    budget, factor, size, message, settings, console, head_by_pixels
):
    head_by_pixels.factor = factor
    chosen, text = select_size(settings, console, time_budget=budget, **_HEAD)
    assert chosen == size and message in text.replace("\N{NO-BREAK SPACE}", " ")


def test_a_linear_probe_uses_the_size_of_its_final_head(settings, console, head_by_pixels):
    assert select_size(settings, console, time_budget="70s", method="linear", **_HEAD)[0] is None
    size, text = select_size(settings, console, time_budget="20s", method="linear", **_HEAD)
    assert size == 128 and "measuring step times to fit the final head into 20s" in text


def test_without_epochs_the_final_evaluation_fits(settings, console, head_by_pixels):
    options = {**_HEAD, "final_head": "trained", "epochs": 0, "time_budget": "7s"}
    size, text = select_size(settings, console, **options)
    assert size == 112 and "112 px: the final evaluation fits into 7s" in text  # ten steps of 0.49 s


@pytest.mark.parametrize(
    ("side", "budget", "changes", "size"),
    [
        (100, "40s", {"epochs": 100}, 112),  # the head takes 14 s at 112 px, and would fit at 160 px
        (20, "40s", {"epochs": 100}, 48),
        (100, "1h", {}, None),  # the epochs fit at 160 px
        (20, "40s", {"method": "linear"}, None),  # no epochs
    ],
)
def test_the_size_without_epochs_is_at_most_that_of_the_images(
    side, budget, changes, size, settings, console, head_by_pixels, monkeypatch
):
    monkeypatch.setattr(sizing, "_SMALL_SIDE", side)
    assert select_size(settings, console, time_budget=budget, **_HEAD, **changes)[0] == size


def test_a_backbone_with_a_fixed_size_keeps_it(settings, console, timed_by_pixels):
    config = settings(img_size=None, time_budget="1s", batch_size=1, train_size=16).resolved()
    parts = build_components(config)

    def at_size(size):
        raise ValueError(f"no {size}\nat all")

    assert fit_image_size(parts, config, at_size, console, time.monotonic()) is None
    assert "image size stays 160 px: test_vit does not support 48 px (no 48)" in console.file.getvalue()


def test_the_run_uses_the_selected_size(settings, console, monkeypatch, timed_by_pixels):
    monkeypatch.setattr(sizing, "_MAX_EPOCHS", 1)
    config = settings(img_size=None, epochs=4, time_budget="3s", batch_size=1, train_size=16, method="linear")
    run = train(config, console)
    info = read(RunInfo, run.path)
    assert run.read_config().model.img_size == info.backbone.img_size == 48 and info.data_config["input_size"] == [
        3,
        48,
        48,
    ]
    assert "images of 48×48 px" in console.file.getvalue()
    assert load_run(run).transform(Image.new("RGB", (60, 60))).shape == (3, 48, 48)


@pytest.mark.parametrize(
    ("name", "step"), [("test_vit", 16), ("test_resnet", 32), ("swin_tiny_patch4_window7_224", 32), (None, 32)]
)
def test_sizes_are_multiples_of_the_model_stride(name, step):
    assert size_step(torch.nn.Linear(2, 2) if name is None else timm.create_model(name)) == step


@pytest.mark.parametrize(("text", "seconds"), [("30m", 1800), ("1h30m", 5400), ("90s", 90), ("0.5h", 1800)])
def test_durations_are_parsed(text, seconds):
    assert budget_seconds(text) == seconds


@pytest.mark.parametrize("text", ["30", "m", "", "0s", "30 minutes"])
def test_invalid_durations_are_rejected_with_examples(text, settings):
    with pytest.raises(ValueError, match=f"time_budget must be a duration such as 30m, 1h30m or 90s, got {text!r}"):
        settings(time_budget=text)


def test_a_comparison_needs_a_fixed_batch_size():
    from snella_lab.comparison.experiment import Experiment

    with pytest.raises(
        ValueError, match="batch_size must be an integer, the same for all methods on a task, got 'auto'"
    ):
        Experiment.from_dict(
            {"methods": ["linear"], "data": ["digits"], "backbone": "test_vit", "train": {"batch_size": "auto"}}
        )


def test_the_command_line_accepts_a_number_or_auto(capsys):
    from snella_app.cli.main import main
    from snella_app.cli.parser import parse

    args = ["train", "--data", "digits", "--backbone", "test_vit", "--out", "x", "--batch-size"]
    assert parse([*args, "auto"])[1]["batch_size"] == "auto" and parse([*args, "8"])[1]["batch_size"] == 8
    assert main([*args, "many"]) == 2
    assert "--batch-size must be an integer or auto, got many" in capsys.readouterr().err


class _ReadSlowlyOnce(torch.utils.data.Dataset):
    """Items whose first read takes 30 ms."""

    def __init__(self):
        self.known = set()

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index not in self.known:
            self.known.add(index)
            time.sleep(0.03)
        return torch.zeros(1), 0


def test_the_first_read_of_images_is_timed_separately(settings):
    config = settings(batch_size=2, time_budget="1h").resolved()
    parts = build_components(config)
    images = _ReadSlowlyOnce()
    assert sizing._step_seconds(parts, config.optim, images, 2, sizing._only_read) >= 0.06
    assert sizing._step_seconds(parts, config.optim, images, 2, sizing._only_read) < 0.03


def test_the_time_budget_includes_the_final_head(settings, console, monkeypatch):
    config = settings(batch_size=1, train_size=14, val_size=3, time_budget="60s", final_head="trained").resolved()
    parts = build_components(config)
    monkeypatch.setattr(sizing, "_step_seconds", lambda *args: 0.1)
    without = sizing._measure_times(parts, config)
    with_head = sizing._measure_times(parts, config.replace(final_head="layers"))
    assert with_head.step_s == without.step_s and with_head.selection_s == without.selection_s
    assert with_head.final_s >= without.final_s + 14 * 0.1


def test_compiling_steps_are_excluded_from_the_step_time(settings):
    config = settings(time_budget="1s").resolved()
    parts = build_components(config)
    pauses = iter([0.2, 0.2])

    def step(*_):
        time.sleep(next(pauses, 0.0))

    assert sizing._step_seconds(parts, config.optim, parts.splits.val, len(parts.splits.val), step) < 0.1


def test_a_batch_is_read_once_for_all_views(settings, monkeypatch):
    config = settings(batch_size=4, train_size=8, val_size=6, tta=2, time_budget="60s", final_head="trained").resolved()
    parts = build_components(config)
    first_reads = iter([0.5])
    seconds = {sizing._trial_step: 1.0, sizing._trial_evaluation: 0.3}

    def step_seconds(parts, optim, dataset, batch, step):
        return next(first_reads, 0.1) if step is sizing._only_read else seconds[step]

    monkeypatch.setattr(sizing, "_step_seconds", step_seconds)
    times = sizing._measure_times(parts, config)
    assert times.step_s == 1.0 and times.selection_s == pytest.approx(6 / 4 * 0.3)  # of one view
    start = times.selection_s if sizing.can_skip_training(config.optim, config.data.protocol) else 0.0
    splits = (6 + len(parts.splits.test or ())) / 4  # partial batches take part of the time
    assert times.final_s == pytest.approx(start + splits * (0.5 - 0.1) + splits * (0.1 + 2 * 0.2))


def test_smaller_last_batches_do_not_count(settings):
    config = settings(time_budget="1h", val_size=5).resolved()
    parts = build_components(config)

    def step(parts, precision, batch):
        time.sleep(0.05 if len(batch["labels"]) == 3 else 0.0)

    assert sizing._step_seconds(parts, config.optim, parts.splits.val, 3, step) >= 0.05


def test_evaluation_is_timed_without_mode_changes(settings):
    config = settings(time_budget="1h").resolved()
    parts, modes = build_components(config), []
    plain = parts.model.train
    parts.model.train = lambda mode=True: modes.append(mode) or plain(mode)
    plain(True)
    sizing._step_seconds(parts, config.optim, parts.splits.val, 2, sizing._trial_evaluation)
    assert modes == [False, True] and parts.model.training


@pytest.mark.parametrize(("budget", "left"), [("60s", 54.0), ("20s", 18.0), ("10m", 600 - 34.0)])
def test_at_most_a_tenth_of_the_budget_is_reserved(budget, left, clock):
    assert sizing._seconds_left(budget, clock.now) == pytest.approx(left)
