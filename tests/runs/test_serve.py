"""A run behind a real HTTP server: answers, limits, and the page in a browser."""

import contextlib
import http.client
import io
import json
import shutil
import signal
import struct
import subprocess
import threading
import urllib.error
import urllib.request
import zlib

import pytest

import snella
from snella.runs.serve import ServerLimits, create_app, serve
from tests.processes import command

pytest.importorskip("python_multipart")
uvicorn = pytest.importorskip("uvicorn")


@pytest.fixture(scope="module")
def model(finished):
    return snella.load(finished.path)


@pytest.fixture(scope="module")
def address(model):
    """A server of its own thread, on a free port."""
    app = create_app(model, ServerLimits(files=3, mib=0.1, megapixels=0.01), unsure=0.999)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        thread.join(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def post(address, files, **headers):
    """Status and JSON of the answer to a form with files."""
    body = io.BytesIO()
    for name, content in files:
        head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
        body.write(head.encode() + content + b"\r\n")
    body.write(b"--x--\r\n")
    request = urllib.request.Request(
        f"{address}/predict", body.getvalue(), {"Content-Type": "multipart/form-data; boundary=x", **headers}
    )
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def bomb(width, height):
    """A PNG whose header says that it is large."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_an_answer_is_what_predict_says(address, model, photos):
    paths = [photos / "cats" / "003.png", photos / "owls" / "001.png"]
    status, answer = post(address, [(path.name, path.read_bytes()) for path in paths])
    assert status == 200
    for entry, path, expected in zip(answer["predictions"], paths, model.predict(paths), strict=True):
        assert (entry["name"], entry["label"], entry["unsure"]) == (
            path.name,
            expected.label,
            expected.probability < 0.999,
        )
        assert entry["probability"] == pytest.approx(expected.probability, abs=1e-5)
        assert list(entry["probabilities"]) == [name for name, _ in expected.ranking]


def test_health_says_what_is_served(address):
    with urllib.request.urlopen(f"{address}/health") as answer:
        health = json.load(answer)
    assert health["status"] == "ok" and health["classes"] == ["cats", "dogs", "owls"]
    assert health["method"] == "snella-2" and health["limits"] == {"files": 3, "mib": 0.1, "megapixels": 0.01}


def test_one_broken_file_does_not_spoil_the_others(address, photos):
    whole = (photos / "cats" / "003.png").read_bytes()
    status, answer = post(address, [("a.txt", b"no image"), ("b.png", whole), ("c.png", whole[:200])])
    first, second, third = answer["predictions"]
    assert status == 200 and "not a readable image" in first["error"] and "not a readable image" in third["error"]
    assert "error" not in second and second["label"] in ("cats", "dogs", "owls")
    assert post(address, [("a.txt", b"no image")])[0] == 422


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bomb(50_000, 50_000), "at most 0.01 million pixels"),
        (bomb(200, 100), "an image must have at most 0.01 million pixels, got 200×100"),
        (b"\0" * 110_000, "a file must have at most 0.1 MiB"),
    ],
)
def test_images_over_the_limits_are_refused_before_they_are_decoded(address, content, message):
    status, answer = post(address, [("x.png", content)])
    assert status == 422 and message in answer["predictions"][0]["error"]


def test_requests_over_the_limits_are_refused(address, photos):
    small = ("a.png", (photos / "cats" / "003.png").read_bytes())
    status, answer = post(address, [small] * 4)
    assert (status, answer) == (413, {"error": "at most 3 files a request, got 4"})
    connection = http.client.HTTPConnection(address.removeprefix("http://"))
    for headers, status, message in (
        ({"Content-Length": "2000000"}, 413, "the request must have at most 1 MiB"),
        ({"Transfer-Encoding": "chunked"}, 411, "the request must say its Content-Length"),
    ):
        connection.putrequest("POST", "/predict")
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()  # before any of the body was sent
        assert (answer.status, json.load(answer)) == (status, {"error": message})
        connection.close()


def test_settings_that_cannot_be_meant_are_refused(finished, model):
    with pytest.raises(ValueError, match="max_files must be positive, got 0; max_mib must be positive, got -1"):
        ServerLimits(files=0, mib=-1)
    with pytest.raises(ValueError, match="tta must be between 1 and 10"):
        create_app(model, tta=11)
    with contextlib.closing(__import__("socket").socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"127\.0\.0\.1:{port} cannot be listened on: .*; give another --port"):
            serve(str(finished.path), port=port)


@pytest.mark.parametrize(("stop", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_process_serves_until_it_is_told_to_stop(stop, status, finished, model, photos):
    path = photos / "cats" / "003.png"
    with command(["serve", str(finished.path), "--port", "0"], stderr=subprocess.PIPE) as process:
        own = process.stdout.readline().partition(" answers at ")[2].partition(",")[0]
        _, answer = post(own, [(path.name, path.read_bytes())])
        assert answer["predictions"][0]["label"] == model.predict(path).label
        process.send_signal(stop)
        said = process.communicate(timeout=120)[1]
    assert process.returncode == status and "Traceback" not in said


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_shows_the_answers_of_dropped_files(address, browser, photos, width, tmp_path):
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
    browser.events.clear()
    browser.call("Page.navigate", url=address)
    while not any(event["method"] == "Page.loadEventFired" for event in browser.events):
        browser._next()
    document = browser.call("DOM.getDocument")["root"]["nodeId"]
    node = browser.call("DOM.querySelector", nodeId=document, selector="#files")["nodeId"]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    browser.call("DOM.setFileInputFiles", nodeId=node, files=[str(photos / "cats" / "003.png"), str(broken)])
    shown = browser.evaluate("""new Promise(done => { const look = () => {
        const items = [...document.querySelectorAll('li')].map(item => item.innerText)
        items.length ? done(items) : setTimeout(look, 50) }; look() })""")
    assert "003.png" in shown[0] and "%" in shown[0] and "cats" in shown[0]
    assert "not a readable image" in shown[1]
    assert "snella-2 on test_vit, 3 outputs: cats, dogs, owls" in browser.evaluate("document.body.innerText")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    browser.screenshot(tmp_path.parent / f"serve-{width}.png")
