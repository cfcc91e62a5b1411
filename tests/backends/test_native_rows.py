"""Norms and rotary embedding round as PyTorch's operators do."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from corematching.backends.cpu.native import Norm, apply_rope, normalize

BF16 = torch.bfloat16
pytestmark = pytest.mark.usefixtures("isa")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def draw(*shape, scale=1.0, dtype=BF16):
    return (scale * torch.randn(*shape)).to(dtype)


def differ(ours, theirs):
    """The error's norm over the norm, and the share of numbers that are not equal."""
    error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
    return float(error), float((ours != theirs).float().mean())


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("shape", [(1, 7, 33), (2, 40, 576)])
def test_norms(dtype, shape):
    norm = LlamaRMSNorm(shape[-1], eps=1e-5).to(dtype)
    norm.weight.data = draw(shape[-1], dtype=dtype)
    x = draw(*shape, scale=3.0, dtype=dtype)
    with torch.no_grad():
        error, unequal = differ(normalize(x, Norm(norm.weight, 1e-5)), norm(x))
    assert error < (1e-6 if dtype == torch.float32 else 1e-3)
    assert unequal < 0.02 or dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("shape", [(1, 7, 33), (2, 40, 576)])
def test_layer_norms(dtype, shape):
    x, width = 4 + draw(*shape, scale=3.0, dtype=dtype), shape[-1]
    weight, bias = draw(width, dtype=dtype), draw(width, dtype=dtype)
    theirs = F.layer_norm(x, [width], weight, bias, 1e-5)
    error, unequal = differ(normalize(x, Norm(weight, 1e-5, bias)), theirs)
    assert error < (1e-6 if dtype == torch.float32 else 1e-3)
    assert unequal < 0.02 or dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("rows", [1, 2])
def test_rope(dtype, rows):
    x = draw(2, 9, 7, 16, dtype=dtype)
    cos, sin = draw(rows, 9, 16, dtype=dtype), draw(rows, 9, 16, dtype=dtype)
    queries, keys, values = x.clone().transpose(1, 2).split([3, 2, 2], dim=1)
    query, key, value = apply_rope(x, cos, sin, 2)
    turned = apply_rotary_pos_emb(queries, keys, cos, sin)
    torch.testing.assert_close((query, key), turned)
    assert torch.equal(value, values) and key.is_contiguous() and value.is_contiguous()
