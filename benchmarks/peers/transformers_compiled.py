"""transformers with a static cache and compiled decode steps; on a GPU these are CUDA graphs."""

from asking import Clock
from on_transformers import TransformersPeer

NAME = "transformers_compiled"
INSTALL = "pip install corematching, and a C++ compiler"
NEEDS = ("torch", "transformers", "corematching")
BATCHES = True
SHAPES = True
NOTE = "static cache, torch.compile (mode reduce-overhead on a GPU: CUDA graphs)"


def read_version():
    """The engine's version."""
    import transformers

    return f"transformers {transformers.__version__}"


class Peer(TransformersPeer):
    """generate() on one static cache that every request uses again."""

    def __init__(self, options):
        super().__init__(options)
        from transformers import CompileConfig, StaticCache

        text = self.model.config.get_text_config(decoder=True)
        length = options["prompt_tokens"] + options["new_tokens"] + 1
        self.cache = StaticCache(config=text, max_cache_len=length)
        gpu = self.model.device.type == "cuda"
        self.settings = CompileConfig(
            fullgraph=False, mode="reduce-overhead" if gpu else "default", dynamic=False
        )
        self.settings._compile_all_devices = True

    def generate(self, request):
        """Seconds of a request."""
        import torch

        asked = self.open(request)
        with torch.inference_mode():
            self.cache.reset()
        clock = Clock(self.wait)
        with clock:
            inputs = self.prepare(asked)
            self.answer(
                inputs,
                request["new_tokens"],
                past_key_values=self.cache,
                compile_config=self.settings,
            )
        return clock.seconds
