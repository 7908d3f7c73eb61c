"""Pushing: hub folder, hub requests, and the unreachable hub."""

import json
import shutil

import pytest
import timm
import torch
import yaml
from huggingface_hub.errors import HfHubHTTPError
from rich.console import Console

import snella
from snella_app.cli.main import main
from snella_app.runs import RunFolder, load_run
from snella_app.runs.push import PushResult, push, write_hub_folder


class Hub:
    """Record requests to the Hugging Face Hub; `status` is its error status."""

    calls: list = []
    status = None

    def create_repo(self, name, *, private, exist_ok):
        if self.status:
            response = type("Response", (), {"status_code": self.status, "headers": {}, "request": None})()
            raise HfHubHTTPError("refused", response=response)
        self.calls.append(("create", name, private, exist_ok))
        return f"https://huggingface.co/{name}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.calls.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir())))


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    return Hub


def test_a_folder_has_the_model_that_timm_loads_and_its_card(finished, tmp_path):
    folder = write_hub_folder(finished.path, tmp_path / "the hub's", "user/photos")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    card = (folder / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "timm" and head["model-index"][0]["name"] == "user/photos"
    assert "timm.create_model('hf-hub:user/photos', pretrained=True)" in card and str(tmp_path) not in card
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(images), load_run(finished.path).model(images))
    temperature = json.loads((folder / "config.json").read_text())["temperature"]
    assert f"(logits / {temperature:g}).softmax(-1)" in card
    with pytest.raises(FileExistsError, match=r"to_folder=.*hub's is not empty; choose a new folder"):
        write_hub_folder(finished.path, folder, "user/photos")


def test_an_adapter_is_pushed_in_peft_layout(finished, tmp_path, monkeypatch):
    pushed = push(finished.path, "user/photos", to_folder=tmp_path / "hub", adapter=True)
    names = {path.name for path in (tmp_path / "hub").iterdir()}
    assert pushed == PushResult(str(tmp_path / "hub"))
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= names
    assert yaml.safe_load((tmp_path / "hub" / "README.md").read_text().split("---")[1])["library_name"] == "peft"
    run = shutil.copytree(finished.path, tmp_path / "run")
    (run / "adapter" / "adapter_config.json").unlink()
    monkeypatch.setattr(RunFolder, "check_adapter", lambda self: None)  # as for a method without PEFT adapter
    with pytest.raises(ValueError, match="adapter=True pushes a PEFT adapter, which runs of snella-2 lack"):
        push(run, "user/photos", to_folder=tmp_path / "other", adapter=True)


def test_the_hub_gets_a_new_model_and_its_files(finished, hub):
    pushed = push(finished.path, "user/photos", private=True)
    assert pushed == PushResult("https://huggingface.co/user/photos")
    assert hub.calls == [
        ("create", "user/photos", True, False),
        ("upload", "user/photos", ["README.md", "config.json", "model.safetensors"]),
    ]
    assert not finished.path.with_name("run-hub").exists()


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (
            409,
            FileExistsError,
            "name=user/photos already exists on the Hugging Face Hub; choose another name, or add a commit with",
        ),
        (401, PermissionError, "no write permission for name=user/photos; run `hf auth login`"),
    ],
)
def test_an_existing_or_foreign_repository_is_rejected(finished, hub, monkeypatch, status, error, message):
    monkeypatch.setattr(hub, "status", status)
    with pytest.raises(error, match=message):
        push(finished.path, "user/photos")
    assert hub.calls == [] and not finished.path.with_name("run-hub").exists()


def test_an_unreachable_hub_leaves_the_folder_with_the_reason(finished, monkeypatch, tmp_path):
    run = shutil.copytree(finished.path, tmp_path / "run")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    pushed = push(run, "user/photos")
    assert pushed.location == str(tmp_path / "run-hub") and "offline" in pushed.error.lower()
    assert (tmp_path / "run-hub" / "README.md").is_file()
    with pytest.raises(FileExistsError, match=r"the Hub could not be reached \(.*\), and .*run-hub exists; remove it"):
        push(run, "user/photos")


def test_a_failed_connection_leaves_the_folder_with_the_reason(finished, monkeypatch, tmp_path):
    run = shutil.copytree(finished.path, tmp_path / "run")
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # other tests may import it offline
    pushed = push(run, "user/photos")
    assert pushed.location == str(tmp_path / "run-hub") and "refused" in pushed.error
    assert (tmp_path / "run-hub" / "README.md").is_file()


def test_an_invalid_repository_name_is_rejected(finished, tmp_path):
    with pytest.raises(ValueError, match="on the Hugging Face Hub such as user/photos, got 'my photos!'"):
        push(finished.path, "my photos!", to_folder=tmp_path / "hub")


def test_the_card_of_a_run_without_timm_folder_names_the_files_of_the_repository(tmp_path):
    digits = {"data": "digits", "backbone": "test_vit", "pretrained": False, "img_size": 32, "device": "cpu"}
    options = {"train_size": 60, "test_size": 20, "epochs": 1, "task": "ordinal", "protocol": "final"}
    run = snella.train(
        **digits, **options, method="linear", batch_size=20, out=tmp_path / "run", console=Console(quiet=True)
    )
    card = (write_hub_folder(run.path, tmp_path / "hub", "user/digits") / "README.md").read_text()
    assert str(tmp_path / "hub") not in card
    for name in ("model.safetensors", "model.layer_probe.safetensors"):
        assert name in card and (tmp_path / "hub" / name).is_file()


def test_the_command_for_a_later_upload_keeps_the_repository_private(finished, monkeypatch, tmp_path, capsys):
    run = shutil.copytree(finished.path, tmp_path / "my run")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["push", str(run), "user/photos", "--private"]) == 0
    assert f"later: hf upload user/photos '{run}-hub' --private\n" in capsys.readouterr().out


def test_a_file_is_no_folder_for_a_repository(finished, tmp_path):
    (tmp_path / "hub").touch()
    with pytest.raises(FileExistsError, match=r"to_folder=.*hub is a file; choose a new folder"):
        write_hub_folder(finished.path, tmp_path / "hub", "user/photos")


def test_a_repository_name_needs_a_namespace(finished, hub):
    with pytest.raises(ValueError, match="user/photos, got 'photos': the user or organization is missing"):
        push(finished.path, "photos")
    assert not hub.calls


def test_the_folder_of_a_repository_has_no_suffix(finished, tmp_path):
    with pytest.raises(ValueError, match=r"to_folder must be a folder, got '.*photos\.safetensors'"):
        write_hub_folder(finished.path, tmp_path / "photos.safetensors", "user/photos")
