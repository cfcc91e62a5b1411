"""Models that transformers runs: a checkpoint, or a shape with random weights."""

from asking import open_pictures


class TransformersPeer:
    """A model and its requests, without anything of ours on it."""

    def __init__(self, options):
        import torch

        torch.set_num_threads(options["threads"])
        dtype = getattr(torch, options["dtype"])
        self.options = options
        if "shape" in options:
            from corematching.lab.bench import RandomWorkload, build_random, find_shape

            shape = find_shape(options["shape"])
            self.model = build_random(shape, options["device"], dtype)
            self.workload = RandomWorkload(
                shape, self.model, options["batch"], options["text_tokens"]
            )
            return
        from transformers import AutoModelForImageTextToText, AutoProcessor

        from corematching.lab.evaluate import Subject

        path = options["checkpoint"]
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)
        self.model = model.to(options["device"]).eval()
        processor = AutoProcessor.from_pretrained(path, backend="pil")
        self.subject = Subject(path, self.model, processor)

    def open(self, request):
        """What stands in memory before the clock runs: pictures and question, or random inputs."""
        if "shape" in self.options:
            return self.workload.open(request["number"])
        pictures = open_pictures(request)
        return pictures, [request["question"]] * len(pictures)

    def prepare(self, asked):
        """The model's inputs."""
        if "shape" in self.options:
            return self.workload.prepare(asked)
        pictures, questions = asked
        return dict(self.subject.encode(questions, pictures))

    def answer(self, inputs, new_tokens, **options):
        """Generate exactly so many tokens."""
        from corematching.lab.bench import generate_exactly

        output = generate_exactly(self.model, inputs, new_tokens, **options)
        made = output.shape[1] - inputs["input_ids"].shape[1]
        if made != new_tokens:
            raise RuntimeError(f"{made} tokens instead of {new_tokens}")

    def wait(self):
        """Until the device is done."""
        if self.model.device.type == "cuda":
            import torch

            torch.cuda.synchronize()

    def read_peak(self):
        """Most bytes of the device's memory in use."""
        if self.model.device.type == "cuda":
            import torch

            return torch.cuda.max_memory_allocated()
        from corematching.memory_meter import ProcessMemory

        return ProcessMemory.read().highest
