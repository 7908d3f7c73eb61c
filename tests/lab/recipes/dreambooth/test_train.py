"""DreamBooth through the command line, with a tiny random pipeline."""

import ast
import html
import json
import math
import shutil
import signal
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors.torch import load_file

from snella_app.cli.main import main
from snella_app.methods import load_trained
from snella_app.records.record import read, write
from snella_app.records.run import RunInfo
from snella_app.training.session import NonFiniteLossError, TrainingInterrupted
from snella_lab.recipes.dreambooth.config import DreamBoothConfig, GenerateOptions
from snella_lab.recipes.dreambooth.generate import SamplingConfig, generate, sample_images
from snella_lab.recipes.dreambooth.pipeline import load_pipeline
from snella_lab.recipes.dreambooth.report import write_generation_report
from snella_lab.recipes.dreambooth.train import DreamBoothTrainer, personalize

STEPS = 12
TINY = {
    "class_name": "toy",
    "resolution": 16,
    "steps": STEPS,
    "accumulation": 2,
    "lr": 0.05,
    "scaling": 10.0,
    "samples": 1,
    "sample_steps": 2,
    "save_every": 6,
    "max_sequence_length": 24,
    "optimizer": "adamw",
    "device": "cpu",
}


@pytest.fixture
def settings(subject, pipeline_folder, tmp_path):
    base = {**TINY, "data": f"folder:{subject}", "pipeline": str(pipeline_folder), "out": str(tmp_path / "run")}

    def make(**changes):
        values = {**base, **changes}
        if not values.get("method", "snella").startswith("snell"):
            values["scaling"] = None
        return DreamBoothConfig.from_flat(**values)

    return make


@pytest.fixture(scope="session")
def finished_run(subject, pipeline_folder, tmp_path_factory):
    """Train one run through the command line."""
    out = tmp_path_factory.mktemp("finished") / "run"
    values = {**TINY, "data": f"folder:{subject}", "pipeline": str(pipeline_folder), "out": str(out)}
    args = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["dreambooth", *args]) == 0
    return out


@pytest.fixture
def no_report(monkeypatch):
    """Skip the report, which takes longer than these runs."""
    monkeypatch.setattr("snella_lab.recipes.dreambooth.train.write_generation_report", lambda run: run / "report.html")


@contextmanager
def interrupted_at(step):
    """Send SIGINT during a step."""
    training_step = DreamBoothTrainer.training_step

    def interrupt_and_step(self, *arguments):
        if self.state.global_step == step - 1 and not self.interrupt.stop_requested:
            signal.raise_signal(signal.SIGINT)
        return training_step(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DreamBoothTrainer, "training_step", interrupt_and_step)
        yield


def metrics_of(run):
    return json.loads((run / "metrics.json").read_text())


def pixels(path):
    return np.asarray(Image.open(path))


def generated_pixels(pipeline, prompt="a photo of sks toy", seed=0):
    sampling = SamplingConfig(resolution=16, steps=2, max_sequence_length=24)
    (image,) = sample_images(pipeline, [(prompt, seed)], sampling, torch.device("cpu"))
    return np.asarray(image)


def test_training_lowers_the_fixed_loss_and_reaches_the_target_budget(finished_run):
    metrics = metrics_of(finished_run)
    assert metrics["fixed_loss"]["after"] < 0.97 * metrics["fixed_loss"]["before"]
    history = metrics["loss_history"]
    assert [row["step"] for row in history] == list(range(1, STEPS + 1))
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 for row in history)
    allocation = json.loads((finished_run / "allocation.json").read_text())
    budget = sum(matrix["budget"] for matrix in allocation["matrices"])
    assert budget == allocation["target_budget"] == history[-1]["budget"] == allocation["total_weights"] * 3 // 10 + 1
    assert {matrix["kind"] for matrix in allocation["matrices"]} == {
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
    }


def test_generate_reproduces_the_samples_of_training(finished_run, tmp_path):
    args = ["--prompt", "a photo of sks toy", "--images-per-prompt", "2", "--device", "cpu"]
    assert main(["generate", str(finished_run), "--out", str(tmp_path / "pictures"), *args]) == 0
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["00-0.png", "00-1.png", "images.json"]
    np.testing.assert_array_equal(
        pixels(tmp_path / "pictures" / "00-0.png"), pixels(finished_run / "samples" / "00-0.png")
    )
    assert (pixels(tmp_path / "pictures" / "00-1.png") != pixels(tmp_path / "pictures" / "00-0.png")).any()


def test_adapter_loads_with_peft_into_a_plain_pipeline(finished_run, pipeline_folder):
    pipeline = load_pipeline(str(pipeline_folder))
    untrained = generated_pixels(pipeline)
    peft.PeftModel.from_pretrained(pipeline.transformer, finished_run / "adapter")
    trained = generated_pixels(pipeline)
    np.testing.assert_array_equal(trained, pixels(finished_run / "samples" / "00-0.png"))
    assert (trained != untrained).any()


def test_run_folder_contains_records_and_report(finished_run, subject, capsys):
    run = json.loads((finished_run / "run.json").read_text())
    assert (run["status"], run["task"], run["data"]["subject"]) == ("finished", "generation", subject.name)
    assert run["data"]["description"] == "4 images of toy, prompt “a photo of sks toy”"
    assert "--class-name toy" in run["command"] and "--steps 12" in run["command"]
    page = (finished_run / "report.html").read_text()
    assert page.count("<img ") == 5 and "a photo of sks toy · seed 0" in page and "Sparsity of each matrix" in page
    with Image.open(finished_run / "samples" / "00-0.png") as image:
        assert image.text == {"prompt": "a photo of sks toy", "seed": "0"}
    assert main(["inspect", str(finished_run)]) == 0
    assert "attn.to_q" in capsys.readouterr().out


def test_image_depends_only_on_prompt_and_seed(finished_run, pipeline_folder):
    pipeline = load_pipeline(str(pipeline_folder))
    jobs = [("a toy", 3), ("sks toy", 0), ("a photo of sks toy", 5)]
    sampling = SamplingConfig(resolution=16, steps=2, max_sequence_length=24, batch_size=3)
    images = [np.asarray(image) for image in sample_images(pipeline, jobs, sampling, torch.device("cpu"))]
    single = generated_pixels(pipeline, *jobs[2])
    # batching may change the last bit of a pixel
    assert np.abs(images[2].astype(int) - single.astype(int)).max() <= 1
    assert np.abs(images[0].astype(int) - single.astype(int)).max() > 1


def test_interrupted_run_resumes_bit_identically(settings, finished_run, tmp_path, no_report):
    out = str(tmp_path / "cut")
    with interrupted_at(5), pytest.raises(TrainingInterrupted, match=r"checkpoint-5; resume with: snella dreambooth"):
        personalize(settings(out=out))
    run = personalize(DreamBoothConfig.from_flat(out=out, resume=True))
    uninterrupted, resumed = (
        load_file(folder / "adapter_model.safetensors") for folder in (finished_run / "adapter", run.adapter)
    )
    assert uninterrupted.keys() == resumed.keys()
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)
    assert metrics_of(run.path)["loss_history"] == metrics_of(finished_run)["loss_history"]
    assert (run.path / "allocation.json").read_text() == (finished_run / "allocation.json").read_text()


@pytest.mark.parametrize(("method", "file"), [("lora-2", "adapter_model"), ("full", "trainable")])
def test_other_methods_train_and_load(settings, no_report, method, file):
    run = personalize(settings(method=method, steps=2, lr=1e-3))
    assert metrics_of(run.path)["fixed_loss"]["after"] < metrics_of(run.path)["fixed_loss"]["before"]
    assert (run.adapter / f"{file}.safetensors").is_file() and not (run.path / "allocation.json").exists()
    prompt, out = "a photo of sks toy", str(run.path / "more")
    generated = generate(GenerateOptions(run=str(run.path), prompt=prompt, out=out, images_per_prompt=1, device="cpu"))
    np.testing.assert_array_equal(pixels(generated[0].path), pixels(run.path / "samples" / "00-0.png"))


def test_prior_preservation_trains_on_generated_images(settings, no_report):
    changes = dict(steps=1, samples=0, gradient_checkpointing=False, flip=True, precision="bf16", accumulation=1)
    plain = personalize(settings(**changes))
    prior = personalize(settings(**changes, prior_weight=0.5, class_images=2, out=f"{plain.path}-prior"))
    assert sorted(path.name for path in (prior.path / "class_images").iterdir()) == [
        *("00-0.png", "00-1.png", "images.json")
    ]
    manifest = json.loads((prior.path / "class_images" / "images.json").read_text())
    assert {entry["prompt"] for entry in manifest["images"]} == {"a photo of toy"}
    losses = [metrics_of(run.path)["loss_history"][0]["loss"] for run in (plain, prior)]
    assert losses[1] > 1.1 * losses[0]


def test_nonfinite_loss_ends_the_run(settings, tmp_path):
    with pytest.raises(NonFiniteLossError, match=r"became (nan|inf) in step \d+ of 12; .*lower --lr \(now 1e\+30\)"):
        personalize(settings(method="full", lr=1e30, max_grad_norm=0.0))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_resumed_run_requires_the_original_images(settings, subject, tmp_path):
    copy = shutil.copytree(subject, tmp_path / "copy")
    with interrupted_at(1), pytest.raises(TrainingInterrupted, match="checkpoint-1; resume"):
        personalize(settings(data=f"folder:{copy}"))
    (copy / "00.png").unlink()
    with pytest.raises(ValueError, match=r"the 4 images that .*, got 3 images in .*copy with different content"):
        personalize(DreamBoothConfig.from_flat(out=str(tmp_path / "run"), resume=True))


def test_finished_run_is_not_modified(finished_run, capsys):
    before = (finished_run / "metrics.json").stat().st_mtime_ns
    assert main(["dreambooth", "--out", str(finished_run), "--resume"]) == 0
    assert "is already finished" in capsys.readouterr().out
    assert main(["dreambooth", "--out", str(finished_run), "--data", "folder:x", "--pipeline", "y"]) == 2
    assert "contains a finished run; choose another folder" in capsys.readouterr().err
    assert (finished_run / "metrics.json").stat().st_mtime_ns == before


def test_eight_bit_adam_resumes_bit_identically(settings, tmp_path, no_report):
    pytest.importorskip("bitsandbytes")
    # bitsandbytes stores the state in 8 bits only for large matrices
    changes = dict(optimizer="adamw8bit", method="full", lr=1e-4, steps=3, samples=0)
    uninterrupted = personalize(settings(**changes))
    assert metrics_of(uninterrupted.path)["optimizer"] == "8-bit AdamW (bitsandbytes)"
    with interrupted_at(1), pytest.raises(TrainingInterrupted, match="checkpoint-1"):
        personalize(settings(**changes, out=str(tmp_path / "cut")))
    run = personalize(DreamBoothConfig.from_flat(out=str(tmp_path / "cut"), resume=True))
    first, second = (load_file(each.adapter / "trainable.safetensors") for each in (uninterrupted, run))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert math.isfinite(metrics_of(run.path)["fixed_loss"]["after"])


@pytest.mark.parametrize("method", ["snella", "lora-8"])
def test_default_learning_rates_give_small_updates(settings, method, no_report):
    run = personalize(settings(method=method, lr=None, scaling=None, steps=4, save_every=4, samples=0))
    model = load_trained(run.adapter, load_pipeline(str(run.read_config().pipeline)).transformer)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    changes = torch.cat([layer.get_delta_weight("default").flatten() for layer in layers])
    weights = torch.cat([layer.get_base_layer().weight.flatten() for layer in layers])
    # matrices are 48 times narrower than in the real model, so the relative update is larger
    assert 1e-4 < changes.norm() / weights.norm() < 0.1


def test_inspect_shows_generation_results_and_redraws_the_report(finished_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    scores = {"concept_alignment": 0.75, "text_alignment": 0.3, "text_alignment_without_token": 0.25}
    (run / "generation.json").write_text(json.dumps({"format": 1, **scores, "vendi": 2.5, "vendi_by_prompt": 1.5}))
    (run / "report.html").unlink()
    assert main(["inspect", str(run), "--report"]) == 0
    text = " ".join(capsys.readouterr().out.replace("\N{NO-BREAK SPACE}", " ").split())
    fixed = metrics_of(run)["fixed_loss"]
    for expected in (
        "16×16 px",
        "4 images of toy, prompt “a photo of sks toy”",
        f"steps {STEPS} in",
        f"loss {fixed['after']:.5f} on fixed noise, {fixed['before']:.4g} before training",
        "concept alignment 0.750, text alignment 0.300",
        "adapted weights (30",
        "report: ",
    ):
        assert expected in text, expected
    assert "classes" not in text and "best epoch" not in text
    assert "Images generated after training" in (run / "report.html").read_text()


def test_python_code_of_the_report_quotes_names_and_paths(finished_run, tmp_path):
    run, name = tmp_path / "it's a run", 'it\'s "my" pipeline'
    shutil.copytree(finished_run, run)
    info = read(RunInfo, run)
    write(replace(info, backbone=replace(info.backbone, name=name)), run)
    page = write_generation_report(run).read_text()
    code = html.unescape(page.partition("<h3>In Python</h3>\n<pre>")[2].partition("</pre>")[0])
    strings = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert strings == [name, str(run / "adapter")]


@pytest.mark.parametrize("args", [["evaluate"], ["predict", "photo.png"], ["merge", "--out", "merged.safetensors"]])
def test_classification_commands_point_to_the_generation_commands(finished_run, capsys, args):
    assert main([args[0], str(finished_run), *args[1:]]) != 0
    assert "got a 'generation' run; snella generate and snella evaluate-generation use it" in capsys.readouterr().err
