"""`snella inspect --backbone`: a table of memory without a run."""

import pytest

from snella_app.cli.main import main


def test_a_backbone_prints_one_row_per_method_without_writing_files(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["inspect", "--backbone", "test_vit", "--batch", "4", "--img-size", "32", "--r", "2", "--device", "cuda"]
    assert main(args) == 0
    text = capsys.readouterr().out
    assert "Training step of test_vit: 4 images of 32×32 px, fp32, AdamW, on cuda" in text
    assert all(word in text for word in ("snella-2", "lora-2", "full", "saved for backward", "largest temporary"))
    assert not list(tmp_path.iterdir())


def test_a_gpu_adds_predicted_steps_for_plain_vits(capsys):
    assert main(["inspect", "--backbone", "test_vit", "--batch", "4", "--dtype", "bf16", "--device", "h100"]) == 0
    text = capsys.readouterr().out
    assert "bf16, AdamW, on H100 SXM" in text and "step, ms" in text
    assert "predicted from datasheet values, not measured" in text
    assert main(["inspect", "--backbone", "test_convnext", "--batch", "4", "--device", "h100"]) == 0
    text = capsys.readouterr().out
    assert "step, ms" not in text and "step times are predicted for plain ViTs only, got test_convnext" in text


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ([], "inspect takes either RUN, a run folder, or --backbone NAME, got neither"),
        (["r", "--backbone", "test_vit"], "or --backbone NAME, got RUN r and --backbone test_vit"),
        (["r", "--batch", "4", "--img-size", "32"], "--batch 4, --img-size 32 can only be used with --backbone NAME"),
        (["--backbone", "test_vit", "--report"], "--report needs a run; leave it out with --backbone"),
        (["--backbone", "test_vit", "--batch", "0", "--r", "-1"], "--batch must be at least 1, got 0; --r must be at"),
        (["--backbone", "test_vat"], "unknown backbone 'test_vat'; nearest: 'test_vit'"),
        (["--backbone", "test_vit", "--dtype", "fp16"], "--dtype must be one of fp32, bf16, got fp16"),
    ],
)
def test_conflicting_arguments_are_one_error(args, line, failing):
    assert line in failing("inspect", *args)
