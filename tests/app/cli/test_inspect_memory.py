"""`snella inspect --backbone`: a table of memory without a run."""

import pytest

from snella_app.cli.main import main
from snella_lab.bench.machines import GpuForecast, shape_of_backbone


def test_a_backbone_prints_one_row_per_method_without_writing_files(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["inspect", "--backbone", "test_vit", "--batch", "4", "--img-size", "32", "--r", "2", "--device", "cuda"]
    assert main(args) == 0
    text = capsys.readouterr().out
    assert "Training step of test_vit: 4 images of 32×32 px, fp32, AdamW, on cuda" in text
    assert all(word in text for word in ("snella-2", "lora-2", "full", "saved for backward", "largest temporary"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("gpu", "name"), [("h100", "H100 SXM"), ("h200", "H200 SXM")])
def test_a_gpu_adds_predicted_steps_for_plain_vits(gpu, name, capsys):
    assert main(["inspect", "--backbone", "test_vit", "--batch", "4", "--dtype", "bf16", "--device", gpu]) == 0
    text = capsys.readouterr().out
    assert f"bf16, AdamW, on {name}" in text and "step, ms" in text
    assert "step is predicted, not measured: datasheet values with a range of efficiencies" in text
    assert main(["inspect", "--backbone", "test_convnext", "--batch", "4", "--device", "h100"]) == 0
    text = capsys.readouterr().out
    assert "step, ms" not in text and "step times are available only for plain ViTs, not for test_convnext" in text


@pytest.mark.parametrize(("r", "dtype"), [(8, "bf16"), (32, "bf16"), (8, "fp32")])
def test_a_gpu_adds_ratio_to_lora_share_of_merging_and_crossing(capsys, r, dtype):
    args = ["inspect", "--backbone", "test_vit", "--batch", "64", "--device", "l4", "--dtype", dtype, "--r", str(r)]
    assert main(args) == 0
    text = " ".join(capsys.readouterr().out.split())
    forecast = GpuForecast("l4", shape_of_backbone("test_vit"), 64, r, dtype)
    low, expected, high = forecast.ratio("snella")
    assert f"snella takes {expected:.2f} ({low:.2f}–{high:.2f}) times as long as lora" in text
    assert f"merging takes {forecast.merge_share:.0%} of its step" in text
    tokens = forecast.shape.tokens
    assert f"below {forecast.crossing:,} tokens per step (batch size {forecast.crossing // tokens}), LoRA" in text
    assert "sparsity does not change the step time on GPUs" in text


def test_an_unknown_backbone_is_reported(failing):
    assert "unknown backbone 'test_vat'; nearest: 'test_vit'" in failing("inspect", "--backbone", "test_vat")
