"""Weights from the hub: found out early whether it answers, and said plainly when it does not."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.error import HTTPError, URLError

import huggingface_hub
import timm
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from torch import nn

from snella.backbones.packaged import packaged_names

__all__ = ["cache_only_if_unreachable", "create_from_hub"]

_logger = logging.getLogger(__name__)
_PROBE_TIMEOUT_S = 5.0
_NETWORK_MODULES = ("httpx", "httpx2", "httpcore", "requests", "urllib3")
_LOCAL_WAYS = (
    "Without the hub: weights=PATH with a file (.pth, .safetensors, Google's .npz), a local folder in the hub's "
    f"format as the backbone, a name whose weights ship inside a package ({', '.join(packaged_names())}; on the "
    f"command line: --backbone {packaged_names()[0]} --img-size 224), or pretrained=False for random values"
)


def create_from_hub(name: str, *, pretrained: bool, **options: Any) -> nn.Module:
    """Build timm's `name`, with weights from the hub or from its local cache.

    Where one short request finds no hub, only the cache is asked: the hub's client would otherwise retry each
    file for half a minute.

    Args:
        name: timm name or `hf-hub:owner/repo`.
        pretrained: Whether to load weights; a `hf-hub:` name reads its configuration from the hub in any case.
        options: Further arguments of `timm.create_model`.

    Raises:
        ConnectionError: Neither the hub nor the cache has the files.
        ValueError: The hub answers but does not hold them.
    """
    with cache_only_if_unreachable() as reason:
        try:
            return timm.create_model(name, pretrained=pretrained, **options)
        except Exception as error:
            if _is_network_error(error):
                raise ConnectionError(
                    f"the hub ({constants.ENDPOINT}) could not be reached ({reason or _first_line(error)}) "
                    f"and its cache does not hold backbone {name!r}. {_LOCAL_WAYS}"
                ) from error
            if isinstance(error, (HfHubHTTPError, HTTPError)):
                raise ValueError(
                    f"the hub ({constants.ENDPOINT}) answers, but does not give out backbone {name!r}: "
                    f"{_first_line(error)}. {_LOCAL_WAYS}"
                ) from error
            raise


@contextmanager
def cache_only_if_unreachable() -> Iterator[str | None]:
    """Put the hub's client into offline mode where one short request gets no answer; gives the reason."""
    before = constants.HF_HUB_OFFLINE
    reason = "HF_HUB_OFFLINE is set" if before else _why_unreachable()
    if reason is not None and not before:
        _logger.info("the hub did not answer (%s); looking in its cache only", reason)
    constants.HF_HUB_OFFLINE = reason is not None
    try:
        yield reason
    finally:
        constants.HF_HUB_OFFLINE = before


def _why_unreachable() -> str | None:
    """Why one request to the hub gets no answer at all, None where it gets one."""
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=_PROBE_TIMEOUT_S)
    except Exception as error:
        if _is_network_error(error):
            return _first_line(error)
        raise
    return None


def _is_network_error(error: BaseException | None) -> bool:
    """Whether `error` or a cause of it says that no connection was made."""
    while error is not None:
        if isinstance(error, HTTPError) or (isinstance(error, HfHubHTTPError) and not _is_local_miss(error)):
            return False  # an answer
        if _is_local_miss(error) or isinstance(error, (ConnectionError, TimeoutError, URLError)):
            return True
        if type(error).__module__.partition(".")[0] in _NETWORK_MODULES:
            return True
        error = error.__cause__
    return False


def _is_local_miss(error: BaseException) -> bool:
    """Whether the hub's client looked in its cache only."""
    return isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled))


def _first_line(error: BaseException) -> str:
    """The first line of the message, which says what happened."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
