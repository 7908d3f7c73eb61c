"""`snella inspect --backbone`: a table of memory without a run."""

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
    assert "predicted from datasheet values, with a range of efficiencies" in text
    assert main(["inspect", "--backbone", "test_convnext", "--batch", "4", "--device", "h100"]) == 0
    text = capsys.readouterr().out
    assert "step, ms" not in text and "step times are predicted for plain ViTs only, got test_convnext" in text


def test_an_unknown_backbone_is_reported(failing):
    assert "unknown backbone 'test_vat'; nearest: 'test_vit'" in failing("inspect", "--backbone", "test_vat")
