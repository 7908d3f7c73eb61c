"""Fault-injection groups with untrusted input: exchanged, forged or oversized files, code and markup.

Each function takes the harness and counts one result per trial; `faults.py` describes the groups.
"""

import functools
import io
import json
import os
import random
import resource
import shutil
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import urllib3
import yaml
from fault_harness import TINY, Child, Harness, fork, outcome, tiny_without
from PIL import Image

from snella_app.cli.main import main
from snella_app.files import sealed, write_text
from snella_app.training.checkpoints import latest_checkpoint

MAX_BYTES = 8 * 2**30
START_S = 60
_LINK_TARGET = "mine"
"""Name and content of a file outside the run that no command may modify."""
MARKUP = (
    "<img src=x onerror=window.hit=1>",
    "<b onmouseover=window.hit=1>b",
    "'\"><svg onload=window.hit=1>",
    "& &lt;",
)
"""Class and file names that pages must escape."""


def exchanged(harness: Harness) -> None:
    """Copy files from another unfinished run, edit settings, add unlisted files or link the lock file; then resume."""
    for number, draw, folder in harness.trials("exchanged"):
        run = shutil.copytree(harness.unfinished, folder / "run", symlinks=True)
        description = _MODIFICATIONS[number % len(_MODIFICATIONS)](draw, run, harness.unfinished_other)
        result = fork(functools.partial(main, ["train", "--out", str(run), "--resume"]))
        target = folder / _LINK_TARGET
        if target.exists() and target.read_text() != _LINK_TARGET:
            harness.count("exchanged", "other results", description, result.text)
        else:
            harness.count_command("exchanged", description, result, lambda run=run: outcome(run) == harness.expected)


def _replace_checkpoints(draw: random.Random, run: Path, other: Path) -> str:
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(other / "checkpoints", run / "checkpoints")
    return "checkpoints of another run"


def _replace_files(draw: random.Random, run: Path, other: Path) -> str:
    names = draw.choice([("config.yaml",), ("run.json",), ("config.yaml", "run.json")])
    for name in names:
        shutil.copy(other / name, run / name)
    return f"{' and '.join(names)} of another run"


def _edit_settings(draw: random.Random, run: Path, other: Path) -> str:
    path = run / "config.yaml"
    values = yaml.safe_load(path.read_text())
    numbers = [("label_smoothing", 0.3), ("seed", 5), ("epochs", 0), ("epochs", 7), ("r", -1)]
    name, value = draw.choice([*numbers, ("lr", "x"), ("augment", "none")])
    path.write_text(yaml.safe_dump({**values, name: value}))
    return f"{name}: {value} in config.yaml"


def _add_unlisted_file(draw: random.Random, run: Path, other: Path) -> str:
    name = draw.choice(["scaler.pt", "pytorch_model.bin", "adapter_model.bin", "scheduler_2.pt"])
    checkpoint = latest_checkpoint(run / "checkpoints")
    (checkpoint / name).write_bytes(b"\x80\x04." if draw.random() < 0.5 else (checkpoint / "optimizer.pt").read_bytes())
    return f"{name} in the checkpoint"


def _link_lock(draw: random.Random, run: Path, other: Path) -> str:
    (run.parent / _LINK_TARGET).write_text(_LINK_TARGET)
    (run / ".lock").unlink(missing_ok=True)
    (run / ".lock").symlink_to(run.parent / _LINK_TARGET)
    return ".lock is a symbolic link"


_MODIFICATIONS = (_replace_checkpoints, _replace_files, _edit_settings, _add_unlisted_file, _link_lock)


def forged(harness: Harness) -> None:
    """Change values in `run.json` or the adapter settings of a finished run, with valid hashes."""
    odd_values = [None, -1, 0, 7, 10**9, "x", "", [], {}, [1, 2], 0.5, True, [0.5] * 5, ["a"] * 3, {"a": 1}]
    for _, draw, folder in harness.trials("forged"):
        run = shutil.copytree(harness.finished, folder / "run", symlinks=True)
        values = json.loads((run / "run.json").read_text())
        if draw.random() < 0.6:
            part = draw.choice([values, values["backbone"], values["data"], values["data_config"]])
            name = draw.choice(sorted(part))
            value = draw.choice(odd_values)
            part[name] = value
        else:
            path = run / "adapter" / "adapter_config.json"
            settings = json.loads(path.read_text())
            name, value = draw.choice([*sorted(settings), "trainable_token_indices"]), draw.choice(odd_values)
            path.write_text(json.dumps({**settings, name: value}))
            values["files"] = {}
        (run / "run.json").write_text(json.dumps(sealed(values)))
        argv = ["predict", str(run), str(harness.images), "--out", str(folder / "p.csv")]
        result = fork(functools.partial(_run_with_memory_limit, argv))
        harness.count_command("forged", f"{name}: {value!r}", result, lambda: True)


def _run_with_memory_limit(argv: list[str]) -> int:
    """Run a command with a memory limit."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    return main(argv)


def objects(harness: Harness) -> None:
    """Pass YAML that constructs Python objects to every command that reads YAML."""
    for number, _, folder in harness.trials("objects"):
        marker = folder / "executed"
        text = f"!!python/object/apply:os.system ['touch {marker}']"
        run, file = folder / "run", folder / "x.yaml"
        if number % 3 == 0:
            run = shutil.copytree(harness.unfinished, run, symlinks=True)
            (run / "config.yaml").write_text(text)
            argv = ["train", "--out", str(run), "--resume"]
        elif number % 3 == 1:
            file.write_text(f"data: {text}\n")
            argv = ["train", "--config", str(file), "--out", str(run)]
        else:
            file.write_text(text)
            argv = [*TINY, "--class-weights", str(file), "--out", str(run)]
        result = fork(functools.partial(main, argv))
        if marker.exists():
            harness.count("objects", "executed", " ".join(argv), result.text)
        else:
            harness.count_command("objects", " ".join(argv), result, lambda: True)


def _png_chunk(kind: bytes, content: bytes) -> bytes:
    """Return a chunk of a PNG file with its length and checksum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def make_png(width: int, height: int, content: bytes | None = None) -> bytes:
    """Return a PNG with this size in its header; pixels are black by default."""
    if content is None:
        packer = zlib.compressobj(9)
        content = b"".join(packer.compress(bytes(3 * width + 1)) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", content), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(kind, part) for kind, part in parts)


def _npy_header(shape: tuple[int, ...]) -> bytes:
    """Return a NumPy file with this shape in its header and no data."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"shape": shape, "fortran_order": False, "descr": "|u1"})
    return out.getvalue()


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def bombs(harness: Harness) -> None:
    """Read decompression bombs and PostScript in image folders, mask folders and prediction input."""
    contents: list[tuple[str, Callable[[], bytes]]] = [
        ("a header of 60,000 × 60,000", lambda: make_png(60_000, 60_000, zlib.compress(b"\0"))),
        ("PostScript", lambda: POSTSCRIPT),
        ("an array of 60,000 × 60,000 × 3", lambda: _npy_header((60_000, 60_000, 3))),
        ("a compressed text of 1 GiB", _text_bomb),
    ]
    for number, _, folder in harness.trials("bombs"):
        program, marker = folder / "bin" / "gs", folder / "executed"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\n[ "$1" = --version ] || touch {marker}\n')
        program.chmod(0o755)
        description, make = contents[number % len(contents)]
        masks = number // len(contents) % 3 == 1
        data = folder / "data"
        for index in range(12):
            image_folder = data / ("images" if masks else "ab"[index % 2])
            image_folder.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(index).integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(image_folder / f"{index}.png")
            if masks:
                (data / "masks").mkdir(exist_ok=True)
                Image.fromarray((pixels[..., 0] > 128).astype(np.uint8)).save(data / "masks" / f"{index}.png")
        (data / ("masks" if masks else "a") / "0.png").write_bytes(make())
        argv = ["data", "check", f"{'masks' if masks else 'folder'}:{data}"]
        if number // len(contents) % 3 == 2:
            argv = ["predict", str(harness.finished), str(data / "a"), "--out", str(folder / "p.csv")]

        def run(argv: list[str] = argv, program: Path = program) -> int:
            os.environ["PATH"] = f"{program.parent}:{os.environ['PATH']}"
            return _run_with_memory_limit(argv)

        result = fork(run)
        if marker.exists():
            harness.count("bombs", "executed", f"{description}: {argv}", result.text)
        else:
            harness.count_command("bombs", f"{description}: {argv}", result, lambda: True)


def _text_bomb() -> bytes:
    """Return a PNG with a compressed text of 1 GiB."""
    packer = zlib.compressobj(9)
    text = b"".join(packer.compress(bytes(2**20)) for _ in range(1024)) + packer.flush()
    image = make_png(16, 16)
    return image[:33] + _png_chunk(b"zTXt", b"Comment\0\0" + text) + image[33:]


def requests(harness: Harness) -> None:
    """Send parallel requests with large images; expect status 200, 413, 422 or 503 and bounded memory."""
    max_mib = 1_500
    for _, _, folder in harness.trials("requests"):
        port_file = folder / "port"
        child = Child(functools.partial(_serve, harness.finished, port_file))
        port = _wait_for_port(port_file)
        if port is None:
            harness.count("requests", "no server", "start", child.wait(signal_after_s=0).text)
            continue
        body, before = make_png(7_000, 7_000), _resident_mib(child.pid)
        statuses: list[int] = []
        clients = [threading.Thread(target=_post_images, args=(port, [body] * 2, statuses)) for _ in range(6)]
        for client in clients:
            client.start()
        peak = before
        while any(client.is_alive() for client in clients):
            peak = max(peak, _resident_mib(child.pid))
            time.sleep(0.02)
        result = child.wait(signal_after_s=0)
        description = f"statuses {sorted(statuses)}, {peak - before:.0f} MiB more"
        if "Traceback" in result.text or set(statuses) - {200, 413, 422, 503}:
            harness.count("requests", "traceback", description, result.text)
        else:
            harness.count(
                "requests", "bounded" if peak - before < max_mib else "out of memory", description, result.text
            )


def _wait_for_port(port_file: Path) -> int | None:
    """Wait for the server to start and return its port; None after a timeout."""
    deadline = time.monotonic() + START_S
    while not port_file.exists():
        if time.monotonic() > deadline:
            return None
        time.sleep(0.05)
    return int(port_file.read_text())


def _serve(run: Path, port_file: Path) -> int:
    """Run a server on a free port."""
    import uvicorn

    from snella_app.runs.predict import load
    from snella_app.runs.serve import create_app

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        app = create_app(load(run, "cpu"))
        write_text(port_file, str(listener.getsockname()[1]))
        uvicorn.Server(uvicorn.Config(app, log_level="error")).run(sockets=[listener])
    return 0


def _post_images(port: int, images: list[bytes], statuses: list[int]) -> None:
    """Send images and append the response status."""
    fields = [("files", (f"{number}.png", image)) for number, image in enumerate(images)]
    url = f"http://127.0.0.1:{port}/predict"
    statuses.append(urllib3.request("POST", url, fields=fields, timeout=120, retries=False).status)


def _resident_mib(pid: int) -> float:
    """Return the resident memory of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), 0.0)


def markup(harness: Harness) -> None:
    """Put markup into all names in the data and open the pages in a browser, if available."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    for _, _, folder in harness.trials("markup"):
        if program is None:
            harness.count("markup", "no browser")
            return
        data, run = folder / f"data {MARKUP[0]}", folder / "run"
        for number, name in enumerate(MARKUP):
            (data / name).mkdir(parents=True)
            for index in range(12):
                pixels = np.random.default_rng(100 * number + index).integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(data / name / f"{index}{name}.png")
        pages = [run / "report.html", folder / "maps" / "index.html"]

        def work(run: Path = run, data: Path = data, folder: Path = folder) -> int:
            tiny = [*tiny_without("--data", "--train-size", "--val-size", "--test-size"), "--data", f"folder:{data}"]
            status = main([*tiny, "--epochs", "1", "--batch-size", "8", "--out", str(run)])
            return status or main(["explain", str(run), str(data), "--out", str(folder / "maps")])

        result = fork(work)
        if result.has_traceback or result.status:
            kind = "traceback" if result.has_traceback else "refused"
            harness.count("markup", kind, "train and explain", result.text)
            continue
        port_file = folder / "port"
        server = Child(functools.partial(_serve, run, port_file))
        try:
            with _browser(program, folder / "chromium") as browser:
                for page in pages:
                    if not page.is_file():
                        harness.count("markup", "missing page", page.name, result.text)
                        continue
                    browser.open(page)
                    _count_page(harness, page.name, browser)
                port = _wait_for_port(port_file)
                if port is None:
                    harness.count("markup", "no server", "start")
                    continue
                browser.call("Page.navigate", url=f"http://127.0.0.1:{port}/")
                time.sleep(1.0)
                _count_page(harness, "serve", browser)
        finally:
            server.wait(signal_after_s=0)


@contextmanager
def _browser(program: str, profile: Path) -> Iterator[Any]:
    """Start a headless Chromium with the test driver."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.browser import Browser

    browser = Browser(program, profile)
    try:
        yield browser
    finally:
        browser.close()


def _count_page(harness: Harness, name: str, browser: Any) -> None:
    """Count a page as executed if markup created elements or ran scripts."""
    state = browser.evaluate(
        "[window.hit, document.querySelectorAll('[onerror],[onload],[onmouseover]').length, "
        "document.body.textContent.includes('onerror')]"
    )
    if state[0] or state[1]:
        harness.count("markup", "executed", name, str(state))
    else:
        harness.count("markup", "shown as text" if state[2] else "not shown")
