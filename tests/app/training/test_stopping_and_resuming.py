"""Runs stopped by signals, full disks and NaN values: saved state and resuming."""

import errno
import importlib
import io
import os
import re
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from snella_app.config.train import TrainConfig
from snella_app.records.record import read
from snella_app.records.run import RunInfo
from snella_app.report.report import write_report
from snella_app.runs import RunFolder, load_run
from snella_app.runs.layer_probe import LAYER_PROBE
from snella_app.tasks.classification import ClassificationTask
from snella_app.training.checkpoints import CheckpointError, checkpoint_to_resume, latest_checkpoint
from snella_app.training.session import InterruptCallback, NonFiniteLossError, TrainingInterrupted
from snella_app.training.train import train
from snella_app.training.trainer import SnellaTrainer

from .components import interrupt_before

fit = importlib.import_module("snella_app.training.train")._fit

pytestmark = pytest.mark.usefixtures("no_report")

KILL_PROGRAM = """
import os, signal, sys
import yaml, torch
torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))
from snella_app.config.train import TrainConfig
from snella_app.training.train import train
from snella_app.training import checkpoints, trainer
where, step, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
def die(): os.kill(os.getpid(), signal.SIGKILL)
if where == "step":
    original = trainer.SnellaTrainer.training_step
    def training_step(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        return die() if self.state.global_step == step else result
    trainer.SnellaTrainer.training_step = training_step
else:
    original = checkpoints.sync_tree
    checkpoints.sync_tree = lambda folder: die() if folder.name == f"checkpoint-{step}" else original(folder)
train(TrainConfig.from_flat(**yaml.safe_load(open(path))))
"""


def outcome(run):
    """Return the results of a run, without times and paths."""
    metrics = run.read_json("metrics.json")
    state = latest_checkpoint(run.checkpoints)
    return (
        load_file(run.adapter / "adapter_model.safetensors"),
        load_file(state / "adapter_model.safetensors"),
        torch.load(state / "optimizer.pt", weights_only=True)["state"],
        {key: metrics[key] for key in ("best_epoch", "history", "val", "test")},
        run.read_json("allocation.json"),
    )


def is_bit_identical(first, second):
    """Return whether two values are bit-identical."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(is_bit_identical(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(is_bit_identical, first, second))
    return first == second


@pytest.fixture(scope="module")
def uninterrupted(photos, tiny_run, tmp_path_factory):
    """Results of an uninterrupted run with `settings()`."""
    values = {"data": f"folder:{photos}", "out": str(tmp_path_factory.mktemp("uninterrupted") / "run")}
    config = TrainConfig.from_flat(**tiny_run, **values)
    run = train(config, Console(file=io.StringIO()))
    return outcome(run)


def resume(config):
    """Resume a run, given only its folder."""
    output = io.StringIO()
    run = train(TrainConfig.from_flat(out=config.run.out, resume=True), Console(file=output, width=200))
    return run, output.getvalue()


def kill(config, where, step, tmp_path):
    """Train in a process that kills itself."""
    import yaml

    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(config.flat()))
    command = [sys.executable, "-c", KILL_PROGRAM, where, str(step), str(tmp_path / "settings.yaml")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert process.returncode == -signal.SIGKILL, process.stderr


@pytest.mark.parametrize(("where", "step", "checkpoint"), [("step", 6, "checkpoint-4"), ("save", 8, "checkpoint-4")])
def test_a_killed_run_resumes_bit_for_bit(where, step, checkpoint, settings, uninterrupted, tmp_path):
    config = settings()
    kill(config, where, step, tmp_path)
    run = RunFolder(config.run.out)
    assert run.status == "running"
    assert latest_checkpoint(run.checkpoints) == run.checkpoints / checkpoint
    assert any(p.name.startswith(".staging") for p in run.checkpoints.iterdir()) == (where == "save")
    run, text = resume(config)
    assert f"resuming from {run.checkpoints / checkpoint}" in text
    assert is_bit_identical(outcome(run), uninterrupted)
    assert [p.name for p in run.checkpoints.iterdir()] == ["checkpoint-12"]


def test_estimated_gradients_resume_bit_for_bit(settings, tmp_path):
    options = {"weight_gradient": "sample:1/2", "compress_activations": True}
    sampling = {"img_size": 64, "method_options": options}
    uninterrupted, config = settings(**sampling, out=str(tmp_path / "uninterrupted")), settings(**sampling)
    expected = outcome(train(uninterrupted, Console(file=io.StringIO())))
    kill(config, "step", 6, tmp_path)
    assert is_bit_identical(outcome(resume(config)[0]), expected)
    exact = settings(img_size=64, method_options={}, out=str(tmp_path / "exact"))
    assert not is_bit_identical(outcome(train(exact, Console(file=io.StringIO())))[0], expected[0])


def test_a_run_killed_before_its_first_checkpoint_restarts(settings, uninterrupted, tmp_path):
    config = settings()
    kill(config, "step", 2, tmp_path)
    assert latest_checkpoint(RunFolder(config.run.out).checkpoints) is None
    assert is_bit_identical(outcome(resume(config)[0]), uninterrupted)


@pytest.mark.parametrize(
    ("step", "number"),
    [(1, signal.SIGINT), (6, signal.SIGINT), (8, signal.SIGINT), (6, signal.SIGTERM)],
)
def test_an_interrupted_run_saves_and_resumes_bit_for_bit(step, number, settings, console, uninterrupted):
    config = settings()
    if signal.getsignal(number) == signal.SIG_IGN:  # as under nohup, tested separately
        signal.signal(number, signal.SIG_DFL)
    handler = signal.getsignal(number)
    message = rf"saved as .*checkpoint-{step}; resume with: snella train --out .*run --resume"
    with interrupt_before(step - 1, number=number), pytest.raises(TrainingInterrupted, match=message):
        train(config, console)
    assert signal.getsignal(number) == handler
    assert RunFolder(config.run.out).status == "interrupted"
    run, _ = resume(config)
    assert is_bit_identical(outcome(run), uninterrupted)


@pytest.mark.parametrize("step", [1, 3])
def test_an_interruption_stops_a_run_with_one_step_per_epoch_and_no_checkpoints(step, settings, console):
    config = settings(epochs=3, train_size=6, batch_size=6, final_head="trained")
    with interrupt_before(step - 1), pytest.raises(TrainingInterrupted, match=rf"saved as .*checkpoint-{step};"):
        train(config, console, keep_checkpoints=False)
    assert resume(config)[0].status == "finished"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_acknowledged_immediately(number, capfd):
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with InterruptCallback() as interrupt:
            os.kill(os.getpid(), number)
            assert interrupt.stop_requested
            assert "finishing this step and saving" in capfd.readouterr().err
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_handlers_that_could_not_be_restored_are_kept(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(signal, "getsignal", lambda number: None)  # as if C code had set the handlers
        patch.setattr(signal, "signal", lambda *_: pytest.fail("a handler was replaced"))
        with InterruptCallback():
            pass


def test_sighup_is_ignored_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with InterruptCallback() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupt.stop_requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_resuming_writes_a_missing_report(finished, tmp_path):
    run = RunFolder(shutil.copytree(finished.path, tmp_path / "run"))
    run.report.unlink()
    resume(TrainConfig.from_flat(out=str(run.path), resume=True))
    assert "<html" in run.report.read_text()


def test_a_run_killed_at_its_end_has_a_finished_report_and_is_completed_by_resuming(
    settings, console, uninterrupted, monkeypatch
):
    config = settings()
    with monkeypatch.context() as patch:
        patch.setattr("snella_app.training.finish.write_report", write_report)
        patch.setattr(RunFolder, "finish", lambda self: (_ for _ in ()).throw(SystemExit))  # like a kill
        with pytest.raises(SystemExit):
            train(config, console, render_report=True)
    run = RunFolder(config.run.out)
    assert run.status == "running"
    assert '<span class="badge finished">' in run.report.read_text()
    (run.adapter / "README.md").unlink()
    for name in (".report.html.x1y2", ".metrics.json.tmp"):
        (run.path / name).write_text("half")
    run, _ = resume(config)
    assert is_bit_identical(outcome(run), uninterrupted)
    assert "snella" in (run.adapter / "README.md").read_text()
    assert not list(run.path.glob(".*"))
    read(RunInfo, run.path)  # checks the digests
    (run.adapter / "README.md").write_text("edited")
    read(RunInfo, run.path)  # checks the digests


def test_resuming_a_finished_run_removes_leftovers_of_a_kill(finished, tmp_path):
    run = RunFolder(shutil.copytree(finished.path, tmp_path / "run"))
    (run.path / ".report.html.x1y2").write_text("half")
    (run.path / ".mine").write_text("kept")
    resume(TrainConfig.from_flat(out=str(run.path), resume=True))
    assert [path.name for path in run.path.glob(".*")] == [".mine"]


def test_a_signal_that_arrives_twice_at_once_counts_once(settings, console):
    interruption = interrupt_before(5, presses=2, repeat_s=1.0)
    with interruption, pytest.raises(TrainingInterrupted, match=r"saved as .*checkpoint-6;"):
        train(settings(), console)


def test_a_second_ctrl_c_stops_immediately_and_keeps_the_last_checkpoint(settings, console, uninterrupted):
    config = settings()
    with interrupt_before(5, presses=2), pytest.raises(TrainingInterrupted, match=r"saved as .*checkpoint-4;"):
        train(config, console)
    assert is_bit_identical(outcome(resume(config)[0]), uninterrupted)


def test_an_interruption_of_the_last_step_stops_before_the_final_evaluation(settings, console, uninterrupted):
    config = settings()
    with interrupt_before(11), pytest.raises(TrainingInterrupted, match=r"saved as .*checkpoint-12;"):
        train(config, console)
    assert is_bit_identical(outcome(resume(config)[0]), uninterrupted)


def test_a_run_killed_during_the_final_evaluation_resumes_to_the_same_result(
    settings, console, uninterrupted, monkeypatch
):
    config = settings()
    with monkeypatch.context() as patch:
        patch.setattr("snella_app.training.train.finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(TrainingInterrupted, match="checkpoint-12"):
            train(config, console)
    assert is_bit_identical(outcome(resume(config)[0]), uninterrupted)


FILES = ("adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt", "trainer_state.json")


def flipped(content):
    """Flip one bit in the middle of the bytes."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 8]) + content[middle + 1 :]


def test_an_altered_checkpoint_is_reported_with_remedies(settings, console, uninterrupted, monkeypatch):
    config = settings()
    with monkeypatch.context() as patch:
        patch.setattr("snella_app.training.train.finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(TrainingInterrupted, match="checkpoint-12"):
            train(config, console)
    checkpoint = RunFolder(config.run.out).checkpoints / "checkpoint-12"
    message = r"checkpoint is damaged: .*-12: {}.*; start over with --overwrite, or remove .*checkpoints and run again"
    for name in (*FILES, "rng_state.pth", "progress.json", "manifest.json"):
        content = (checkpoint / name).read_bytes()
        for damaged in (content[: len(content) // 2], flipped(content)):
            (checkpoint / name).write_bytes(damaged)
            with pytest.raises(CheckpointError, match=message.format(f".*{name}")):
                resume(config)
        (checkpoint / name).unlink()
        with pytest.raises(CheckpointError, match=message.format(f"(missing files: {name}|{name} is missing)")):
            resume(config)
        (checkpoint / name).write_bytes(content)
    older = shutil.copytree(checkpoint, checkpoint.with_name("checkpoint-4"))
    (checkpoint / "optimizer.pt").write_bytes(flipped((checkpoint / "optimizer.pt").read_bytes()))
    note = io.StringIO()
    assert checkpoint_to_resume(RunFolder(config.run.out), Console(file=note, width=400)) == older
    expected = "note: removed the damaged checkpoint .*-12: files modified or truncated after writing: optimizer.pt"
    assert re.search(expected, note.getvalue())
    shutil.rmtree(older)
    assert is_bit_identical(outcome(resume(config)[0]), uninterrupted)


def test_the_best_adapter_of_another_run_is_rejected(settings, console, uninterrupted, finished):
    config = settings()
    run = RunFolder(config.run.out)
    for start in (lambda: train(config, console), lambda: resume(config)):
        with interrupt_before(6, presses=2), pytest.raises(TrainingInterrupted, match="checkpoint-4"):
            start()
        assert "adapter/adapter_model.safetensors" in run.read_json("run.json")["files"]
    original = run.adapter.rename(run.path / ".own")
    shutil.copytree(finished.adapter, run.adapter)
    message = r"run is damaged: adapter/.*adapter_model\.safetensors.* changed after the run wrote it"
    with pytest.raises(ValueError, match=message):
        resume(config)
    with pytest.raises(ValueError, match=message):
        load_run(run)
    shutil.rmtree(run.adapter)
    original.rename(run.adapter)
    assert is_bit_identical(outcome(resume(config)[0]), uninterrupted)


def test_epochs_of_a_part_of_the_images_resume_bit_for_bit(settings, console, tmp_path):
    values = {"epochs": 5, "epoch_images": 6, "batch_size": 2}
    expected = train(settings(**values, out=str(tmp_path / "expected")), console)
    assert latest_checkpoint(expected.checkpoints).name == "checkpoint-15"
    with interrupt_before(7), pytest.raises(TrainingInterrupted, match="checkpoint-8"):
        train(settings(**values), console)
    run, _ = resume(settings(**values))
    assert is_bit_identical(outcome(run), outcome(expected))
    assert [row["epoch"] for row in run.read_json("metrics.json")["history"]] == [0, 1, 2, 3, 4, 5]


def test_a_run_with_the_default_heads_resumes_bit_for_bit(settings, console, tmp_path):
    values = {"epochs": 2, "final_head": "auto"}
    expected = train(settings(**values, out=str(tmp_path / "expected")), console)
    with interrupt_before(5), pytest.raises(TrainingInterrupted, match="checkpoint-6"):
        train(settings(**values), console)
    run, _ = resume(settings(**values))
    assert is_bit_identical(outcome(run), outcome(expected))
    assert (run.adapter / LAYER_PROBE).read_bytes() == (expected.adapter / LAYER_PROBE).read_bytes()


@pytest.mark.parametrize("method", ["lora-2", "linear", "full", "snella-matched-2"])
def test_other_methods_resume_bit_for_bit(method, settings, console, tmp_path):
    options = {"lora_dropout": 0.3} if method == "lora-2" else {}
    config = settings(method=method, method_options=options, epochs=2)
    expected = train(settings(method=method, method_options=options, epochs=2, out=str(tmp_path / "expected")), console)
    with interrupt_before(5), pytest.raises(TrainingInterrupted, match="checkpoint-6"):
        train(config, console)
    run, _ = resume(config)
    for folder in ("adapter", "checkpoints/checkpoint-8"):
        files = [sorted((r.path / folder).glob("*.safetensors")) for r in (run, expected)]
        assert [file.name for file in files[0]] == [file.name for file in files[1]]
        assert all(
            is_bit_identical(load_file(actual), load_file(reference)) for actual, reference in zip(*files, strict=True)
        )
    assert run.read_json("metrics.json")["history"] == expected.read_json("metrics.json")["history"]


def test_dropout_affects_the_runs_of_this_file(settings, console, tmp_path, uninterrupted):
    plain = train(settings(method_options={"update_dropout": 0.0, "update_drop_path": 0.0}), console)
    assert not is_bit_identical(outcome(plain)[1], uninterrupted[1])


def test_a_full_disk_while_saving_keeps_the_old_checkpoint_and_resumes(settings, console, uninterrupted, monkeypatch):
    config = settings()
    original = SnellaTrainer._save_rng_state

    def disk_full(self, folder):
        original(self, folder)
        if self.state.global_step == 8:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(SnellaTrainer, "_save_rng_state", disk_full)
        message = (
            r"write .*checkpoint-8: the disk is full \(\d+ MiB free\); the previous one, .*checkpoint-4, is intact"
        )
        with pytest.raises(CheckpointError, match=message):
            train(config, console)
    run = RunFolder(config.run.out)
    assert run.status == "failed" and "the disk is full" in run.read_json("run.json")["error"]
    assert [p.name for p in run.checkpoints.iterdir()] == ["checkpoint-4"]
    assert is_bit_identical(outcome(resume(config)[0]), uninterrupted)


def test_a_file_size_limit_while_saving_keeps_the_old_checkpoint_and_resumes(
    settings, console, uninterrupted, monkeypatch
):
    """The kernel rejects the write, so torch's writer raises its own error."""
    config = settings()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    original = SnellaTrainer._save_optimizer_and_scheduler

    def limited(self, folder):
        if self.state.global_step == 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            original(self, folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with monkeypatch.context() as patch:
        patch.setattr(SnellaTrainer, "_save_optimizer_and_scheduler", limited)
        with pytest.raises(CheckpointError, match=r"could not write .*checkpoint-8: .*checkpoint-4, is intact"):
            train(config, console)
    assert is_bit_identical(outcome(resume(config)[0]), uninterrupted)


def test_a_full_disk_while_saving_the_best_adapter_keeps_the_old_one(settings, console, uninterrupted, monkeypatch):
    config = settings()
    original = SnellaTrainer._selection_scores
    better = iter([0.1, 0.2, 0.3, 0.4])  # epoch 0 is the first

    def improving(self):
        return {**original(self), "val_accuracy": next(better)}

    def disk_full(tensors, *settings):
        if len(seen := [*written, 1]) == 4:  # two adapters, the state of epoch 1, and the adapter of epoch 2
            raise OSError(errno.ENOSPC, "No space left on device")
        written[:] = seen
        return as_safetensors(tensors, *settings)

    from snella_app.methods import saving

    written, as_safetensors = [], saving._as_safetensors
    with monkeypatch.context() as patch:
        patch.setattr(SnellaTrainer, "_selection_scores", improving)
        patch.setattr(saving, "_as_safetensors", disk_full)
        with pytest.raises(
            CheckpointError,
            match=r"could not write .*adapter: the disk is full .*; the previous one, .*adapter, is intact",
        ):
            train(config, console)
    run = RunFolder(config.run.out)
    adapter, epoch_1 = (
        {name: value for name, value in load_file(folder / "adapter_model.safetensors").items() if ".head." not in name}
        for folder in (run.adapter, run.checkpoints / "checkpoint-4")  # its head has normalized inputs
    )
    assert is_bit_identical(adapter, epoch_1)
    assert is_bit_identical(outcome(resume(config)[0])[1:3], uninterrupted[1:3])


@pytest.mark.parametrize(
    ("keep_checkpoints", "saved", "folders"),
    [
        (True, "the state after epoch 1 and the best adapter are saved", ("checkpoints/checkpoint-4", "adapter")),
        (False, "the best adapter is saved", ("adapter",)),
    ],
)
def test_a_nan_loss_stops_the_run_and_names_the_step_and_the_saved_files(
    keep_checkpoints, saved, folders, settings, console, monkeypatch
):
    config = settings()
    original = SnellaTrainer.compute_loss

    def broken(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        result = original(self, model, inputs, return_outputs, num_items_in_batch)
        return result * float("nan") if model.training and self.state.global_step == 5 else result

    monkeypatch.setattr(SnellaTrainer, "compute_loss", broken)
    message = rf"the loss became nan in epoch 2, step 6 of 12; {saved} in .*lower --lr \(now 0\.005\)"
    with pytest.raises(NonFiniteLossError, match=message):
        train(config, console, keep_checkpoints=keep_checkpoints)
    run = RunFolder(config.run.out)
    assert run.status == "failed" and "epoch 2, step 6" in run.read_json("run.json")["error"]
    assert {path.parent.relative_to(run.path).as_posix() for path in run.path.rglob("adapter_model.safetensors")} == {
        *folders
    }
    for folder in folders:
        assert all(t.isfinite().all() for t in load_file(run.path / folder / "adapter_model.safetensors").values())


def test_a_diverging_learning_rate_raises_a_non_finite_loss_error(settings, console):
    with pytest.raises(
        NonFiniteLossError, match=r"became (nan|inf) in epoch 1, step \d of 12; no trained epoch is saved in"
    ):
        train(settings(method="full", lr=1e30, head_lr=1e30, warmup_ratio=0.0), console)


def test_a_nan_gradient_does_not_reach_the_weights(settings, console, monkeypatch):
    original = SnellaTrainer.training_step

    def broken(self, model, *args, **kwargs):
        loss = original(self, model, *args, **kwargs)
        if self.state.global_step == 6:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("inf"))
        return loss

    monkeypatch.setattr(SnellaTrainer, "training_step", broken)
    with pytest.raises(NonFiniteLossError, match=r"the gradient became (nan|inf) in epoch 2, step 7 of 12"):
        train(settings(max_grad_norm=0.0), console)


def test_an_epoch_with_a_nan_validation_loss_is_not_saved(settings, console, monkeypatch):
    original, epochs = ClassificationTask.metrics, iter([0, 1, 2])

    def broken(self, logits, labels):
        scores = original(self, logits, labels)
        return {**scores, "loss": float("inf")} if next(epochs) == 2 else scores

    monkeypatch.setattr(ClassificationTask, "metrics", broken)
    with pytest.raises(NonFiniteLossError, match="the validation loss became inf in epoch 2, step 8 of 12"):
        train(settings(), console)
    assert [p.name for p in RunFolder(settings().run.out).checkpoints.iterdir()] == ["checkpoint-4"]


def test_a_missing_image_is_a_one_line_error_with_workers(settings, console, photos, monkeypatch, tmp_path):
    copy = shutil.copytree(photos, tmp_path / "mine")
    config = settings(data=f"folder:{copy}", workers=1)
    with monkeypatch.context() as patch:
        patch.setattr("snella_app.training.train._fit", lambda *args: shutil.rmtree(copy / "cats") or fit(*args))
        with pytest.raises(ValueError, match=r"^'.*cats/\d+.png' is not a readable image: no such file[^\n]*$"):
            train(config, console)
    error = RunFolder(config.run.out).read_json("run.json")["error"]
    assert "Traceback" not in error and "is not a readable image" in error
