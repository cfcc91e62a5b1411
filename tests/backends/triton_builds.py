"""The Triton kernels compiled to machine code for CUDA devices, on a machine that has none.

The interpreter runs kernels as Python; types, layouts and registers are only checked here.
`test_triton.py` runs this file in a process of its own, with an empty compilation cache.
"""

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from corematching.backends.cuda import triton_programs, triton_selection, triton_statistics

SHARED_MEMORY = 163 * 1024  # bytes that one program may use on compute capability 8.0


def build(kernel, capability, pointers, constants, config):
    """Compile for ``capability``; arguments named in neither mapping are integers."""
    kernel = kernel.fn if isinstance(kernel, triton.runtime.Autotuner) else kernel
    constants = constants | {name: None for name, kind in pointers.items() if kind is None}
    known = [name for name in kernel.arg_names if name in pointers.keys() | constants.keys()]
    assert set(known) == pointers.keys() | constants.keys()
    signature = {
        name: "constexpr" if name in constants
        else "*" + pointers[name] if name in pointers
        else "i32"
        for name in kernel.arg_names
    }  # fmt: skip
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("block_b", [1, 16])
@pytest.mark.parametrize(
    ("capability", "dtype", "place"), [(80, "bf16", 0), (90, "bf16", 3), (90, "fp32", 1)]
)
def test_the_kernels_compile(capability, dtype, place, block_b):
    config = triton_programs.neurons_kernel.configs[place]
    blocks = {**config.kwargs, "BLOCK_B": block_b}
    pointers = dict.fromkeys(("x", "up", "gate", "up_bias", "gate_bias", "out"), dtype)
    thresholds = dict.fromkeys(("gate_thresholds", "output_thresholds"), "fp32")
    pointers |= thresholds | {"rows": "i32", "members": None if block_b == 1 else "i8"}
    constants = {"GATED": True, "ALIVE_FIRST": True, "ACTIVATION": "gelu", **blocks}
    neurons = build(triton_programs.neurons_kernel, capability, pointers, constants, config)
    pointers = {"neurons": dtype, "down": dtype, "rows": "i32", "parts": "fp32"}
    constants = {"GATED": False, "ALIVE_FIRST": False, **blocks}
    down = build(triton_programs.down_kernel, capability, pointers, constants, config)
    for built in (neurons, down):
        assert built.asm["cubin"]
        assert built.metadata.shared <= SHARED_MEMORY
        if dtype == "bf16":
            assert ("mma.sync" in built.asm["ptx"]) == (block_b > 1)


def test_the_sum_compiles():
    config = triton.Config({}, num_warps=4)
    pointers = {"parts": "fp32", "bias": "bf16", "out": "bf16"}
    constants = {"BLOCK_S": 64, "BLOCK_D": 128}
    assert build(triton_programs.sum_kernel, 90, pointers, constants, config).asm["cubin"]


ROW = {"BLOCK": 16384}
SUM = {"KIND": 2, "BLOCK_T": 64, "BLOCK_F": 64}
DIGIT = {"SHIFT": 0, "NUMBER": 15, "MAGNITUDE": 0x7FFF, "BLOCK": 1024}
PROMPTS = {
    "_invert_squares_kernel": (
        {"values": "bf16", "tokens": "u8", "factors": "fp32"}, {"BLOCK": 1024}, 4,
    ),
    "_sum_rows_kernel": (
        {"values": "bf16", "tokens": "u8", "factors": "fp32", "out": "fp32"}, SUM, 4,
    ),
    "_weigh_marks_kernel": ({"marks": "u8", "weights": "fp32", "out": "fp32"}, {"BLOCK": 1024}, 4),
    "_mark_highest_kernel": (
        {"bits": "i16", "counts": "i64", "marks": "u8"},
        {"PPM": 0, "ABSOLUTE": True, "BITS": 15, "MAGNITUDE": 32767, **ROW}, 16,
    ),
    "_pick_highest_kernel": ({"scores": "fp32", "indices": "i64"}, ROW, 16),
    "_count_digits_kernel": (
        {"bits": "i16", "tokens": "u8", "neurons": "i64", "known": "i32", "found": "i32"},
        DIGIT, 4,
    ),
    "_narrow_kernel": ({"found": "i32", "known": "i32", "missing": "i32"}, {"NUMBER": 15}, 16),
    "_sum_both_kernel": (
        {"values": "bf16", "tokens": "u8", "valid": "u8", "out": "fp32"}, ROW, 16,
    ),
    "_weigh_rarity_kernel": (
        {"marks": "u8", "chosen": "u8", "image": "u8", "out": "fp32"},
        {"PLAIN": False, "BLOCK_T": 64, "BLOCK_F": 64}, 4,
    ),
    "_keep_highest_kernel": (
        {"scores": "fp32", "image": "u8", "valid": "u8", "even": None, "counts": "i64"}
        | {"kept": "u8", "keep": "u8", "lowest": "fp32", "broken": "u8", "listed": "i64"},
        {"SPREAD": True, **ROW}, 16,
    ),
    "_credit_kernel": (
        {"products": "fp32", "norms": "fp32", "counts": "i64", "listed": "i64", "given": "fp32"}
        | {"image": "i64"},
        {"BLOCK": 1024}, 4,
    ),
    "_line_up_kernel": (
        dict.fromkeys(("keep", "valid", "image", "stays", "new_valid", "new_image"), "u8")
        | dict.fromkeys(("origin", "order", "new_origin"), "i64")
        | dict.fromkeys(("weights", "new_weights", "logs"), "fp32"),
        ROW, 16,
    ),
}  # fmt: skip


SLOW = {"_pick_highest_kernel", "_narrow_kernel"}
"""They take seconds to compile: for the older devices alone, which have less of everything."""


@pytest.mark.parametrize(
    ("name", "capability"),
    [(name, capability) for name in PROMPTS for capability in (80, 90)[: 1 + (name not in SLOW)]],
)
def test_what_chooses_from_a_prompt_compiles(name, capability):
    pointers, constants, warps = PROMPTS[name]
    config = triton.Config({}, num_warps=warps)
    module = triton_statistics if hasattr(triton_statistics, name) else triton_selection
    built = build(getattr(module, name), capability, pointers, constants, config)
    assert built.asm["cubin"]
    assert built.metadata.shared <= SHARED_MEMORY
