"""`serve`: a run's model behind an HTTP server, with a page to try it."""

import base64
import errno
import hashlib
import io
import ipaddress
import re
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from snella_app.console import make_console, print_line
from snella_app.data.images import RGB, Reading, array_pixels, open_image
from snella_app.runs.predict import Predictor, Unsure, load
from snella_app.tasks.predictions import Prediction

__all__ = ["ServerLimits", "create_app", "serve"]

_EXTRA = "a server needs fastapi, uvicorn and python-multipart; pip install 'snella[serve]'"
_OVERHEAD = 2**20  # of a request besides its files
_PAGE = Path(__file__).with_name("serve.html")
_BYTES_OF_PIXEL = 4
_CONNECTIONS = 64
_DOCS = ("/docs", "/openapi.json")
_NOSNIFF = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


@dataclass(frozen=True)
class ServerLimits:
    """Limits of a request, and of all requests together.

    Args:
        files: Images in one request.
        mib: Size of one file, MiB.
        megapixels: Pixels of one image, millions; found in its header, before anything is decoded.
        total_megapixels: Pixels of the images of all requests that are answered at one time, millions. A byte of a file
            counts as a quarter of a pixel.

    Raises:
        ValueError: One is not positive, or one image may have more pixels than all together.
    """

    files: int = 32
    mib: float = 20.0
    megapixels: float = 50.0
    total_megapixels: float = 200.0

    def __post_init__(self) -> None:
        """Check all at once."""
        values = {f"max_{name}": value for name, value in vars(self).items()}
        errors = [f"{name} must be positive, got {value}" for name, value in values.items() if not value > 0]
        if self.total_megapixels < self.megapixels:
            errors.append(
                f"max_total_megapixels must be at least max_megapixels, {self.megapixels:g}, got "
                f"{self.total_megapixels:g}"
            )
        if errors:
            raise ValueError("; ".join(errors))

    @property
    def request_bytes(self) -> int:
        """Size of a whole request."""
        return int(self.files * self.mib * 2**20) + _OVERHEAD


class _PixelBudget:
    """Pixels of the images in memory, over all requests."""

    def __init__(self, limit: float) -> None:
        self._limit, self._used, self._lock = limit, 0.0, threading.Lock()

    @contextmanager
    def holding(self, pixels: float) -> Iterator[bool]:
        """Whether so many more pixels fit; they count until the end of the block."""
        with self._lock:
            fits = self._used + pixels <= self._limit
            self._used += pixels if fits else 0.0
        try:
            yield fits
        finally:
            with self._lock:
                self._used -= pixels if fits else 0.0


def create_app(
    model: Predictor,
    limits: ServerLimits | None = None,
    *,
    tta: int | None = None,
    unsure: Unsure = None,
    hosts: Sequence[str] = (),
    log: Callable[[str], None] = lambda line: None,
) -> Any:
    """The application: `GET /` a page, `GET /health`, `GET /docs`, `POST /predict` images as the form's `files`.

    An answer has an entry for each file, in their order: `name`, `text`, and for one class an image `label`,
    `probability`, `probabilities` and, with a threshold, `unsure`; or `name` and `error`. It has status 200 if any file
    was predicted, 422 if none could be or the form has no `files`, 413 where a limit on the request was exceeded, 503
    where the limit on all requests is, and 400 where the request's `Host` is a name that is not this server's.

    Args:
        model: From `snella.load`.
        limits: Of a request, and of all.
        tta: As for `Predictor.predict`.
        unsure: As for `Predictor.predict`.
        hosts: Names by which this server is called, besides localhost, this machine's name and any IP address.
        log: Called with a line about each answer.

    Returns:
        A `fastapi.FastAPI`.

    Raises:
        ImportError: Without FastAPI or python-multipart.
        ValueError: `tta` or `unsure` is no setting for this run.
    """
    try:
        import python_multipart  # noqa: F401
        from fastapi import FastAPI, Request, UploadFile
        from fastapi.exceptions import RequestValidationError
        from fastapi.responses import HTMLResponse, JSONResponse
        from starlette.exceptions import HTTPException
    except ImportError as error:
        raise ImportError(_EXTRA) from error
    limits = limits or ServerLimits()
    model.check_settings(tta, unsure)
    info = model.loaded.info
    about = {"task": info.task, "method": info.method, "backbone": info.backbone.name, "classes": model.classes}
    names = {"localhost", socket.gethostname().lower(), *(name.lower() for name in hosts)}
    budget = _PixelBudget(limits.total_megapixels * 1e6)
    page_text = _PAGE.read_text(encoding="utf-8")
    policy = _content_policy(page_text)
    app = FastAPI(title="snella", description=f"{info.method} on {info.backbone.name}", redoc_url=None)

    def refusal(request: Request) -> Any:
        """The answer to a request that is refused by its head; None for others."""
        host = request.headers.get("host", "")
        if not _is_own_host(host, names):
            return JSONResponse(
                {"error": f"the Host must be an address or a name of this server, got {host!r}; name it with --hosts"},
                400,
            )
        length = request.headers.get("content-length")
        if request.method == "POST" and (length is None or not length.isdigit()):
            return JSONResponse({"error": "the request must say its Content-Length"}, 411)
        if length is not None and length.isdigit() and int(length) > limits.request_bytes:
            mib = limits.request_bytes / 2**20
            return JSONResponse({"error": f"the request must have at most {mib:.0f} MiB"}, 413)
        return None

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Any]]) -> Any:
        start = time.monotonic()
        answer = refusal(request) or await call_next(request)
        answer.headers.update(_NOSNIFF)
        answer.headers["Content-Security-Policy"] = _DOCS_POLICY if request.url.path in _DOCS else policy
        client = request.client.host if request.client else "-"
        took = f"{1000 * (time.monotonic() - start):.0f} ms"
        log(f"{time.strftime('%H:%M:%S')} {client} {request.method} {request.url.path} {answer.status_code} {took}")
        return answer

    @app.exception_handler(RequestValidationError)
    async def explain_form(request: Request, error: RequestValidationError) -> Any:
        given = ", ".join(map(repr, error.body)) if isinstance(error.body, Mapping) and error.body else "no field"
        return JSONResponse(
            {"error": f"images must be files of the form's field 'files', got {given}; {_curl(request)}"}, 422
        )

    @app.exception_handler(HTTPException)
    async def explain_status(request: Request, error: HTTPException) -> Any:
        hint = "; this server has /, /health, /docs and POST /predict" if error.status_code in (404, 405) else ""
        return JSONResponse({"error": f"{error.detail}{hint}"}, error.status_code, error.headers)

    @app.get("/", response_class=HTMLResponse)
    def page() -> str:
        """A page to try the model in a browser."""
        return page_text

    @app.get("/health")
    def health() -> dict[str, Any]:
        """What is served, and its limits."""
        return {"status": "ok", **about, "limits": vars(limits)}

    @app.post("/predict")
    def predict(files: list[UploadFile]) -> Any:
        """Predict one image or several, each a file of the form's field `files`."""
        if len(files) > limits.files:
            return JSONResponse({"error": f"at most {limits.files} files a request, got {len(files)}"}, 413)
        answers: list[dict[str, Any]] = [{"name": file.filename or f"[{i}]"} for i, file in enumerate(files)]
        usable: list[int] = []
        weight = 0.0
        for index, file in enumerate(files):
            try:
                weight += _checked_pixels(file.file, limits, model.loaded.reading)
                usable.append(index)
            except ValueError as error:
                answers[index]["error"] = str(error)
        if weight > limits.total_megapixels * 1e6:
            most = f"at most {limits.total_megapixels:g} million pixels a request"
            return JSONResponse({"error": f"{most}, got {weight / 1e6:.1f}; send fewer images at a time"}, 413)
        with budget.holding(weight) as fits:
            if not fits:
                busy = "the server is answering other requests; send this one again in a second"
                return JSONResponse({"error": busy}, 503, {"Retry-After": "1"})
            images = [files[index].file.read() for index in usable]
            failed: dict[Path, str] = {}
            each = model.each(images, tta=tta, unsure=unsure, skip_corrupt=True, on_skipped=failed.__setitem__)
            for prediction in each:
                answers[usable[_index(prediction.path)]].update(_answer(model, prediction))
        for path, reason in failed.items():
            answers[usable[_index(path)]]["error"] = f"it is not a readable image: {reason}"
        is_any = any("error" not in answer for answer in answers)
        return JSONResponse({"predictions": answers}, 200 if is_any else 422)

    return app


def serve(
    run: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: ServerLimits | None = None,
    tta: int | None = None,
    unsure: Unsure = None,
    batch_size: int = 32,
    device: str = "auto",
    hosts: Sequence[str] = (),
    console: Console | None = None,
) -> None:
    """Answer requests until Ctrl-C.

    Args:
        run: Folder of the run.
        host: Address to listen on; 0.0.0.0 for all of this machine's.
        port: Port; 0 for a free one.
        limits: Of a request, and of all.
        tta: As for `Predictor.predict`.
        unsure: As for `Predictor.predict`.
        batch_size: Images at a time.
        device: auto, or a device of torch such as cpu, cuda:1 or mps.
        hosts: As for `create_app`.
        console: Where the address and a line about each answer are printed.

    Raises:
        ImportError: Without FastAPI, uvicorn or python-multipart.
        ValueError: `port` is none.
        OSError: The address is in use, or cannot be listened on.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise ImportError(_EXTRA) from error
    if not 0 <= port <= 65535:
        raise ValueError(f"port must be from 0 (a free one) to 65535, got {port}")
    console = console or make_console(survives_closed_output=True)
    with _listener(host, port) as listener:
        app = create_app(
            load(run, device, batch_size=batch_size),
            limits,
            tta=tta,
            unsure=unsure,
            hosts=(host, *hosts),
            log=lambda line: print_line(console, line),
        )
        listener.listen()  # who reads the next line may connect at once
        shown = f"[{host}]" if ":" in host else host
        name = f"http://{shown}:{listener.getsockname()[1]}"
        print_line(console, f"{run} answers at {name}, {name}/predict, described at {name}/docs; Ctrl-C ends it")
        config = uvicorn.Config(app, log_level="warning", limit_concurrency=_CONNECTIONS, server_header=False)
        uvicorn.Server(config).run(sockets=[listener])


@contextmanager
def _listener(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that is bound to an address.

    Raises:
        OSError: It is in use, not this machine's, or not allowed; says what to do.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise OSError(f"host must be an address of this machine, got {host!r}; take 127.0.0.1 or 0.0.0.0") from error
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            number = error.errno or 0
            reason = {
                errno.EADDRINUSE: "is used by another program; give another --port, or 0 for a free one",
                errno.EACCES: "may not be listened on by you; give a --port from 1024 on",
                errno.EADDRNOTAVAIL: "is no address of this machine; take --host 127.0.0.1 or 0.0.0.0",
            }.get(number, f"cannot be listened on: {error.strerror}; give another --port")
            raise OSError(f"{host}:{port} {reason}") from error
        yield listener


def _is_own_host(header: str, names: set[str]) -> bool:
    """Whether a request's `Host` is one of some names or an IP address; a page of another site has neither."""
    host = re.sub(r":\d+$", "", header).strip("[]").lower().rstrip(".")
    if host in names:
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _content_policy(page: str) -> str:
    """The policy by which a page runs its own script and style, asks its own server, and does nothing else."""
    sources = {}
    for kind in ("script", "style"):
        (text,) = re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        sources[kind] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{sources['script']}'; style-src 'sha256-{sources['style']}'; "
        "img-src blob: data:; connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    )


_DOCS_POLICY = (
    "default-src 'none'; script-src https: 'unsafe-inline'; style-src https: 'unsafe-inline'; img-src https: data:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
"""FastAPI's page loads its viewer from elsewhere."""


def _curl(request: Any) -> str:
    """A command line that asks this server."""
    return f"curl -F files=@photo.jpg {request.base_url}predict"


def _checked_pixels(file: Any, limits: ServerLimits, reading: Reading = RGB) -> float:
    """What an uploaded file counts, in pixels, if it is within the limits, as far as its header says.

    Raises:
        ValueError: It is not.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if size > limits.mib * 2**20:
        raise ValueError(f"a file must have at most {limits.mib:g} MiB")
    pixels, found = 0.0, ""
    try:
        if reading.channels in (1, 3, 4):
            with open_image(file) as image:
                pixels, found = float(image.width * image.height), f", got {image.width}×{image.height}"
        else:
            pixels = array_pixels(io.BytesIO(file.read())) / reading.channels  # tifffile needs the name of a file
            found = f", got {pixels / 1e6:.3g}"
    except Image.DecompressionBombError:
        raise ValueError(f"an image must have at most {limits.megapixels:g} million pixels") from None
    except (OSError, ValueError, SyntaxError, MemoryError):
        pass  # the model's own reader says what it is
    finally:
        file.seek(0)
    if pixels > limits.megapixels * 1e6:
        raise ValueError(f"an image must have at most {limits.megapixels:g} million pixels{found}")
    return max(pixels, 1.0) + size / _BYTES_OF_PIXEL


def _index(path: Path) -> int:
    """The place of an image without a file, `[3]`."""
    return int(str(path)[1:-1])


def _answer(model: Predictor, prediction: Any) -> dict[str, Any]:
    """A prediction as JSON."""
    text = model.loaded.task.prediction_text(prediction, None)
    if not isinstance(prediction, Prediction):
        return {"text": text}
    unsure = {} if prediction.unsure_below is None else {"unsure": prediction.is_unsure}
    probabilities = {name: round(p, 6) for name, p in prediction.ranking}
    return {
        "text": text,
        "label": prediction.label,
        "probability": round(prediction.probability, 6),
        **unsure,
        "probabilities": probabilities,
    }
