"""transformers as it is: dynamic cache, no compilation."""

from asking import Clock
from on_transformers import TransformersPeer

NAME = "transformers_eager"
INSTALL = "pip install corematching"
NEEDS = ("torch", "transformers", "corematching")
BATCHES = True
SHAPES = True
NOTE = ""


def read_version():
    """The engine's version."""
    import transformers

    return f"transformers {transformers.__version__}"


class Peer(TransformersPeer):
    """generate() with its defaults."""

    def generate(self, request):
        """Seconds of a request."""
        asked = self.open(request)
        clock = Clock(self.wait)
        with clock:
            inputs = self.prepare(asked)
            self.answer(inputs, request["new_tokens"])
        return clock.seconds
