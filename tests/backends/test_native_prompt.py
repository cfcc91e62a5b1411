"""Sums over a prompt in C, against PyTorch's operators."""

from __future__ import annotations

import pytest
import torch

from corematching.backends.cpu.native import find_library, sum_rows

pytestmark = pytest.mark.skipif(find_library() is None, reason="no C compiler")

DTYPES = (torch.float32, torch.bfloat16)


def draw(*shape, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return (scale * torch.randn(*shape, generator=generator)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("what", ["values", "sizes", "unit squares"])
def test_sums(dtype, batch, what):
    values = draw(batch, 9, 37, dtype=dtype)
    values[:, 4] = 0
    tokens = torch.arange(9 * batch).view(batch, 9) % 4 != 0
    wide = values.double() * tokens.unsqueeze(-1)
    squares = wide.square() / wide.square().sum(-1, keepdim=True).clamp(min=1e-24)
    expected = {"values": wide, "sizes": wide.abs(), "unit squares": squares}[what].sum(1)
    found = sum_rows(values, tokens, what)
    assert found is not None and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_sums_do_not_depend_on_the_number_of_threads():
    values, tokens = draw(2, 50, 130, dtype=torch.bfloat16), torch.ones(2, 50, dtype=torch.bool)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(sum_rows(values, tokens, "unit squares"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_values_that_do_not_count_are_not_read():
    values = draw(1, 4, 8)
    values[0, 2] = torch.nan
    tokens = torch.tensor([[True, True, False, True]])
    for what in ("values", "sizes", "unit squares"):
        assert bool(sum_rows(values, tokens, what).isfinite().all())


@pytest.mark.parametrize(
    "values",
    [torch.ones(1, 3, 4, dtype=torch.float16), torch.ones(1, 4, 3).transpose(1, 2)],
    ids=["float16", "transposed"],
)
def test_what_cannot_be_read_is_left_to_pytorch(values):
    assert sum_rows(values, torch.ones(1, 3, dtype=torch.bool), "values") is None
