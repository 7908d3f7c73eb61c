"""`serve`: a run's model behind an HTTP server, with a page to try it."""

import io
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from snella._console import make_console, print_line
from snella.runs.predict import Predictor, Unsure, load
from snella.tasks.predictions import Prediction

__all__ = ["ServerLimits", "create_app", "serve"]

_EXTRA = "a server needs fastapi, uvicorn and python-multipart; pip install 'snella[serve]'"
_OVERHEAD = 2**20  # of a request besides its files
_PAGE = Path(__file__).with_name("serve.html")


@dataclass(frozen=True)
class ServerLimits:
    """What a request may ask for.

    Args:
        files: Images in one request.
        mib: Size of one file, MiB.
        megapixels: Pixels of one image, millions; found in its header, before anything is decoded.

    Raises:
        ValueError: One is not positive.
    """

    files: int = 32
    mib: float = 20.0
    megapixels: float = 50.0

    def __post_init__(self) -> None:
        """Check all at once."""
        values = {"max_files": self.files, "max_mib": self.mib, "max_megapixels": self.megapixels}
        errors = [f"{name} must be positive, got {value}" for name, value in values.items() if not value > 0]
        if errors:
            raise ValueError("; ".join(errors))

    @property
    def request_bytes(self) -> int:
        """Size of a whole request."""
        return int(self.files * self.mib * 2**20) + _OVERHEAD


def create_app(model: Predictor, limits: ServerLimits | None = None, *, tta: int = 1, unsure: Unsure = None) -> Any:
    """The application: `GET /` a page, `GET /health`, `POST /predict` images as the form's `files`.

    An answer has an entry for each file, in their order: `name`, `text`, and for one class an image `label`,
    `probability`, `probabilities` and, with a threshold, `unsure`; or `name` and `error`. It has status 200 if any file
    was predicted, 422 if none could be, 413 where a limit on the request was exceeded.

    Args:
        model: From `snella.load`.
        limits: Of a request.
        tta: As for `Predictor.predict`.
        unsure: As for `Predictor.predict`.

    Returns:
        A `fastapi.FastAPI`.

    Raises:
        ImportError: Without FastAPI or python-multipart.
        ValueError: `tta` or `unsure` is no setting for this run.
    """
    try:
        import python_multipart  # noqa: F401
        from fastapi import FastAPI, Request, UploadFile
        from fastapi.responses import HTMLResponse, JSONResponse
    except ImportError as error:
        raise ImportError(_EXTRA) from error
    limits = limits or ServerLimits()
    model.check_settings(tta, unsure)
    info = model.loaded.info
    about = {"task": info.task, "method": info.method, "backbone": info.backbone.name, "classes": model.classes}
    app = FastAPI(title="snella", docs_url=None, redoc_url=None)

    @app.middleware("http")
    async def check_size(request: Request, call_next: Callable[[Request], Awaitable[Any]]) -> Any:
        length = request.headers.get("content-length")
        if request.method == "POST" and (length is None or not length.isdigit()):
            return JSONResponse({"error": "the request must say its Content-Length"}, 411)
        if length is not None and length.isdigit() and int(length) > limits.request_bytes:
            mib = limits.request_bytes / 2**20
            return JSONResponse({"error": f"the request must have at most {mib:.0f} MiB"}, 413)
        return await call_next(request)

    @app.get("/", response_class=HTMLResponse)
    def page() -> str:
        return _PAGE.read_text(encoding="utf-8")

    @app.get("/health")
    def health() -> dict[str, Any]:
        return {"status": "ok", **about, "limits": vars(limits)}

    @app.post("/predict")
    def predict(files: list[UploadFile]) -> Any:
        if len(files) > limits.files:
            return JSONResponse({"error": f"at most {limits.files} files a request, got {len(files)}"}, 413)
        answers: list[dict[str, Any]] = [{"name": file.filename or f"[{i}]"} for i, file in enumerate(files)]
        images: dict[int, bytes] = {}
        for index, file in enumerate(files):
            try:
                images[index] = _checked(file.file.read(int(limits.mib * 2**20) + 1), limits)
            except ValueError as error:
                answers[index]["error"] = str(error)
        places = list(images)
        failed: dict[Path, str] = {}
        each = model.each(
            list(images.values()), tta=tta, unsure=unsure, skip_corrupt=True, on_skipped=failed.__setitem__
        )
        for prediction in each:
            answers[places[_index(prediction.path)]].update(_answer(model, prediction))
        for path, reason in failed.items():
            answers[places[_index(path)]]["error"] = f"it is not a readable image: {reason}"
        is_any = any("error" not in answer for answer in answers)
        return JSONResponse({"predictions": answers}, 200 if is_any else 422)

    return app


def serve(
    run: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: ServerLimits | None = None,
    tta: int = 1,
    unsure: Unsure = None,
    batch_size: int = 32,
    device: str = "auto",
    console: Console | None = None,
) -> None:
    """Answer requests until Ctrl-C.

    Args:
        run: Folder of the run.
        host: Address to listen on; 0.0.0.0 for all of this machine's.
        port: Port; 0 for a free one.
        limits: Of a request.
        tta: As for `Predictor.predict`.
        unsure: As for `Predictor.predict`.
        batch_size: Images at a time.
        device: auto, cpu or cuda.
        console: Where the address is printed.

    Raises:
        ImportError: Without FastAPI, uvicorn or python-multipart.
        OSError: The address is in use.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise ImportError(_EXTRA) from error
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise OSError(f"{host}:{port} cannot be listened on: {error.strerror}; give another --port") from error
        app = create_app(load(run, device, batch_size=batch_size), limits, tta=tta, unsure=unsure)
        listener.listen()  # who reads the next line may connect at once
        name = f"http://{host}:{listener.getsockname()[1]}"
        print_line(console or make_console(), f"{run} answers at {name}, {name}/predict; Ctrl-C ends it")
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


def _checked(content: bytes, limits: ServerLimits) -> bytes:
    """The same bytes, if they are an image within the limits, as far as its header says."""
    if len(content) > limits.mib * 2**20:
        raise ValueError(f"a file must have at most {limits.mib:g} MiB")
    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        raise ValueError(f"an image must have at most {limits.megapixels:g} million pixels") from None
    except (OSError, ValueError, SyntaxError):
        return content  # the model's own reader says what it is
    if width * height > limits.megapixels * 1e6:
        raise ValueError(f"an image must have at most {limits.megapixels:g} million pixels, got {width}×{height}")
    return content


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
