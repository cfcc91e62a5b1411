from __future__ import annotations

import pytest
import torch

from corematching.demo import cache
from corematching.devices import product_dtype

BF16 = torch.bfloat16


@pytest.mark.parametrize("has", [True, False])
def test_products_are_in_what_the_processor_multiplies(monkeypatch, has):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has)
    assert product_dtype("cpu", BF16) == (BF16 if has else torch.float32)
    assert product_dtype(torch.device("cpu"), torch.float32) == torch.float32
    assert product_dtype(torch.device("cuda"), BF16) == BF16


@pytest.mark.parametrize("has", [True, False])
def test_the_demo_loads_in_what_the_processor_multiplies(monkeypatch, has):
    asked = []

    class Model:
        def to(self, device):
            return self

    def load(loader, path, dtype):
        asked.append(dtype)
        return Model()

    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has)
    monkeypatch.setattr(cache, "demo_directory", lambda *_, **__: "nowhere")
    monkeypatch.setattr(cache, "load_weights", load)
    monkeypatch.setattr(cache, "load_processor", lambda *_, **__: None)
    cache.load_demo(device="cpu")
    cache.load_demo(torch.float16, device="cpu")
    assert asked == [BF16 if has else torch.float32, torch.float16]
