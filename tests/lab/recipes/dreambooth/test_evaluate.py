"""Protocol of Table VI on an untrained adapter: generation, scores and errors."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.metrics.pairwise import cosine_similarity

from snella_app.cli.main import main
from snella_app.data.images import read_image
from snella_app.files import sealed
from snella_lab.recipes.dreambooth.config import (
    DreamBoothConfig,
    DreamBoothFolder,
    EvaluateGenerationOptions,
    GenerateOptions,
)
from snella_lab.recipes.dreambooth.evaluate import (
    ClipEmbedder,
    DinoEmbedder,
    evaluate_generation,
    find_runs,
    score_images,
    vendi_score,
)
from snella_lab.recipes.dreambooth.generate import GeneratedImage, generate
from snella_lab.recipes.dreambooth.train import personalize

CPU = torch.device("cpu")


def evaluation(run, clip, dino, **options):
    return EvaluateGenerationOptions(run=str(run), clip=str(clip), dino=str(dino), device="cpu", **options)


def generation(run, out, prompt="sks", **options):
    return GenerateOptions(
        run=str(run), out=str(out), prompt=prompt, device="cpu", **{"images_per_prompt": 1, **options}
    )


PROMPTS = "subject_name,class\ntoy,toy\n\np = [\n'a {0} {1} at sea'\n'{0} {1}'\n]\nq = [\n'a {0} {1} in a hat'\n]\n"


@pytest.fixture(scope="module")
def dataset(subject, tmp_path_factory):
    root = tmp_path_factory.mktemp("dreambooth") / "dataset"
    for name in ("toy", "toy2"):
        shutil.copytree(subject, root / name)
    (root / "prompts_and_classes.txt").write_text(PROMPTS)
    return root


@pytest.fixture(scope="module")
def runs(dataset, pipeline_folder, tmp_path_factory):
    """Train two runs of one step in the same folder."""
    root = tmp_path_factory.mktemp("runs")
    settings = dict(resolution=16, steps=1, accumulation=1, samples=0, sample_steps=1, max_sequence_length=24)
    for name in ("toy", "toy2"):
        personalize(
            DreamBoothConfig.from_flat(
                data=f"dreambooth:{dataset}",
                subject=name,
                class_name="toy",
                pipeline=str(pipeline_folder),
                out=str(root / name),
                method="lora-2",
                device="cpu",
                seed=len(name),
                **settings,
            )
        )
    return root


@pytest.fixture(scope="module")
def embedders(clip_folder, dino_folder):
    return ClipEmbedder(str(clip_folder), CPU), DinoEmbedder(str(dino_folder), CPU)


def test_every_prompt_is_generated_scored_and_reused(
    runs, subject, clip_folder, dino_folder, embedders, tmp_path, capsys
):
    args = ["--clip", str(clip_folder), "--dino", str(dino_folder), "--images-per-prompt", "2", "--device", "cpu"]
    assert main(["evaluate-generation", str(runs), *args, "--out", str(tmp_path / "table.json")]) == 0
    printed = capsys.readouterr().out
    assert "concept alignment" in printed and "standard error" in printed
    results = json.loads((tmp_path / "table.json").read_text())
    row = results["runs"][0]
    assert (row["subject"], row["method"], row["images"]) == ("toy", "lora-2", 4)
    manifest = json.loads((runs / "toy" / "evaluation" / "images.json").read_text())
    prompts = [entry["prompt"] for entry in manifest["images"]]
    assert prompts == ["a sks toy at sea"] * 2 + ["sks toy"] * 2
    clip, dino = embedders
    images = [read_image(runs / "toy" / "evaluation" / entry["file"]) for entry in manifest["images"]]
    concept = [read_image(path) for path in sorted(subject.iterdir())]
    cosines = cosine_similarity(clip.images(images), clip.images(concept))
    assert row["concept_alignment"] == pytest.approx(cosines.mean())
    assert row["vendi"] == pytest.approx(vendi_score(dino.images(images)))
    pairs = [
        torch.cosine_similarity(clip.images([image]), clip.texts([p])).item()
        for image, p in zip(images, prompts, strict=True)
    ]
    assert row["text_alignment"] == pytest.approx(sum(pairs) / 4)
    plain = [prompt.replace("sks ", "") for prompt in prompts]
    pairs = [
        torch.cosine_similarity(clip.images([image]), clip.texts([p])).item()
        for image, p in zip(images, plain, strict=True)
    ]
    assert row["text_alignment_without_token"] == pytest.approx(sum(pairs) / 4)
    values = [each["vendi"] for each in results["runs"]]
    assert results["mean"]["vendi"] == pytest.approx(sum(values) / 2)
    assert results["standard_error"]["vendi"] == pytest.approx(abs(values[0] - values[1]) / 2)
    times = {path: path.stat().st_mtime_ns for path in (runs / "toy" / "evaluation").iterdir()}
    rerun = evaluate_generation(evaluation(runs / "toy", clip_folder, dino_folder, images_per_prompt=2, batch_size=2))
    assert json.loads((runs / "toy" / "generation.json").read_text())["drawing"]["batch_size"] == 2
    assert times == {path: path.stat().st_mtime_ns for path in (runs / "toy" / "evaluation").iterdir()}
    assert rerun["mean"]["vendi"] == row["vendi"] and rerun["standard_error"]["vendi"] is None


def test_equal_images_have_the_diversity_of_one(embedders, tmp_path):
    images = []
    for number in range(4):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (20, 20), (200, 40 + 100 * (number // 2), 40)).save(path)
        images.append(GeneratedImage(path, f"prompt {number // 2}", number % 2))
    concept = [read_image(images[0].path)]
    scores = score_images(images[:2], concept, ["toy"] * 2, *embedders)
    assert scores["concept_alignment"] == pytest.approx(1.0, abs=1e-6)
    assert scores["vendi"] == scores["vendi_by_prompt"] == pytest.approx(1.0, abs=1e-3)
    scores = score_images(images, concept, ["toy"] * 4, *embedders)
    assert scores["vendi_by_prompt"] == pytest.approx(1.0, abs=1e-3) and scores["vendi"] > scores["vendi_by_prompt"]


def test_prompts_come_from_the_option_or_a_file(runs, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("{token} {class} on a tray\n")
    (image,) = generate(generation(runs / "toy", tmp_path / "images", None, prompts=str(file)))
    assert image.prompt == "sks toy on a tray"
    for prompt, prompts, shown in ((None, None, "neither"), ("a", "b.txt", "both")):
        with pytest.raises(ValueError, match=f"must be set, got {shown}; pass e.g. --prompt"):
            generation(runs / "toy", "images", prompt, prompts=prompts)


def test_other_images_are_not_overwritten(runs, tmp_path):
    out = tmp_path / "out"
    generate(generation(runs / "toy", out))
    with pytest.raises(
        FileExistsError,
        match=r"out=.*out contains images generated with different settings and different prompts or seeds; ch",
    ):
        generate(generation(runs / "toy", out, "sks sks", steps=2))
    with pytest.raises(
        FileExistsError,
        match="contains images generated with a different pipeline or adapter; choose another folder",
    ):
        generate(generation(runs / "toy2", out))
    pipeline = shutil.copytree(DreamBoothFolder(runs / "toy").read_config().pipeline, tmp_path / "pipeline")
    with pytest.raises(
        FileExistsError,
        match="contains images generated with a different pipeline or adapter; choose another folder",
    ):
        generate(generation(runs / "toy", out, pipeline=str(pipeline)))
    (out / "best.png").write_bytes(b"mine")
    generate(generation(runs / "toy", out, seed=7, overwrite=True))
    assert sorted(path.name for path in out.iterdir()) == ["00-7.png", "best.png", "images.json"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("mine")
    (tmp_path / "mine" / "images.json").write_text('{"images": []}')
    with pytest.raises(FileExistsError, match="mine contains other files; choose an empty or new folder"):
        generate(generation(runs / "toy", tmp_path / "mine", overwrite=True))
    with pytest.raises(FileExistsError, match=r"out must be a folder, got the file .*letter.txt"):
        generate(generation(runs / "toy", tmp_path / "mine" / "letter.txt"))


def test_invalid_numbers_and_folders_are_rejected(tmp_path):
    with pytest.raises(
        ValueError, match=r"images_per_prompt must be at least 1, got 0; .*steps must be at least 1, got 0"
    ):
        generation("run", "out", images_per_prompt=0, steps=0)
    with pytest.raises(ValueError, match="images_per_prompt must be at least 1, got -1"):
        evaluation("runs", "clip", "dino", images_per_prompt=-1)
    message = r"run must be a run folder created by `snella dreambooth`, or a folder of such runs, got"
    with pytest.raises(FileNotFoundError, match=message):
        find_runs(tmp_path)
    with pytest.raises(ValueError, match="guidance must be at least 0 and finite, got -1"):
        generation("run", "out", guidance=-1)
    for name in ("run.json", "config.yaml"):
        shutil.copy(Path(__file__).parents[3] / "old_files" / "run" / name, tmp_path)
    for call in (
        lambda: generate(generation(tmp_path, tmp_path / "out")),
        lambda: evaluate_generation(evaluation(tmp_path, "clip", "dino")),
    ):
        message = r"must be a run folder created by `snella dreambooth`, got .*, a run of another task"
        with pytest.raises(ValueError, match=message):
            call()


def test_folder_without_the_expected_model_is_rejected(runs, clip_folder, dino_folder, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"clip must be a folder in transformers format, .* has no CLIPModel"):
        ClipEmbedder(str(tmp_path), CPU)
    with pytest.raises(FileNotFoundError, match=r"dino must be .* has no Dinov2Model"):
        DinoEmbedder(str(tmp_path), CPU)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConnectionError, match=r"clip must be .*, got 'nobody/clip': it is not cached, and the hub is unreachable"
    ):
        ClipEmbedder("nobody/clip", CPU)


def test_run_on_a_plain_folder_requires_a_prompt_file(runs, tmp_path, clip_folder, dino_folder):
    run = shutil.copytree(runs / "toy", tmp_path / "run")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("data: dreambooth:", "data: folder:"))
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(sealed({**info, "files": {}})))
    with pytest.raises(FileNotFoundError, match=r"prompts must name a prompt file, because folder:.* has no prompts_"):
        evaluate_generation(evaluation(run, clip_folder, dino_folder))


def test_vendi_score_is_between_one_and_the_number_of_images(embedders, subject):
    score = vendi_score(embedders[1].images([read_image(path) for path in sorted(subject.iterdir())]))
    assert 1.0 < score < 4.0 and math.isfinite(score)
