"""Ask SceneVLM about a shipped picture, with its core tokens and core neurons only.

python examples/quickstart.py
"""

from corematching import CoreMatching, load_demo
from corematching.demo.example import read_example

model, processor = load_demo()
example = read_example()
content = [
    {"type": "image", "image": str(example.image)},
    {"type": "text", "text": example.question},
]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device, model.dtype)

with CoreMatching()(model) as run:
    output = model.generate(**inputs, max_new_tokens=64)

answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
sample = run.report.samples[0]
print(f"{example.question} {answer}")
print(f"{sample.kept_tokens} of {sample.image_tokens} image tokens were kept")
