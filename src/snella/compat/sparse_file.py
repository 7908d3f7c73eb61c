"""Changed weights as positions and values: one file an update, applied to a plain model and removed again."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self, get_args

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from snella._text import listed
from snella.cache import pack_positions, unpack_positions

FORMAT = "snella-sparse-1"
ValueDtype = Literal["fp32", "bf16"]
_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
_VALUES = "values"
_DIGEST = "sha256"
_DIGITS = 16  # of a digest: no guard against forgery, only against another model


@dataclass(frozen=True)
class Entries:
    """Single entries of one parameter and what is added to them.

        W[indices[k]] += values[k]

    Args:
        indices: Positions in the flattened parameter, ascending, `[K]`, int64.
        values: `[K]`, float32 or bfloat16.
    """

    indices: Tensor
    values: Tensor


@dataclass
class SparsePatch:
    """What turns the weights of a pre-trained model into those of a fine-tuned one, and back.

    Args:
        entries: By name of the parameter, what is added to single entries of it.
        replaced: By name, parameters and buffers that are other ones altogether, such as a head.
        shapes: Shape of each parameter in `entries`.
        digests: First digits of the SHA-256 of each of them before the change.
        metadata: Anything else that the file says, texts only.
    """

    entries: dict[str, Entries]
    replaced: dict[str, Tensor] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._model: nn.Module | None = None
        self._originals: dict[str, Tensor] = {}

    # files ---------------------------------------------------------------------------------------------------------

    def to_bytes(self, values: ValueDtype = "fp32") -> bytes:
        """The file's content: safetensors.

        Positions are `NAME:int32`, `NAME:gaps` (the numbers of unchanged weights between changed ones, LEB128) or
        `NAME:bitmap` (a bit a weight), whichever is smallest; values are `NAME:values`; what is replaced is `NAME`.
        The metadata hold the SHA-256 digest of all of it as `sha256`.

        Args:
            values: Type of the stored values; bf16 rounds them.

        Raises:
            ValueError: An unknown type.
        """
        if values not in _DTYPES:
            raise ValueError(f"values must be one of {list(get_args(ValueDtype))}, got {values!r}")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.replaced.items()}
        for name, one in self.entries.items():
            kind, positions = encode_positions(one.indices, int(np.prod(self.shapes[name])))
            tensors[f"{name}:{kind}"] = positions
            tensors[f"{name}:{_VALUES}"] = one.values.detach().cpu().to(_DTYPES[values])
        own = {"format": FORMAT, "shapes": json.dumps(self.shapes), "digests": json.dumps(self.digests)}
        metadata = {**self.metadata, **own}
        return save(tensors, {**metadata, _DIGEST: tensors_digest(tensors, metadata)})

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a file of `to_bytes`.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is damaged, or of another kind.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no file {path}")
        try:
            with safe_open(path, "pt") as file:
                metadata = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}; export it again") from None
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} holds no sparse update; snella export RUN --format sparse writes one")
        digest, found = metadata.pop(_DIGEST, None), tensors_digest(tensors, metadata)
        metadata.pop("format")
        if digest != found:
            raise ValueError(f"{path} is damaged: its SHA-256 is {found}, expected {digest}; export it again")
        try:
            return cls._parse(tensors, metadata)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}; export it again") from None

    @classmethod
    def _parse(cls, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Self:
        """The patch that a file's tensors and metadata describe."""
        shapes, digests = json.loads(metadata.pop("shapes")), json.loads(metadata.pop("digests"))
        entries = {}
        for key in [key for key in tensors if key.endswith(f":{_VALUES}")]:
            name, values = key.removesuffix(f":{_VALUES}"), tensors.pop(key)
            kinds = [kind for kind in _DECODERS if f"{name}:{kind}" in tensors]
            if len(kinds) != 1:
                raise ValueError(f"{name!r} has positions in {len(kinds)} forms, expected one of {list(_DECODERS)}")
            indices = _DECODERS[kinds[0]](tensors.pop(f"{name}:{kinds[0]}")).long()
            if len(indices) != len(values):
                raise ValueError(f"{name!r} has {len(indices)} positions and {len(values)} values")
            size = math.prod(shapes[name])
            if len(indices) and not (int(indices[0]) >= 0 and int(indices[-1]) < size and (indices.diff() > 0).all()):
                raise ValueError(f"{name!r} has positions that do not ascend from 0 to {size - 1}")
            entries[name] = Entries(indices, values)
        return cls(entries, tensors, shapes, digests, metadata)

    # the model -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def apply(self, model: nn.Module, *, check_base: bool = True) -> None:
        """Change the weights in place; tensors stay the same objects, so that compiled models need no new graph.

        Args:
            model: Plain model with the weights that the update was trained on.
            check_base: Compare their digests first.

        Raises:
            RuntimeError: The patch is applied already.
            ValueError: The model lacks a parameter, has it in another shape, or has other weights.
        """
        if self._model is not None:
            raise RuntimeError("the patch is applied already; call remove() first")
        tensors = _named_tensors(model)
        self._check(model, tensors, check_base)
        for name, one in self.entries.items():
            flat, where = _flat(tensors[name]), one.indices.to(tensors[name].device)
            before = flat[where]
            self._originals[name] = before
            values = one.values.to(flat.device, torch.promote_types(one.values.dtype, torch.float32))
            flat[where] = (before.to(values.dtype) + values).to(flat.dtype)
            _write_back(tensors[name], flat)
        for name, value in self.replaced.items():
            self._originals[name] = tensors[name].detach().clone()
            tensors[name].copy_(value)
        self._model = model

    @torch.no_grad()
    def remove(self) -> None:
        """Restore every bit that `apply` found; what is changed beside it since then stays.

        Raises:
            RuntimeError: The patch is not applied.
        """
        if self._model is None:
            raise RuntimeError("the patch is not applied; call apply(model) first")
        tensors = _named_tensors(self._model)
        for name, before in self._originals.items():
            if name in self.entries:
                flat = _flat(tensors[name])
                flat[self.entries[name].indices.to(flat.device)] = before.to(flat.device)
                _write_back(tensors[name], flat)
            else:
                tensors[name].copy_(before)
        self._model, self._originals = None, {}

    def _check(self, model: nn.Module, tensors: Mapping[str, Tensor], check_base: bool) -> None:
        """Refuse a model that the patch was not made for, before anything is changed."""
        shapes = {**self.shapes, **{name: list(tensor.shape) for name, tensor in self.replaced.items()}}
        errors = [f"{name} is missing" for name in shapes if name not in tensors]
        errors += [
            f"{name} is {list(tensors[name].shape)} where the update has {shape}"
            for name, shape in shapes.items()
            if name in tensors and list(tensors[name].shape) != shape
        ]
        what = type(model).__name__
        if errors:
            raise ValueError(f"the update does not fit {what}: {listed(errors, 3, '; ')}; build the run's own model")
        for name, digest in self.digests.items() if check_base else ():
            if digest_of(tensors[name]) != digest:
                raise ValueError(
                    f"{what} has other weights in {name!r} than the update was trained on; load the run's own "
                    "pre-trained weights without adapters, or pass check_base=False"
                )


def load_sparse(model: nn.Module, file: str | Path, *, check_base: bool = True) -> SparsePatch:
    """Apply a file of `snella export --format sparse` to a plain model.

        patch = load_sparse(model, "photos.sparse.safetensors")   # the fine-tuned weights, bit for bit
        patch.remove()                                            # the pre-trained ones again, bit for bit

    Args:
        model: The run's backbone with its pre-trained weights and a head of as many classes.
        file: The file.
        check_base: Refuse a model whose weights are not those that the update was trained on, by their digests.

    Returns:
        The patch, with `remove` and `apply`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged or of another kind, or the model does not fit.
    """
    patch = SparsePatch.read(file)
    patch.apply(model, check_base=check_base)
    return patch


def digest_of(tensor: Tensor) -> str:
    """First digits of the SHA-256 of a tensor's bytes."""
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(content.data).hexdigest()[:_DIGITS]


def tensors_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """SHA-256 of the names, types, shapes and values of tensors and of metadata, in any order."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name}\n{tensor.dtype}\n{list(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    total.update(json.dumps(sorted(metadata.items())).encode() if metadata else b"")
    return total.hexdigest()


def encode_positions(indices: Tensor, size: int) -> tuple[str, Tensor]:
    """The smallest of three encodings of ascending positions below `size`: its name and its tensor."""
    positions = indices.cpu()
    # 4 bytes a position, at least 1, or a bit for every weight; the gaps are computed only where they can win
    least = min(4 * len(positions), -(-size // 8))
    if len(positions) < least:
        gaps = _encode_gaps(positions.numpy())
        if len(gaps) < least:
            return "gaps", torch.from_numpy(gaps)
    if -(-size // 8) < 4 * len(positions):
        return "bitmap", pack_positions(positions, size)
    return "int32", positions.int()


def _encode_gaps(indices: np.ndarray) -> np.ndarray:
    """How many weights stay unchanged before each changed one, as LEB128: seven bits a byte, the lowest first."""
    gaps = np.diff(indices, prepend=-1) - 1
    lengths = np.ones(len(gaps), np.int64)
    for bits in (7, 14, 21, 28):
        lengths += gaps >= 1 << bits
    starts = np.cumsum(lengths) - lengths
    result = np.empty(int(lengths.sum()), np.uint8)
    for place in range(5):
        longer = lengths > place
        more = (lengths[longer] > place + 1) * 128
        result[starts[longer] + place] = (gaps[longer] >> 7 * place) & 127 | more
    return result


def _decode_gaps(encoded: Tensor) -> Tensor:
    """The positions that `_encode_gaps` was given."""
    content = encoded.numpy()
    ends = np.flatnonzero(content < 128)
    starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)
    gaps = np.zeros(len(ends), np.int64)
    for place in range(5):
        inside = starts + place <= ends
        gaps[inside] |= (content[starts[inside] + place].astype(np.int64) & 127) << 7 * place
    return torch.from_numpy(np.cumsum(gaps + 1) - 1)


_DECODERS = {"int32": lambda encoded: encoded, "gaps": _decode_gaps, "bitmap": unpack_positions}


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, also of a compiled model."""
    inner: nn.Module = getattr(model, "_orig_mod", model)
    return dict(inner.state_dict(keep_vars=True))


def _flat(tensor: Tensor) -> Tensor:
    """The values in order; a view where the memory allows it."""
    return tensor.detach().reshape(-1)


def _write_back(tensor: Tensor, flat: Tensor) -> None:
    """Store `_flat`'s values where it had to copy them."""
    if flat.data_ptr() != tensor.data_ptr():
        tensor.copy_(flat.view(tensor.shape))
    elif not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


__all__ = ["Entries", "SparsePatch", "load_sparse"]
