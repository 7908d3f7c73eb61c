"""Sparse weight files, which store the difference between a fine-tuned and a pre-trained model as a reversible patch.

The patch contains the positions and changes of individual weights, and new values of parameters that are replaced
entirely, such as those of the head. It applies to the model without adapters.
"""

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

from snella._utils import listed

FORMAT = "snella-sparse-1"
ValueDtype = Literal["fp32", "bf16"]
_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
_ENCODINGS = ["int32", "gaps", "bitmap"]  # of positions, see `SparsePatch.to_bytes`
_VALUES = "values"
_DIGEST = "sha256"
_DIGEST_LENGTH = 16  # hex digits, enough to detect a wrong base model, but not to prevent forgery


@dataclass(frozen=True)
class Entries:
    """Changes to selected entries of one parameter.

        W[indices[k]] += values[k]

    Args:
        indices: Positions in the flattened parameter, ascending, `[K]`, int64.
        values: Changes at these positions, `[K]`, float32 or bfloat16.
    """

    indices: Tensor
    values: Tensor


@dataclass
class SparsePatch:
    """Reversible patch that turns the weights of a pre-trained model into the weights of a fine-tuned model.

    Args:
        entries: Changed entries, by parameter name.
        replaced: New values of fully replaced parameters and buffers, by name, e.g. of a head.
        shapes: Shape of each parameter in `entries`.
        digests: Prefix of the SHA-256 digest of each original parameter in `entries`.
        metadata: Additional metadata of the file.
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
        """Serialize the patch in safetensors format.

        The positions in a parameter `NAME` are stored in the smallest of three encodings: `NAME:int32`, `NAME:gaps`
        (the numbers of unchanged weights between successive changed weights, as LEB128), or `NAME:bitmap` (one bit per
        weight). The changes are stored as `NAME:values`, and replaced tensors as `NAME`. The metadata entry `sha256` is
        the digest of all other content.

        Args:
            values: Dtype of the stored changes. With bf16, they are rounded. Replaced tensors keep their dtype.

        Raises:
            ValueError: If the dtype is unknown, or positions are not ascending and unique.
        """
        if values not in _DTYPES:
            raise ValueError(f"values must be one of {list(get_args(ValueDtype))}, got {values!r}")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.replaced.items()}
        for name, changed in self.entries.items():
            kind, positions = encode_positions(changed.indices, math.prod(self.shapes[name]))
            tensors[f"{name}:{kind}"] = positions
            tensors[f"{name}:{_VALUES}"] = changed.values.detach().cpu().to(_DTYPES[values])
        header = {"format": FORMAT, "shapes": json.dumps(self.shapes), "digests": json.dumps(self.digests)}
        metadata = {**self.metadata, **header}
        return tensors_bytes(tensors, {**metadata, _DIGEST: tensors_digest(tensors, metadata)})

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a file that contains the result of `to_bytes`.

        Raises:
            FileNotFoundError: If the file does not exist.
            ValueError: If the file is corrupt or has a different format.
        """
        if not Path(path).is_file():
            kind = "is a folder" if Path(path).is_dir() else "does not exist"
            raise FileNotFoundError(f"{path} {kind}; a sparse file is written by snella export RUN --format sparse")
        try:
            with safe_open(path, "pt") as file:
                metadata = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}; export it again") from None
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} contains no sparse update; create one with snella export RUN --format sparse")
        stored_digest = metadata.pop(_DIGEST, None)
        digest = tensors_digest(tensors, metadata)
        metadata.pop("format")
        if stored_digest is None:
            raise ValueError(f"{path} is damaged: its metadata has no {_DIGEST}; export it again")
        if digest != stored_digest:
            raise ValueError(f"{path} is damaged: its SHA-256 is {digest}, expected {stored_digest}; export it again")
        try:
            return cls._parse(tensors, metadata)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}; export it again") from None

    @classmethod
    def _parse(cls, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Self:
        """Create a patch from a file's tensors and metadata; entries that have been read are removed from both."""
        shapes = json.loads(metadata.pop("shapes"))
        digests = json.loads(metadata.pop("digests"))
        entries = {}
        for key in [key for key in tensors if key.endswith(f":{_VALUES}")]:
            name = key.removesuffix(f":{_VALUES}")
            values = tensors.pop(key)
            encodings = [encoding for encoding in _ENCODINGS if f"{name}:{encoding}" in tensors]
            if len(encodings) != 1:
                raise ValueError(f"{name!r} has positions in {len(encodings)} encodings, expected one of {_ENCODINGS}")
            (encoding,) = encodings
            indices = decode_positions(encoding, tensors.pop(f"{name}:{encoding}"))
            if len(indices) != len(values):
                raise ValueError(f"{name!r} has {len(indices)} positions and {len(values)} values")
            size = math.prod(shapes[name])
            if not _are_ascending(indices, size):
                raise ValueError(f"{name!r} has positions that do not ascend in [0, {size - 1}]")
            entries[name] = Entries(indices, values)
        replaced = tensors  # the remaining tensors
        return cls(entries, replaced, shapes, digests, metadata)

    # model ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def apply(self, model: nn.Module, *, check_base: bool = True) -> None:
        """Apply the patch in place, so that compiled models do not recompile.

        Args:
            model: Model without adapters, with the pre-trained weights that the patch was created for.
            check_base: If True, compare the weights' digests first.

        Raises:
            RuntimeError: If the patch is already applied.
            ValueError: If a tensor of the patch is missing from the model or has a different shape there, or if
                `check_base` finds a different digest.
        """
        if self._model is not None:
            raise RuntimeError("the patch is already applied; call remove() first")
        tensors = _named_tensors(model)
        self._check(model, tensors, check_base)
        for name, changed in self.entries.items():
            flat = _flat(tensors[name])
            positions = changed.indices.to(tensors[name].device)
            original = flat[positions]
            self._originals[name] = original
            # add in at least float32
            dtype = torch.promote_types(torch.promote_types(flat.dtype, changed.values.dtype), torch.float32)
            total = original.to(dtype) + changed.values.to(flat.device, dtype)
            flat[positions] = total.to(flat.dtype)
            _write_back(tensors[name], flat)
        for name, value in self.replaced.items():
            self._originals[name] = tensors[name].detach().clone()
            tensors[name].copy_(value)
        self._model = model

    @torch.no_grad()
    def remove(self) -> None:
        """Restore the changed entries and replaced tensors bit for bit; other entries keep their current values.

        Raises:
            RuntimeError: If the patch is not applied.
        """
        if self._model is None:
            raise RuntimeError("the patch is not applied; call apply(model) first")
        tensors = _named_tensors(self._model)
        # in reverse order, because a tied tensor was patched once for each of its names
        for name, original in reversed(self._originals.items()):
            if name in self.entries:
                flat = _flat(tensors[name])
                positions = self.entries[name].indices.to(flat.device)
                flat[positions] = original.to(flat)  # the model may have been cast or moved since `apply`
                _write_back(tensors[name], flat)
            else:
                tensors[name].copy_(original)
        self._model = None
        self._originals = {}

    def _check(self, model: nn.Module, tensors: Mapping[str, Tensor], check_base: bool) -> None:
        """Raise `ValueError` if a model does not match the patch; compare digests only if `check_base`."""
        expected_shapes = {**self.shapes, **{name: list(tensor.shape) for name, tensor in self.replaced.items()}}
        errors = [f"{name} is missing" for name in expected_shapes if name not in tensors]
        errors += [
            f"{name} has shape {list(tensors[name].shape)}, but the update has {shape}"
            for name, shape in expected_shapes.items()
            if name in tensors and list(tensors[name].shape) != shape
        ]
        model_name = type(model).__name__
        if errors:
            raise ValueError(f"the update does not fit {model_name}: {listed(errors, 3, '; ')}; pass the run's model")
        for name, digest in self.digests.items() if check_base else ():
            if digest_of(tensors[name]) != digest:
                raise ValueError(
                    f"the weights {name!r} of {model_name} differ from the weights that the update was trained on; "
                    "load the run's pre-trained weights without adapters, or pass check_base=False"
                )


def load_sparse(model: nn.Module, file: str | Path, *, check_base: bool = True) -> SparsePatch:
    """Apply a file written by `snella export --format sparse` to a pre-trained model.

        patch = load_sparse(model, "photos.sparse.safetensors")   # the fine-tuned weights, exact with fp32 values
        patch.remove()                                            # the pre-trained weights, bit for bit

    Args:
        model: Backbone of the run, with its pre-trained weights and a head with the same number of classes.
        file: Path of the file.
        check_base: If True, check that the digests of the weights that change equal the digests in the file.

    Returns:
        The applied patch. Its `remove` restores the pre-trained weights.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is corrupt or has a different format, or the model does not match.
    """
    patch = SparsePatch.read(file)
    patch.apply(model, check_base=check_base)
    return patch


def digest_of(tensor: Tensor) -> str:
    """Return a prefix of the SHA-256 digest of a tensor's bytes."""
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(content.data).hexdigest()[:_DIGEST_LENGTH]


def tensors_bytes(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Serialize tensors in safetensors format with sorted metadata, so that equal content gives equal bytes.

    `safetensors.torch.save` writes metadata entries in random order.
    """
    content = save(_without_shared_memory(tensors), dict(metadata))
    # the file starts with the length of the JSON header in 8 bytes
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    header_bytes = json.dumps(header, separators=(",", ":")).encode()
    num_spaces = -len(header_bytes) % 8  # align the tensors
    header_bytes += b" " * num_spaces
    return len(header_bytes).to_bytes(8, "little") + header_bytes + content[end:]


def tensors_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Return the order-independent SHA-256 digest of tensors (names, dtypes, shapes, values) and metadata."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\n{tensor.dtype}\n{list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    digest.update(json.dumps(sorted(metadata.items())).encode() if metadata else b"")
    return digest.hexdigest()


def encode_positions(indices: Tensor, size: int) -> tuple[str, Tensor]:
    """Return the smallest of three encodings of ascending positions below `size`: its name and the encoded tensor."""
    positions = indices.cpu()
    if len(positions) > 1 and not bool((positions.diff() > 0).all()):
        raise ValueError("positions must be ascending and unique")
    candidates = {"int32": positions.int()} if size <= 1 << 31 else {}
    bitmap_bytes = -(-size // 8)
    int32_bytes = 4 * len(positions)
    if bitmap_bytes < int32_bytes:
        mask = np.zeros(size, np.bool_)
        mask[positions.numpy()] = True
        candidates["bitmap"] = torch.from_numpy(np.packbits(mask, bitorder="little"))
    candidates["gaps"] = torch.from_numpy(_encode_gaps(positions.numpy()))
    smallest = min(candidates, key=lambda encoding: candidates[encoding].nbytes)
    return smallest, candidates[smallest]


def decode_positions(kind: str, encoded: Tensor) -> Tensor:
    """Return the positions, int64, from the result of `encode_positions`."""
    if kind == "int32":
        return encoded.long()
    content = encoded.numpy()
    if kind == "bitmap":
        return torch.from_numpy(np.flatnonzero(np.unpackbits(content, bitorder="little")))
    # only the last byte of a gap lacks the continuation bit, 128
    ends = np.flatnonzero(content < 128)
    starts = np.concatenate([[0], ends + 1])[: len(ends)].astype(np.int64)
    gaps = np.zeros(len(ends), np.int64)
    for byte_index in range(5):
        has_byte = starts + byte_index <= ends
        gaps[has_byte] |= (content[starts[has_byte] + byte_index].astype(np.int64) & 127) << 7 * byte_index
    return torch.from_numpy(np.cumsum(gaps + 1) - 1)


def _are_ascending(positions: Tensor, size: int) -> bool:
    """Return whether positions ascend strictly and lie in `[0, size)`."""
    if len(positions) == 0:
        return True
    is_within = int(positions[0]) >= 0 and int(positions[-1]) < size
    return is_within and bool((positions.diff() > 0).all())


def _encode_gaps(positions: np.ndarray) -> np.ndarray:
    """Encode the gaps between successive positions as LEB128, with 7 bits per byte and the lowest bits first.

    A gap is the number of unchanged weights between a changed weight and the previous one, or the start. At most five
    bytes per gap are written, enough for gaps below 2³⁵.
    """
    gaps = np.diff(positions, prepend=-1) - 1
    lengths = np.ones(len(gaps), np.int64)
    for bits in (7, 14, 21, 28):
        lengths += gaps >= 1 << bits
    starts = np.cumsum(lengths) - lengths
    result = np.empty(int(lengths.sum()), np.uint8)
    for byte_index in range(5):
        has_byte = lengths > byte_index
        continuation = (lengths[has_byte] > byte_index + 1) * 128
        result[starts[has_byte] + byte_index] = (gaps[has_byte] >> 7 * byte_index) & 127 | continuation
    return result


def _without_shared_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share memory with an earlier tensor, e.g. tied weights, because safetensors rejects them."""
    addresses: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if address in addresses else tensor
        addresses.add(address)
    return separate


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters and persistent buffers by name, without the prefix of `torch.compile`."""
    inner: nn.Module = getattr(model, "_orig_mod", model)  # the model inside a compiled model
    return dict(inner.state_dict(keep_vars=True))


def _flat(tensor: Tensor) -> Tensor:
    """Return a tensor's flattened values, as a view if possible."""
    return tensor.detach().reshape(-1)


def _write_back(tensor: Tensor, flat: Tensor) -> None:
    """Write the result of `_flat` back if it is a copy."""
    if flat.data_ptr() != tensor.data_ptr():
        tensor.copy_(flat.view(tensor.shape))


__all__ = ["Entries", "SparsePatch", "load_sparse"]
