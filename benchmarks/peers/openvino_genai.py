"""OpenVINO GenAI, on the checkpoint exported by optimum-intel."""

import hashlib
import json
import shutil
import time
from pathlib import Path

from asking import open_pictures

NAME = "openvino_genai"
INSTALL = (
    "pip install torch==2.13.0 openvino-genai transformers==5.5.4 accelerate scipy requests pillow "
    "&& pip install --no-deps optimum==2.3.0 optimum-intel==2.2.0"
)
NEEDS = ("openvino_genai", "optimum", "torch", "transformers", "scipy", "requests", "PIL")
NOTE = "exported by optimum-intel, INFERENCE_PRECISION_HINT as the dtype, prefix cache off"
MOST_EXTRA_TOKENS = 8  # it writes its own text around the picture
BATCHES = True
CACHE_GB = 2  # of keys and values, for several samples
PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def read_version():
    """The engine's version."""
    import openvino_genai

    return f"OpenVINO GenAI {openvino_genai.__version__}"


def convert(options):
    """Export the checkpoint, once; gives where."""
    checkpoint = Path(options["checkpoint"])
    stamps = [(f.name, f.stat().st_mtime_ns) for f in sorted(checkpoint.glob("*.safetensors"))]
    key = hashlib.sha256(repr((str(checkpoint), stamps)).encode()).hexdigest()[:12]
    target = Path(options["work"]) / f"{key}-{options['dtype']}"
    if target.exists():
        return target
    scratch = target.with_name(target.name + ".part")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    from optimum.exporters.openvino import main_export
    from optimum.intel.openvino.configuration import OVConfig

    weights = {"float32": "fp32"}.get(options["dtype"], "fp16")
    main_export(
        str(checkpoint),
        output=scratch,
        task="image-text-to-text",
        ov_config=OVConfig(dtype=weights),
        convert_tokenizer=True,
    )
    write_preprocessor(checkpoint, scratch)
    scratch.rename(target)
    return target


def write_preprocessor(checkpoint, target):
    """OpenVINO GenAI wants the image processor's settings in a file of its own."""
    path = target / "preprocessor_config.json"
    source = next((x for x in (path, checkpoint / path.name) if x.exists()), None)
    if source is not None:
        settings = json.loads(source.read_text())
    else:
        settings = json.loads((checkpoint / "processor_config.json").read_text())["image_processor"]
    size = settings.get("size", {})
    if "height" in size and not settings.get("do_center_crop"):
        # it takes a picture's size from these two, whether it crops or not
        settings |= {"crop_size": size, "size": {"shortest_edge": size["height"]}}
    path.write_text(json.dumps(settings, indent=1))


class Peer:
    """A pipeline on the CPU or the GPU; several samples go through its continuous batching."""

    def __init__(self, options):
        import openvino_genai

        device = "CPU" if options["device"] == "cpu" else "GPU"
        settings = {
            "INFERENCE_PRECISION_HINT": PRECISIONS[options["dtype"]],
            "INFERENCE_NUM_THREADS": options["threads"],
        }
        path, self.batch = str(convert(options)), options["batch"]
        if self.batch == 1:
            settings["PERFORMANCE_HINT"] = "LATENCY"
            self.pipeline = openvino_genai.VLMPipeline(path, device, **settings)
            return
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = CACHE_GB
        scheduler.max_num_seqs = self.batch
        scheduler.max_num_batched_tokens = self.batch * options["prompt_tokens"] * 2
        scheduler.enable_prefix_caching = False
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(path, scheduler, device, settings)

    def generate(self, request):
        """Seconds of a request."""
        import numpy as np
        import openvino
        import openvino_genai

        pictures = [np.asarray(picture)[None] for picture in open_pictures(request)]
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = request["new_tokens"]
        config.ignore_eos = True
        config.do_sample = False
        start = time.perf_counter()
        images = [openvino.Tensor(picture) for picture in pictures]
        if self.batch == 1:
            results = [
                self.pipeline.generate(request["question"], images=images, generation_config=config)
            ]
        else:
            results = self.pipeline.generate(
                [request["question"]] * self.batch,
                images=[[image] for image in images],
                generation_config=[config] * self.batch,
            )
        seconds = time.perf_counter() - start
        for result in results:
            check(result.perf_metrics, request, self.batch)
        return seconds


def check(metrics, request, batch):
    """Refuse an answer or a prompt of another length; answers are counted over the whole batch."""
    made, read = metrics.get_num_generated_tokens() / batch, metrics.get_num_input_tokens()
    if made != request["new_tokens"]:
        raise RuntimeError(f"{made} tokens instead of {request['new_tokens']}")
    if abs(read - request["prompt_tokens"]) > MOST_EXTRA_TOKENS:
        raise RuntimeError(f"{read} prompt tokens instead of {request['prompt_tokens']}")
