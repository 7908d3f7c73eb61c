"""Activations in eight bits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from snella.memory.compression import GROUP, decode, encode


@given(st.integers(1, 5), st.floats(1e-30, 1e30), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 99))
def test_an_entry_is_off_by_half_a_step_of_its_group_at_most(groups, size, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    z = (torch.randn(groups, GROUP, dtype=torch.float64, generator=generator) * size).to(dtype)
    z[0, 0] *= 100  # stands out, and costs its own group alone
    encoded, layout = encode(z)
    back = decode(encoded, layout)
    assert (back.dtype, back.shape) == (dtype, z.shape)
    assert encoded.nbytes == z.numel() + 4 * groups
    half = z.abs().amax(1, keepdim=True) / 127 / 2
    assert ((back - z).abs() <= half * (1 + 1e-5)).all()


def test_half_precision_and_zeros():
    for dtype in (torch.float16, torch.bfloat16):
        z = torch.randn(4, GROUP, dtype=dtype)
        z[1] = 0
        back = decode(*encode(z))
        assert back.dtype == dtype
        assert (back[1] == 0).all()
        assert (back - z).abs().max() < 0.03


def test_what_was_encoded_once_stays():
    z = torch.randn(6, GROUP)
    once = decode(*encode(z))
    torch.testing.assert_close(decode(*encode(once)), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("axes", [(1, 0, 2), (0, 2, 1), (2, 0, 1)])
def test_views_are_encoded_and_decoded_in_the_order_of_memory(axes):
    memory = torch.randn(8, 3, GROUP)
    z = memory.permute(axes)
    back = decode(*encode(z))
    assert torch.equal(back, decode(*encode(memory)).permute(axes))
    assert back.stride() == z.stride()


@pytest.mark.parametrize("entries", [0, 1, GROUP - 1, GROUP + 1])
def test_the_last_group_may_have_gaps(entries):
    z = torch.randn(entries, 1)
    encoded, layout = encode(z)
    assert encoded.nbytes == -(-entries // GROUP) * (GROUP + 4)
    torch.testing.assert_close(decode(encoded, layout), z, rtol=0, atol=0.02)


@pytest.mark.parametrize("width", [1, 12, GROUP, GROUP + 1, 96, 5 * GROUP])
def test_by_row_no_entry_is_rounded_by_the_scale_of_another_row(width):
    z = torch.randn(2, 3, width) * 10.0 ** torch.arange(0, -6, -1).view(2, 3, 1)
    encoded, layout = encode(z, by_row=True)
    groups = -(-width // GROUP)
    size = -(-width // groups)
    assert encoded.nbytes == 6 * groups * (size + 4)
    back = decode(encoded, layout)
    assert ((back - z).abs() <= z.abs().amax(-1, keepdim=True) / 127 / 2 * (1 + 1e-5)).all()


def test_rows_that_do_not_lie_innermost_in_memory_are_encoded_in_the_order_of_memory():
    memory = torch.randn(8, 3, 12)
    z = memory.mT
    assert torch.equal(decode(*encode(z, by_row=True)), decode(*encode(memory)).mT)
