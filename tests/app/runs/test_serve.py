"""A run behind a real HTTP server: responses, limits, and the page in a browser."""

import contextlib
import http.client
import io
import json
import math
import re
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
from snella_app.runs.serve import ServerLimits, create_app, serve
from tests.processes import command

pytest.importorskip("python_multipart")
uvicorn = pytest.importorskip("uvicorn")


@pytest.fixture(scope="module")
def model(finished):
    return snella.load(finished.path)


@pytest.fixture(scope="module")
def address(model):
    """Address of a server with small limits."""
    limits = ServerLimits(files=3, mib=0.1, megapixels=0.01, total_megapixels=0.04)
    app = create_app(model, limits, unsure=0.999, hosts=["photos.example.org"], log=LOG.append)
    with served(app) as address:
        yield address


@contextlib.contextmanager
def served(app):
    """Run an application in a thread, on a free port."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        thread.join(0.05)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


LOG = []


def post(address, files, field="files", query="", **headers):
    """Post a form with files; return status and JSON."""
    body = io.BytesIO()
    for name, content in files:
        head = f'--x\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'
        body.write(head.encode() + content + b"\r\n")
    body.write(b"--x--\r\n")
    request = urllib.request.Request(
        f"{address}/predict{query}", body.getvalue(), {"Content-Type": "multipart/form-data; boundary=x", **headers}
    )
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def bomb(width, height):
    """PNG with a large size in its header."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_responses_match_predict(any_run, photos):
    model = snella.load(any_run.path)
    paths = [photos / "cats" / "003.png", photos / "owls" / "001.png"]
    with served(create_app(model, unsure=0.999)) as address:
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


def test_health_returns_model_and_limits(address):
    with urllib.request.urlopen(f"{address}/health") as answer:
        health = json.load(answer)
    assert health["status"] == "ok" and health["classes"] == ["cats", "dogs", "owls"]
    assert health["method"] == "snella-2" and health["limits"] == {
        "files": 3,
        "mib": 0.1,
        "megapixels": 0.01,
        "total_megapixels": 0.04,
    }


def test_a_broken_file_does_not_affect_others(address, photos):
    content = (photos / "cats" / "003.png").read_bytes()
    status, answer = post(address, [("a.txt", b"no image"), ("b.png", content), ("c.png", content[:200])])
    first, second, third = answer["predictions"]
    assert status == 200 and "not a readable image" in first["error"] and "not a readable image" in third["error"]
    assert "error" not in second and second["label"] in ("cats", "dogs", "owls")
    assert post(address, [("a.txt", b"no image")])[0] == 422
    assert post(address, [("a.png", b"")])[1]["predictions"] == [{"name": "a.png", "error": "the file is empty"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bomb(50_000, 50_000), "at most 0.01 million pixels"),
        (bomb(200, 100), "an image must have at most 0.01 million pixels, got 200×100"),
        (b"\0" * 110_000, "a file must have at most 0.1 MiB"),
    ],
)
def test_images_over_the_limits_are_rejected_before_they_are_decoded(address, content, message):
    status, answer = post(address, [("x.png", content)])
    assert status == 422 and message in answer["predictions"][0]["error"]


def test_requests_over_the_limits_are_rejected(address, photos):
    small = ("a.png", (photos / "cats" / "003.png").read_bytes())
    status, answer = post(address, [small] * 4)
    assert (status, answer) == (413, {"error": "a request must have at most 3 files, got 4"})
    connection = http.client.HTTPConnection(address.removeprefix("http://"))
    for headers, status, message in (
        ({"Content-Length": "2000000"}, 413, "the request must have at most 0.153 MiB"),
        ({"Transfer-Encoding": "chunked"}, 411, "the request must have a Content-Length header"),
        (
            {"Content-Length": "10", "Transfer-Encoding": "chunked"},
            411,
            "the request must have a Content-Length header",
        ),
    ):
        connection.putrequest("POST", "/predict")
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()  # before the body is sent
        assert (answer.status, json.load(answer)) == (status, {"error": message})
        connection.close()


def test_pixels_of_all_requests_are_limited(model, photos, monkeypatch):
    """One request waits in the model; a second one exceeds the budget and gets 503, later 200."""
    inside, resume, original = threading.Event(), threading.Event(), type(model).iter_predictions

    def slow(self, *args, **kwargs):
        inside.set()
        assert resume.wait(60)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "iter_predictions", slow)
    small = [("a.png", (photos / "cats" / "003.png").read_bytes())] * 2
    with served(create_app(model, ServerLimits(megapixels=0.003, total_megapixels=0.0045))) as address:
        answers = []
        first = threading.Thread(target=lambda: answers.append(post(address, small)))
        first.start()
        assert inside.wait(60)
        status, answer = post(address, small)
        assert (status, answer) == (
            503,
            {"error": "the server is busy with other requests; retry in a second"},
        )
        resume.set()
        first.join()
        assert answers[0][0] == 200 and post(address, small)[0] == 200
        status, answer = post(address, small * 2)
        assert status == 413 and "a request must have at most 0.0045 million pixels, got 0." in answer["error"]
        assert answer["error"].endswith("; each byte counts as a quarter of a pixel; send fewer images per request")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:80", 200),
        ("localhost", 200),
        ("[::1]:8000", 200),
        ("photos.example.org", 200),
        ("evil.test:8000", 400),
    ],
)
def test_unknown_hosts_are_rejected(address, host, status):
    connection = http.client.HTTPConnection(address.removeprefix("http://"))
    connection.request("GET", "/health", headers={"Host": host})
    answer = connection.getresponse()
    body = json.load(answer)
    assert answer.status == status
    if status == 400:
        assert body == {"error": f"Host must be an address or a name of this server, got {host!r}; add it with --hosts"}
    connection.close()


def test_responses_have_security_headers(address):
    with urllib.request.urlopen(f"{address}/") as answer:
        policy = answer.headers["Content-Security-Policy"]
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "frame-ancestors 'none'" in policy
    with urllib.request.urlopen(f"{address}/docs") as answer:
        assert "swagger" in answer.read().decode() and answer.headers["X-Content-Type-Options"] == "nosniff"


def test_a_form_without_files_names_the_field(address, photos):
    small = ("a.png", (photos / "cats" / "003.png").read_bytes())
    expected = f"images must be files in the form field 'files', got 'file'; curl -F files=@photo.jpg {address}/predict"
    assert post(address, [small], field="file") == (422, {"error": expected})
    assert "got no field; curl" in post(address, [])[1]["error"]
    body = b'--x\r\nContent-Disposition: form-data; name="files"\r\n\r\na.png\r\n--x--\r\n'
    request = urllib.request.Request(f"{address}/predict", body, {"Content-Type": "multipart/form-data; boundary=x"})
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request)
    assert "got text instead of a file in 'files'; curl -F files=@photo.jpg" in json.load(error.value)["error"]
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"{address}/nowhere")
    assert json.load(error.value) == {"error": "Not Found; available: /, /health, /docs and POST /predict"}


def test_query_parameters_are_rejected(address, photos):
    small = ("a.png", (photos / "cats" / "003.png").read_bytes())
    expected = "the URL must have no query parameters, got 'tta', 'top_k'; set options when starting snella serve"
    assert post(address, [small], query="?tta=4&top_k=1") == (422, {"error": expected})


def test_each_response_is_logged(address, photos):
    LOG.clear()
    post(address, [("a.png", (photos / "cats" / "003.png").read_bytes())])
    assert len(LOG) == 1 and re.fullmatch(r"\d\d:\d\d:\d\d 127\.0\.0\.1 POST /predict 200 \d+ ms", LOG[0])


def test_postscript_starts_no_program(address):
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    status, answer = post(address, [("a.png", content)])
    assert status == 422 and answer["predictions"][0]["error"].endswith("unknown image format")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"port": 80000}, ValueError, r"port must be from 0 \(any free port\) to 65535, got 80000"),
        ({"port": -1}, ValueError, r"port must be from 0 \(any free port\) to 65535, got -1"),
        ({"host": "no such host"}, OSError, "host must be an address of this machine, got 'no such host'; use 127"),
        (
            {"host": "192.0.2.1"},
            OSError,
            r"192\.0\.2\.1:8000 is not an address of this machine; use --host 127\.0\.0\.1",
        ),
    ],
)
def test_an_unavailable_address_is_a_one_line_error(options, error, message, finished):
    with pytest.raises(error, match=message):
        serve(str(finished.path), **options)


def test_invalid_settings_are_rejected(finished, model):
    with pytest.raises(ValueError, match=r"max_files must be positive and finite, got 0; max_mib must be .* got inf"):
        ServerLimits(files=0, mib=math.inf)
    with pytest.raises(ValueError, match="max_files must be at most 1000, got 2000"):
        ServerLimits(files=2000)
    with pytest.raises(ValueError, match="max_total_megapixels must be at least max_megapixels, 50, got 40"):
        ServerLimits(total_megapixels=40)
    with pytest.raises(ValueError, match="tta must be between 1 and 10"):
        create_app(model, tta=11)
    with contextlib.closing(__import__("socket").socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = rf"127\.0\.0\.1:{port} is in use; choose another --port, or 0 for a free one"
        with pytest.raises(OSError, match=message):
            serve(str(finished.path), port=port)


@pytest.mark.parametrize(("stop", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_process_serves_until_it_is_stopped(stop, status, finished, model, photos):
    path = photos / "cats" / "003.png"
    with command(["serve", str(finished.path), "--port", "0"], stderr=subprocess.PIPE) as process:
        address = process.stdout.readline().partition(" at ")[2].partition(",")[0]
        _, answer = post(address, [(path.name, path.read_bytes())])
        assert answer["predictions"][0]["label"] == model.predict(path).label
        process.send_signal(stop)
        stderr = process.communicate(timeout=120)[1]
    assert process.returncode == status and "Traceback" not in stderr


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_shows_predictions_of_dropped_files(address, browser, photos, width, tmp_path):
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
    text = browser.evaluate("document.body.innerText")
    assert "3 classes: cats, dogs, owls. Model: snella-2 on test_vit." in text
    assert "up to 3 images per request, each up to 0.1 MiB and 0.01 million pixels" in text
    assert f"curl -F files=@photo.jpg {address}/predict" in text and '"label": "cats"' in text
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    browser.evaluate("document.getElementById('example').click()")
    shown = browser.evaluate("""new Promise(done => { const look = () => {
        const item = document.querySelector('li'), text = item.innerText
        text.includes('example.png') ? done(text) : setTimeout(look, 50) }; look() })""")
    assert "%" in shown
    assert not browser.issues()  # of the content policy
    # numeric names, which JavaScript reorders
    answer = '{name: "x", probabilities: {"7": .6, "0": .1, "1": .3}}'
    bars = f"[...renderPrediction(new Blob(), {answer}).querySelectorAll('.bar span')].map(name => name.textContent)"
    assert browser.evaluate(bars) == ["7", "1", "0"]
    browser.screenshot(tmp_path.parent / f"serve-{width}.png")
