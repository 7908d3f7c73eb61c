"""Int8 compression of activations."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from snella.memory.origins import GROUP, decode, encode


@given(st.integers(1, 5), st.floats(1e-30, 1e30), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 99))
def test_error_is_at_most_half_a_quantization_step(groups, size, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    z = (torch.randn(groups, GROUP, dtype=torch.float64, generator=generator) * size).to(dtype)
    z[0, 0] *= 100  # an outlier, which affects only its group
    encoded, layout = encode(z)
    decoded = decode(encoded, layout)
    assert (decoded.dtype, decoded.shape) == (dtype, z.shape)
    assert encoded.nbytes == z.numel() + 4 * groups
    half = z.abs().amax(1, keepdim=True) / 127 / 2
    assert ((decoded - z).abs() <= half * (1 + 1e-5)).all()


def test_half_precision_and_zeros_are_supported():
    for dtype in (torch.float16, torch.bfloat16):
        z = torch.randn(4, GROUP, dtype=dtype)
        z[1] = 0
        decoded = decode(*encode(z))
        assert decoded.dtype == dtype
        assert (decoded[1] == 0).all()
        assert (decoded - z).abs().max() < 0.03


def test_encoding_is_idempotent():
    z = torch.randn(6, GROUP)
    once = decode(*encode(z))
    torch.testing.assert_close(decode(*encode(once)), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("axes", [(1, 0, 2), (0, 2, 1), (2, 0, 1)])
def test_views_are_encoded_in_memory_order(axes):
    memory = torch.randn(8, 3, GROUP)
    z = memory.permute(axes)
    decoded = decode(*encode(z))
    assert torch.equal(decoded, decode(*encode(memory)).permute(axes))
    assert decoded.stride() == z.stride()


@pytest.mark.parametrize("entries", [0, 1, GROUP - 1, GROUP + 1])
def test_last_group_is_padded(entries):
    z = torch.randn(entries, 1)
    encoded, layout = encode(z)
    assert encoded.nbytes == -(-entries // GROUP) * (GROUP + 4)
    torch.testing.assert_close(decode(encoded, layout), z, rtol=0, atol=0.02)


@pytest.mark.parametrize("width", [1, 12, GROUP, GROUP + 1, 96, 5 * GROUP])
def test_by_row_scales_do_not_cross_rows(width):
    z = torch.randn(2, 3, width) * 10.0 ** torch.arange(0, -6, -1).view(2, 3, 1)
    encoded, layout = encode(z, by_row=True)
    groups = -(-width // GROUP)
    size = -(-width // groups)
    assert encoded.nbytes == 6 * groups * (size + 4)
    decoded = decode(encoded, layout)
    assert ((decoded - z).abs() <= z.abs().amax(-1, keepdim=True) / 127 / 2 * (1 + 1e-5)).all()


def test_by_row_falls_back_to_memory_order_for_strided_rows():
    memory = torch.randn(8, 3, 12)
    z = memory.mT
    assert torch.equal(decode(*encode(z, by_row=True)), decode(*encode(memory)).mT)
