"""Sparse weight files: round trip and corruption."""

import json

import pytest
import torch
from safetensors.torch import load, save

from snella.compat.sparse_file import Entries, SparsePatch, decode_positions, encode_positions, tensors_digest

POSITIONS = {"gaps": range(0, 400, 40), "bitmap": range(0, 400, 2), "int32": []}
SHAPES = {"gaps": [20, 20], "bitmap": [20, 20], "int32": [1, 1]}


def make() -> SparsePatch:
    """Create a patch with several position encodings and a replaced tensor."""
    torch.manual_seed(0)
    entries = {
        name: Entries(torch.tensor(list(where), dtype=torch.long), torch.randn(len(where)))
        for name, where in POSITIONS.items()
    }
    return SparsePatch(entries, {"head": torch.randn(3)}, SHAPES, {"gaps": "0123"}, {"classes": json.dumps(["a", "b"])})


def assert_same(patch: SparsePatch, expected: SparsePatch) -> None:
    for name, entries in expected.entries.items():
        assert torch.equal(patch.entries[name].indices, entries.indices)
        assert torch.equal(patch.entries[name].values, entries.values)
    assert torch.equal(patch.replaced["head"], expected.replaced["head"])
    assert (patch.shapes, patch.digests) == (expected.shapes, expected.digests)
    assert patch.metadata == expected.metadata


def test_file_round_trip_preserves_the_patch(tmp_path):
    sizes = {name: rows * columns for name, (rows, columns) in SHAPES.items()}
    positions = {name: torch.tensor(list(where), dtype=torch.long) for name, where in POSITIONS.items()}
    encodings = {name: encode_positions(where, sizes[name])[0] for name, where in positions.items()}
    assert encodings == {name: name for name in POSITIONS}
    path = tmp_path / "m.safetensors"
    path.write_bytes(make().to_bytes())
    assert_same(SparsePatch.read(path), make())


@pytest.mark.parametrize("flip", [1, 128])
def test_every_flipped_byte_is_detected(tmp_path, flip):
    path, content = tmp_path / "m.safetensors", make().to_bytes()
    refused = 0
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ flip]) + content[position + 1 :])
        try:
            patch = SparsePatch.read(path)
        except ValueError as error:
            assert "is damaged" in str(error) or "contains no sparse update" in str(error)
            refused += 1
        else:
            assert_same(patch, make())
    assert refused > 0.9 * len(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop("gaps:gaps"),
            r"'gaps' has positions in 0 encodings, expected one of \['int32',",
        ),
        (
            lambda tensors: tensors.update({"gaps:gaps": torch.zeros(9, dtype=torch.uint8)}),
            "has 9 positions and 10 values",
        ),
        (
            lambda tensors: tensors.update({"gaps:gaps": torch.full((10,), 90, dtype=torch.uint8)}),
            r"'gaps' has positions that do not ascend in \[0, 399\]",
        ),
    ],
    ids=["missing", "fewer-positions", "out-of-range"],
)
def test_invalid_positions_with_valid_digest_raise(tmp_path, change, message):
    path, content = tmp_path / "m.safetensors", make().to_bytes()
    tensors = load(content)
    metadata = {"format": "snella-sparse-1", "shapes": json.dumps(SHAPES), "digests": "{}"}
    change(tensors)
    path.write_bytes(save(tensors, {**metadata, "sha256": tensors_digest(tensors, metadata)}))
    with pytest.raises(ValueError, match=rf"m.safetensors is damaged: .*{message}"):
        SparsePatch.read(path)


def test_file_without_digest_raises(tmp_path):
    path, tensors = tmp_path / "m.safetensors", load(make().to_bytes())
    path.write_bytes(save(tensors, {"format": "snella-sparse-1", "shapes": json.dumps(SHAPES), "digests": "{}"}))
    with pytest.raises(ValueError, match=r"is damaged: its metadata has no .*; export it again"):
        SparsePatch.read(path)


def test_file_with_another_format_raises(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(save({"a": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"m.safetensors contains no sparse update; create one with snella export RUN"):
        SparsePatch.read(path)


def test_equal_patches_have_equal_bytes():
    assert len({make().to_bytes() for _ in range(12)}) == 1  # safetensors writes metadata in random order


def test_bitmap_starts_with_the_lowest_bit():
    kind, encoded = encode_positions(torch.tensor([0, 7, 8, 18]), 19)
    assert (kind, encoded.tolist()) == ("bitmap", [0b10000001, 0b00000001, 0b00000100])
    assert decode_positions(kind, encoded).tolist() == [0, 7, 8, 18]


def test_large_positions_do_not_overflow():
    positions = torch.tensor([2**31 + 5])
    assert torch.equal(decode_positions(*encode_positions(positions, 2**32)), positions)


def test_patch_is_removed_from_a_model_cast_after_apply():
    model = torch.nn.Linear(2, 1)
    expected = model.weight.detach().bfloat16()
    patch = SparsePatch({"weight": Entries(torch.tensor([1]), torch.tensor([0.25]))}, shapes={"weight": [1, 2]})
    patch.apply(model)
    model.bfloat16()
    patch.remove()
    assert torch.equal(model.weight, expected)


def test_values_are_added_in_the_precision_of_a_float64_weight():
    model = torch.nn.Linear(2, 1, dtype=torch.float64)
    weight = model.weight.detach().clone()
    patch = SparsePatch({"weight": Entries(torch.tensor([1]), torch.tensor([0.25]))}, shapes={"weight": [1, 2]})
    patch.apply(model)
    assert torch.equal(model.weight, weight + torch.tensor([0, 0.25]))


def test_tied_tensors_are_restored():
    model = torch.nn.ModuleDict({"head": torch.nn.Linear(2, 2), "tied": torch.nn.Linear(2, 2)})
    model["tied"].weight = model["head"].weight
    original, new = model["head"].weight.detach().clone(), torch.ones(2, 2)
    patch = SparsePatch({}, {"head.weight": new, "tied.weight": new})
    patch.apply(model)
    assert torch.equal(model["head"].weight, new)
    patch.remove()
    assert torch.equal(model["head"].weight, original)


def test_tensors_that_share_memory_are_saved(tmp_path):
    tied, path = torch.arange(6.0), tmp_path / "m.safetensors"
    path.write_bytes(SparsePatch({}, {"head": tied, "tied": tied, "part": tied[1:3]}).to_bytes())
    replaced = SparsePatch.read(path).replaced
    assert torch.equal(replaced["head"], tied) and torch.equal(replaced["tied"], tied)
    assert torch.equal(replaced["part"], tied[1:3])


def test_no_positions_are_encoded_as_no_bytes():
    assert decode_positions("gaps", torch.zeros(0, dtype=torch.uint8)).tolist() == []


def test_a_folder_or_missing_file_raises(tmp_path):
    remedy = "a sparse file is written by snella export RUN --format sparse"
    for path, kind in ((tmp_path, "is a folder"), (tmp_path / "no.safetensors", "does not exist")):
        with pytest.raises(FileNotFoundError, match=rf"{path.name} {kind}; {remedy}"):
            SparsePatch.read(path)
