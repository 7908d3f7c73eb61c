"""HTTP server for the model of a run, with a web page.

A pixel budget limits the memory that all requests in progress use together. A request that does not fit in the
remaining budget is rejected with status 503, and the client can retry it. One that exceeds the entire budget is
rejected with status 413.
"""

import asyncio
import base64
import errno
import hashlib
import io
import ipaddress
import math
import re
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from rich.console import Console

from snella_app.console import make_console, print_line
from snella_app.data.images import PILLOW_MODES, Reading, array_pixels, open_image
from snella_app.runs.predict import Predictor, Unsure, load
from snella_app.text import utf8_text

_EXTRA = "the server needs fastapi, uvicorn and python-multipart: pip install 'snella[serve]'"
_OVERHEAD = 2**20  # bytes allowed for the parts of a request other than its files
_PAGE = Path(__file__).with_name("serve.html")
_BYTES_PER_PIXEL = 4  # number of request bytes that count as one pixel
_CONNECTIONS = 64  # maximum number of simultaneous connections
_REQUEST_S = 600
"""Maximum duration of a request in seconds."""
_MAX_FILES = 1000  # limit of Starlette's form parser
_SHUTDOWN_S = 10
"""Seconds after Ctrl-C or SIGTERM in which requests can finish."""
_DOCS = ("/docs", "/openapi.json")
_DOCS_POLICY = (
    "default-src 'none'; script-src https: 'unsafe-inline'; style-src https: 'unsafe-inline'; img-src https: data:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
"""Content-Security-Policy for FastAPI's documentation page, which loads its viewer from a CDN."""
_BIND_ERRORS = {
    errno.EADDRINUSE: "is in use; choose another --port, or 0 for a free one",
    errno.EACCES: "needs more permissions; choose a --port of 1024 or above",
    errno.EADDRNOTAVAIL: "is not an address of this machine; use --host 127.0.0.1 or 0.0.0.0",
}
_NOSNIFF = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


@dataclass(frozen=True)
class ServerLimits:
    """Limits for each request, and for all requests in progress together.

    Attributes:
        files: Maximum number of images per request.
        mib: Maximum size of a file, in MiB.
        megapixels: Maximum number of pixels per image, in millions. The image's header is checked before decoding.
        total_megapixels: Maximum number of pixels of all requests in progress, in millions. Each byte of a
            request counts as a quarter of a pixel.

    Raises:
        ValueError: If a limit is not positive and finite, `files` exceeds 1,000, or `total_megapixels` is less than
            `megapixels`.
    """

    files: int = 32
    mib: float = 20.0
    megapixels: float = 50.0
    total_megapixels: float = 200.0

    def __post_init__(self) -> None:
        """Check all limits, and report all errors together."""
        values = {f"max_{name}": value for name, value in vars(self).items()}
        errors = [
            f"{name} must be positive and finite, got {value}"
            for name, value in values.items()
            if not 0 < value < math.inf
        ]
        if self.files > _MAX_FILES:
            errors.append(f"max_files must be at most {_MAX_FILES}, got {self.files}")
        if self.total_megapixels < self.megapixels:
            errors.append(
                f"max_total_megapixels must be at least max_megapixels, {self.megapixels:g}, got "
                f"{self.total_megapixels:g}"
            )
        if errors:
            raise ValueError("; ".join(errors))

    @property
    def request_bytes(self) -> int:
        """Maximum size of a request in bytes."""
        return int(min(self.files * self.mib * 2**20 + _OVERHEAD, self.total_megapixels * 1e6 * _BYTES_PER_PIXEL))


class _Refused(Exception):
    """Refusal of a request, with the status code and headers of the response."""

    def __init__(self, status: int, reason: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.headers = headers


class _PixelBudget:
    """Budget for the pixels in memory, shared by all requests.

    The bytes of a request also count, each as a quarter of a pixel.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._used = 0.0
        self._lock = threading.Lock()

    @contextmanager
    def reserve(self, pixels: float) -> Iterator[None]:
        """Reserve pixels until the end of the block; refuse the request if they do not fit in the budget."""
        with self._lock:
            if self._used + pixels > self._limit:
                raise _Refused(503, "the server is busy with other requests; retry in a second", {"Retry-After": "1"})
            self._used += pixels
        try:
            yield
        finally:
            with self._lock:
                self._used -= pixels


@dataclass(frozen=True)
class _Service:
    """Predictions of a model within limits.

    Attributes:
        model: Model from `snella.load`.
        limits: Limits for requests.
        hosts: Lowercase names that a `Host` header may have.
        tta: As for `Predictor.predict`.
        unsure: As for `Predictor.predict`.
        budget: Budget shared by all requests.
    """

    model: Predictor
    limits: ServerLimits
    hosts: frozenset[str]
    tta: int | None
    unsure: Unsure
    budget: _PixelBudget

    def check_headers(self, method: str, headers: Mapping[str, str]) -> float:
        """Return the pixels that the body of a request counts as; refuse invalid headers and too long bodies."""
        host = headers.get("host", "")
        if not _is_allowed_host(host, self.hosts):
            raise _Refused(400, f"Host must be an address or a name of this server, got {host!r}; add it with --hosts")
        length = headers.get("content-length", "")
        is_chunked = "transfer-encoding" in headers  # overrides Content-Length, so the size is unknown
        if method == "POST" and (is_chunked or not length.isdecimal()):
            raise _Refused(411, "the request must have a Content-Length header")
        num_bytes = int(length) if length.isdecimal() else 0
        if num_bytes > self.limits.request_bytes:
            mib = self.limits.request_bytes / 2**20
            raise _Refused(413, f"the request must have at most {f'{mib:,.0f}' if mib >= 10 else f'{mib:.3g}'} MiB")
        return num_bytes / _BYTES_PER_PIXEL

    def predict(self, uploads: Sequence[tuple[str, BinaryIO]], body_pixels: float) -> list[dict[str, Any]]:
        """Return an entry with a prediction or an error for each uploaded file; refuse requests above a limit.

        Args:
            uploads: Names and contents of the files.
            body_pixels: Pixels that the body of the request counts as.
        """
        limits = self.limits
        if len(uploads) > limits.files:
            raise _Refused(413, f"a request must have at most {limits.files} files, got {len(uploads)}")
        entries: list[dict[str, Any]] = [{"name": utf8_text(name)} for name, _ in uploads]
        accepted: list[int] = []
        pixels = 0.0
        for index, (_, file) in enumerate(uploads):
            try:
                pixels += _checked_pixels(file, limits, self.model.loaded.reading)
                accepted.append(index)
            except ValueError as error:
                entries[index]["error"] = str(error)
        if (cost := pixels + body_pixels) > limits.total_megapixels * 1e6:
            rule = f"a request must have at most {limits.total_megapixels:g} million pixels, got {cost / 1e6:.1f}"
            raise _Refused(413, f"{rule}; each byte counts as a quarter of a pixel; send fewer images per request")
        failed: dict[Path, str] = {}
        with self.budget.reserve(pixels):
            images = [uploads[index][1].read() for index in accepted]
            for prediction in self.model.iter_predictions(
                images, tta=self.tta, unsure=self.unsure, skip_corrupt=True, on_skipped=failed.__setitem__
            ):
                entry = entries[accepted[_index(prediction.path)]]
                entry.update(_utf8({"text": prediction.text(), **prediction.fields()}))
        for path, reason in failed.items():
            entries[accepted[_index(path)]]["error"] = f"not a readable image: {reason}"
        return entries


def create_app(
    model: Predictor,
    limits: ServerLimits | None = None,
    *,
    tta: int | None = None,
    unsure: Unsure = None,
    hosts: Sequence[str] = (),
    log: Callable[[str], None] = lambda line: None,
) -> Any:
    """Create the web application with `GET /`, `GET /health`, `GET /docs`, and `POST /predict`.

    `POST /predict` takes images in the form field `files`. The response has one entry per file, in order, with `name`
    and `text`. The other fields of an entry depend on the task:

    - `classification` and `ordinal`: `label`, `probability`, `probabilities` by class, and `unsure` if there is a
      threshold
    - `multilabel`: `labels` and `probabilities` by class
    - `regression`: `values` by target
    - `segmentation`: `shares`, the fraction of pixels of each class, and `mask`, the labels as a palette PNG in a data
      URI

    The entry of a file without a prediction has `name` and `error`. Status codes:

    - 200: at least one file has a prediction.
    - 400: the `Host` header is neither a name of this server nor an IP address.
    - 408: the request took longer than ten minutes.
    - 411: a POST request has no valid Content-Length header.
    - 413: the request as a whole exceeds a limit. (If only a file does, its entry has `error`.)
    - 422: no file has a prediction, the form has no `files`, or the URL has query parameters.
    - 503: the server is busy with other requests.

    Args:
        model: Model from `snella.load`.
        limits: Limits for requests. None uses the default limits.
        tta: As for `Predictor.predict`.
        unsure: As for `Predictor.predict`.
        hosts: Host names to accept in addition to localhost, the name of this machine, and any IP address.
        log: Callback that receives one log line per request.

    Returns:
        A `fastapi.FastAPI` application.

    Raises:
        ImportError: If FastAPI or python-multipart is not installed.
        ValueError: If `tta` or `unsure` is invalid or does not apply to the run.
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
    model.resolve_threshold(tta, unsure)  # reports invalid arguments before the first request
    info = model.loaded.info
    classes = [utf8_text(name) for name in model.classes]
    about = {"task": info.task, "method": info.method, "backbone": info.backbone.name, "classes": classes}
    names = frozenset({"localhost", socket.gethostname().lower(), *(name.lower() for name in hosts)})
    service = _Service(model, limits, names, tta, unsure, _PixelBudget(limits.total_megapixels * 1e6))
    page_text = _PAGE.read_text(encoding="utf-8")
    policy = _content_policy(page_text)
    app = FastAPI(title="snella", description=f"{info.method} on {info.backbone.name}", redoc_url=None)

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Any]]) -> Any:
        """Check the headers, reserve the budget for the body, limit the duration, and log the request."""
        start = time.monotonic()
        try:
            request.state.pixels = service.check_headers(request.method, request.headers)
            with service.budget.reserve(request.state.pixels):  # before the body is received
                async with asyncio.timeout(_REQUEST_S):
                    response = await call_next(request)
        except _Refused as refusal:
            response = await explain_refusal(request, refusal)
        except TimeoutError:
            response = JSONResponse({"error": f"the request took longer than {_REQUEST_S} s"}, 408)
        response.headers.update(_NOSNIFF)
        response.headers["Content-Security-Policy"] = _DOCS_POLICY if request.url.path in _DOCS else policy
        client = request.client.host if request.client else "-"
        route = f"{request.method} {request.url.path}"
        duration_ms = 1000 * (time.monotonic() - start)
        log(f"{time.strftime('%H:%M:%S')} {client} {route} {response.status_code} {duration_ms:.0f} ms")
        return response

    @app.exception_handler(_Refused)
    async def explain_refusal(request: Request, error: _Refused) -> Any:
        """Return the response to a refused request."""
        return JSONResponse({"error": str(error)}, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def explain_form(request: Request, error: RequestValidationError) -> Any:
        """Return the response for a form without files."""
        body = error.body if isinstance(error.body, Mapping) else {}
        fields = "text instead of a file in 'files'" if "files" in body else ", ".join(map(repr, body)) or "no field"
        example = f"curl -F files=@photo.jpg {request.base_url}predict"
        return JSONResponse({"error": f"images must be files in the form field 'files', got {fields}; {example}"}, 422)

    @app.exception_handler(HTTPException)
    async def explain_status(request: Request, error: HTTPException) -> Any:
        """Return the response for an HTTP error, with the available routes if the route or method is wrong."""
        hint = "; available: /, /health, /docs and POST /predict" if error.status_code in (404, 405) else ""
        return JSONResponse({"error": f"{error.detail}{hint}"}, error.status_code, error.headers)

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:  # async routes need no thread from the pool that runs `predict`
        """Return the web page."""
        return page_text

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Return the model and the request limits."""
        return {"status": "ok", **about, "limits": vars(limits)}

    @app.post("/predict")
    def predict(request: Request, files: list[UploadFile]) -> Any:
        """Run prediction on images, each a file in the form field `files`."""
        if request.query_params:
            got = ", ".join(map(repr, request.query_params))
            raise _Refused(
                422, f"the URL must have no query parameters, got {got}; set options when starting snella serve"
            )
        uploads = [(file.filename or f"[{index}]", file.file) for index, file in enumerate(files)]
        entries = service.predict(uploads, request.state.pixels)
        any_predicted = any("error" not in entry for entry in entries)
        return JSONResponse({"predictions": entries}, 200 if any_predicted else 422)

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
    """Serve predictions over HTTP until Ctrl-C or SIGTERM.

    Args:
        run: Run folder.
        host: Address to listen on. 0.0.0.0 listens on all addresses of this machine.
        port: Port. 0 selects a free port.
        limits: Limits for requests. None uses the default limits.
        tta: As for `Predictor.predict`.
        unsure: As for `Predictor.predict`.
        batch_size: Batch size.
        device: `"auto"`, or a torch device such as `"cpu"`, `"cuda:1"` or `"mps"`.
        hosts: As for `create_app`.
        console: Console for the address and the request log.

    Raises:
        ImportError: If FastAPI, uvicorn, or python-multipart is not installed.
        FileNotFoundError: As for `snella.load`.
        ValueError: As for `snella.load` and `create_app`, or if `port` is out of range.
        OSError: If the address is in use or unavailable.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise ImportError(_EXTRA) from error
    if not 0 <= port <= 65535:
        raise ValueError(f"port must be from 0 (any free port) to 65535, got {port}")
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
        listener.listen()  # before the address is printed, so that clients can connect
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{listener.getsockname()[1]}"
        print_line(console, f"serving {run} at {url}, API {url}/predict, docs {url}/docs; press Ctrl-C to stop")
        config = uvicorn.Config(
            app,
            log_level="warning",
            limit_concurrency=_CONNECTIONS,
            server_header=False,
            timeout_graceful_shutdown=_SHUTDOWN_S,
        )
        uvicorn.Server(config).run(sockets=[listener])


@contextmanager
def _listener(host: str, port: int) -> Iterator[socket.socket]:
    """Open a socket bound to an address.

    Raises:
        OSError: If the address is in use, not on this machine, or not permitted. The message suggests a remedy.
    """
    try:
        family, socket_type, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise OSError(f"host must be an address of this machine, got {host!r}; use 127.0.0.1 or 0.0.0.0") from error
    with socket.socket(family, socket_type, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            reason = _BIND_ERRORS.get(error.errno or 0, f"is unavailable: {error.strerror}; choose another --port")
            raise OSError(f"{host}:{port} {reason}") from error
        yield listener


def _is_allowed_host(header: str, names: Collection[str]) -> bool:
    """Return whether a `Host` header is a known name or an IP address.

    Other names are rejected, because a page on another site could otherwise read responses by DNS rebinding.
    """
    host = re.sub(r":\d+$", "", header).strip("[]").lower().rstrip(".")
    if host in names:
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _content_policy(page: str) -> str:
    """Return the Content-Security-Policy of the page.

    It allows only the page's script and style, blob and data images, and requests to the page's server.
    """
    sources = {}
    for kind in ("script", "style"):
        (text,) = re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        sources[kind] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{sources['script']}'; style-src 'sha256-{sources['style']}'; "
        "img-src blob: data:; connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    )


def _checked_pixels(file: Any, limits: ServerLimits, reading: Reading) -> float:
    """Return the number of pixels in an uploaded image, read from its header.

    The number is at least 1, even if the header cannot be read.

    Raises:
        ValueError: If the file exceeds a limit.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if not size:
        raise ValueError("the file is empty")
    if size > limits.mib * 2**20:
        raise ValueError(f"a file must have at most {limits.mib:g} MiB")
    pixels = 0.0
    got = ""
    try:
        if reading.channels in PILLOW_MODES:
            with open_image(file) as image:
                pixels = float(image.width * image.height)
                got = f", got {image.width}×{image.height}"
        else:
            pixels = array_pixels(io.BytesIO(file.read())) / reading.channels  # tifffile cannot open a spooled file
            got = f", got {pixels / 1e6:.3g}"
    except Image.DecompressionBombError:
        raise ValueError(f"an image must have at most {limits.megapixels:g} million pixels") from None
    except (OSError, ValueError, SyntaxError, MemoryError):
        pass  # the image reader of the model reports the error
    finally:
        file.seek(0)
    if pixels > limits.megapixels * 1e6:
        raise ValueError(f"an image must have at most {limits.megapixels:g} million pixels{got}")
    return max(pixels, 1.0)


def _index(path: Path) -> int:
    """Return the index in the name of an in-memory image: 3 for `[3]`."""
    return int(str(path)[1:-1])


def _utf8(value: Any) -> Any:
    """Apply `utf8_text` to all strings of a JSON value, including keys."""
    if isinstance(value, dict):
        return {utf8_text(name): _utf8(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_utf8(entry) for entry in value]
    return utf8_text(value) if isinstance(value, str) else value
