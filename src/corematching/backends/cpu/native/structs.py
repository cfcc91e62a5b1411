"""What the C code is handed, field by field as in types.h, tiled_attention.h, prompt_layer.h."""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, Structure, c_char_p, c_double, c_int, c_int64, c_uint64, c_void_p

MAX_BATCH = 16
NO_ACTIVATION = -1
ACTIVATION_NUMBERS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "quick_gelu": 4}


def _pointers(names: str) -> list[tuple[str, type]]:
    return [(name, c_void_p) for name in names.split()]


def _numbers(names: str) -> list[tuple[str, type]]:
    return [(name, c_int64) for name in names.split()]


class FFNStruct(Structure):
    """An FFN and the neurons it computes."""

    _fields_ = [
        *_pointers("up gate up_bias gate_bias down bias rows members"),
        *_pointers("input_threshold gate_threshold output_threshold rows_read"),
        *_numbers("width count biases activation by_neuron"),
    ]


class LayerStruct(Structure):
    """A decoder layer."""

    _fields_ = [
        *_pointers("attention_norm ffn_norm q k v o q_bias k_bias v_bias o_bias"),
        *_pointers("q_norm k_norm keys values"),
        ("ffn", FFNStruct),
    ]


class StepStruct(Structure):
    """A decode step."""

    _fields_ = [
        ("layers", POINTER(LayerStruct)),
        *_pointers("final_norm x out cos sin valid log_counts scratch"),
        *_numbers("num_layers hidden heads kv_heads head_dim"),
        *_numbers("batch length capacity threads weighed"),
        ("epsilon", c_double),
        ("scaling", c_double),
    ]


class AttentionStruct(Structure):
    """Attention of a whole prompt."""

    _fields_ = [
        *_pointers("query key value mask out scratch"),
        *((name, c_int64 * 3) for name in ("step_query", "step_key", "step_value")),
        ("step_mask", c_int64 * 2),
        *_numbers("batch heads groups length stored size mask_kind causal threads"),
        ("scaling", c_double),
    ]


class PromptLayerStruct(Structure):
    """What of a layer stays the same from prompt to prompt."""

    _fields_ = [
        *_pointers("q k v o gate up down"),
        *_pointers("q_bias k_bias v_bias o_bias gate_bias up_bias down_bias"),
        *_pointers("attention_norm ffn_norm attention_shift ffn_shift"),
        *_numbers("hidden heads groups size width activation down_by_input"),
        *((name, c_double) for name in ("attention_epsilon", "ffn_epsilon", "scaling")),
    ]


class PromptStruct(Structure):
    """One prompt in a layer."""

    _fields_ = [
        *_pointers("x cosine sine mask places qkv keys values middle out active gates scratch"),
        ("step_mask", c_int64 * 2),
        *_numbers("batch length cos_sin mask_kind causal threads"),
    ]


@functools.lru_cache(maxsize=4096)
def integers(*values: int) -> ctypes.Array[ctypes.c_int64]:
    """Numbers as C has them; not to be changed, since the same call gives the same ones."""
    return (c_int64 * len(values))(*values)


@functools.lru_cache(maxsize=4096)
def pointers(*places: int | None) -> ctypes.Array[ctypes.c_void_p]:
    """Places in memory as C has them; not to be changed."""
    return (c_void_p * len(places))(*places)


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes the types of the library's functions."""
    norm = [c_void_p, c_void_p, c_double]
    prepared = [*norm, c_int64, c_void_p, c_int, c_int]  # threads, scratch, unit, dtype
    signatures = {
        "cm_step_scratch": (c_int64, [POINTER(StepStruct)]),
        "cm_step": (None, [POINTER(StepStruct), c_int]),
        "cm_ffn_scratch": (c_int64, [c_int64] * 4),
        "cm_ffn": (
            None,
            [POINTER(FFNStruct), c_void_p, c_void_p, *[c_int64] * 3, c_void_p, c_int],
        ),
        "cm_linear": (None, [c_void_p] * 4 + [c_int64] * 4 + [c_void_p, c_int]),
        "cm_unite": (c_int64, [c_void_p, *[c_int64] * 4, c_void_p, c_void_p, c_void_p]),
        "cm_use_large_pages": (c_int64, [c_uint64, c_uint64]),
        "cm_target": (c_char_p, []),
        "cm_has_tiles": (c_int, []),
        "cm_multiply_scratch": (c_int64, [*[c_int64] * 3, c_int, c_int]),
        "cm_multiply": (
            None,
            [*[c_void_p] * 7, *[c_int64] * 4, c_int, *[c_void_p] * 2, *prepared],
        ),
        "cm_multiply_several": (
            None,
            [*[c_void_p] * 3, c_int64, *[c_void_p] * 2, *[c_int64] * 2, *prepared],
        ),
        "cm_attend_scratch": (c_int64, [POINTER(AttentionStruct)]),
        "cm_attend": (None, [POINTER(AttentionStruct)]),
        "cm_prompt_layer_scratch": (c_int64, [c_void_p, POINTER(PromptStruct)]),
        "cm_prompt_layer": (None, [c_void_p, POINTER(PromptStruct)]),
        "cm_weigh_marks": (None, [*[c_void_p] * 3, *[c_int64] * 4]),
        "cm_mark_largest": (None, [*[c_void_p] * 3, c_int64, c_int64, c_int, c_int64, c_int]),
        "cm_find_size": (c_int, [*[c_void_p] * 5, *[c_int64] * 4, c_int]),
        "cm_pick_top": (c_int, [c_void_p, c_int64, c_int64, c_void_p]),
        "cm_rotate_apart": (None, [*[c_void_p] * 5, *[c_int64] * 7, c_int]),
        "cm_normalise": (None, [*[c_void_p] * 4, c_int64, c_int64, c_double, c_int64, c_int]),
        "cm_sum_rows": (
            None,
            [c_void_p, c_void_p, c_int64, c_void_p, c_void_p, *[c_int64] * 4, c_int],
        ),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
