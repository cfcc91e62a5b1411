"""The tested model families."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes
    ----------
    model_type : str
        ``config.model_type``.
    name : str
        Its usual name.
    tokens : bool
        Whether image tokens can be dropped.
    neurons : bool
        Whether neurons can be chosen.
    notes : str
        Particularities of the family.
    """

    model_type: str
    name: str
    tokens: bool
    neurons: bool
    notes: str = ""


FAMILIES: tuple[Family, ...] = (
    Family("llava", "LLaVA-1.5", True, True),
    Family("llava_next", "LLaVA-NeXT", True, True, "all tiles of an image are pruned together"),
    Family("llava_onevision", "LLaVA-OneVision", True, True, "video tokens count as image tokens"),
    Family("qwen2_vl", "Qwen2-VL", True, True, "three-axis rotary positions are kept"),
    Family("qwen2_5_vl", "Qwen2.5-VL", True, True, "three-axis rotary positions are kept"),
    Family("qwen3_vl", "Qwen3-VL", True, True, "deepstack features follow the kept tokens"),
    Family("internvl", "InternVL", True, True),
    Family("smolvlm", "SmolVLM", True, True),
    Family("idefics3", "Idefics3", True, True),
    Family("paligemma", "PaliGemma", True, True, "attends in both directions over the prompt"),
    Family("gemma3", "Gemma 3", True, True, "sliding windows; both directions within an image"),
    Family("gemma4", "Gemma 4", True, True, "without experts and shared keys and values"),
    Family("mistral3", "Mistral 3", True, True, "Pixtral vision tower; Ministral 3 included"),
    Family("granite4_vision", "Granite 4 Vision", True, True, "features between layers follow"),
    Family("llama", "Llama", False, True, "text only"),
    Family("qwen2", "Qwen2", False, True, "text only"),
    Family("qwen3", "Qwen3", False, True, "text only"),
    Family("mistral", "Mistral", False, True, "text only"),
    Family("gemma2", "Gemma 2", False, True, "text only; sliding windows, no sdpa"),
)


def find_family(model_type: str) -> Family | None:
    """The family of a model type, or None if it is not tested."""
    return next((family for family in FAMILIES if family.model_type == model_type), None)
