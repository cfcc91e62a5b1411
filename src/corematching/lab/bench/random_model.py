"""A shape filled with random weights, made on the device in place."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from corematching.lab.bench.shapes import Shape

logger = logging.getLogger(__name__)

BLOCK = 1_000_003
"""A prime, so that no two rows of a weight repeat in step."""
SPREAD = 0.02


def build_random(shape: Shape, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Build a shape's model with random weights; nothing is downloaded and no file is written.

    Matrices are drawn with standard deviation 0.02 from one block of random numbers, over and over;
    vectors are 1 where they scale and 0 where they shift.

    Parameters
    ----------
    shape : Shape
    device : str
        Where the weights are made; at no time do they exist anywhere else.
    dtype : torch.dtype
        Of the weights.

    Returns
    -------
    PreTrainedModel
        In eval mode; it never stops an answer by itself.
    """
    import transformers
    from accelerate import init_empty_weights

    kind = getattr(transformers, shape.model)
    with init_empty_weights(include_buffers=False):
        model = kind(shape.make_config())
    model.tie_weights()
    fill(model, torch.device(device), dtype)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    count = sum(parameter.numel() for parameter in model.parameters())
    logger.info("%s: %.2f billion random weights on %s", shape.name, count / 1e9, device)
    return model.eval()


@torch.no_grad()
def fill(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Replace every weight that exists by shape only; weights that are shared stay shared."""
    draw = torch.Generator(device=device).manual_seed(0)
    block = torch.randn(BLOCK, generator=draw, device=device).mul_(SPREAD).to(dtype)
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                empty = torch.empty(parameter.shape, device=device, dtype=dtype)
                value = _fill_vector(empty, name) if empty.dim() < 2 else _repeat(block, empty)
                made[id(parameter)] = nn.Parameter(value, requires_grad=False)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def _fill_vector(empty: Tensor, name: str) -> Tensor:
    return empty.zero_() if "bias" in name else empty.fill_(1.0)


def _repeat(block: Tensor, empty: Tensor) -> Tensor:
    flat = empty.view(-1)
    whole = flat.numel() // block.numel() * block.numel()
    flat[:whole].view(-1, block.numel()).copy_(block)
    flat[whole:].copy_(block[: flat.numel() - whole])
    return empty
