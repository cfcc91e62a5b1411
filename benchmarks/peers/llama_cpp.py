"""llama.cpp as the xllamacpp wheel."""

import time

from asking_llama import check_counts, context_of, convert, make_body, vocabulary_of

NAME = "llama_cpp"
INSTALL = "pip install xllamacpp gguf numpy"
NEEDS = ("xllamacpp", "gguf", "numpy")
NOTE = (
    "the text part only: as many prompt tokens, all of them text; no vision tower and no "
    "preprocessing (the converter refuses a bare CLIP tower)"
)


def read_version():
    """The engine's version."""
    from importlib.metadata import version

    return f"xllamacpp {version('xllamacpp')}"


class Peer:
    """A server inside this process."""

    def __init__(self, options):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(convert(options))
        params.n_ctx = context_of(options)
        params.n_batch = params.n_ubatch = min(params.n_ctx, 2048)
        params.n_parallel = 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options["threads"]
        params.n_gpu_layers = 0 if options["device"] == "cpu" else -1
        params.cache_prompt = False
        params.cache_ram_mib = 0
        params.warmup = True
        self.server = xllamacpp.Server(params)
        self.vocabulary = vocabulary_of(options)

    def generate(self, request):
        """Seconds of a request."""
        body = make_body(request, self.vocabulary)
        start = time.perf_counter()
        reply = self.server.handle_completions(body)
        seconds = time.perf_counter() - start
        usage = reply["usage"]
        check_counts(usage["completion_tokens"], usage["prompt_tokens"], request)
        return seconds
