"""A conversation on one cache, in a hand-written loop, and the same rows taken from singles.

Whatever is done to the cache's rows and columns is noted as well: every row knows which sample it
comes from and which tokens it was fed. Each row's sample alone, on a new cache, in plain PyTorch,
must give the same logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from corematching.methods import method_from_text
from corematching.protocol import NeuronChoice, PrefillView
from corematching.runtime import attach, detach
from tests.models import build, make_inputs
from tests.runtime.families import BANNED, RandomNeurons, RandomTokens, Reference, TestMethod
from tests.runtime.replaying import replaying
from tests.runtime.test_graph import StandIn

ENGINES = ("torch", "auto", "replayed")
BATCH = 3


class Strict(StandIn):
    """Replays only while all weights that were captured lie where they did, as a GPU would."""

    def __init__(self, sparse: dict[int, Any]) -> None:
        self.sparse = sparse

    def capture(self, work: Callable[[], None]) -> None:
        super().capture(work)
        self.captured = self._find()

    def replay(self) -> None:
        assert self._find() == self.captured, "captured weights have moved"
        super().replay()

    def _find(self) -> list[tuple[int, ...]]:
        return [ffn.addresses for ffn in self.sparse.values()]


@dataclass
class LimitedNeurons(RandomNeurons):
    """Random neurons with thresholds that differ from sample to sample."""

    per_token: bool = True

    def pick(self, layer: int, width: int, count: int) -> NeuronChoice:
        choice = super().pick(layer, width, count)
        least = torch.tensor([0.02 * seed for seed in self.seeds])
        return replace(choice, gate_threshold=least, output_threshold=least / 2)


@dataclass
class LateNeurons(RandomNeurons):
    """Random neurons that are known when a token is about to be decoded."""

    def choose(self, view: PrefillView, count: int) -> NeuronChoice:
        choice = super().choose(view, count)
        late = {"indices": choice.indices, "mean": choice.mean}
        return NeuronChoice(later=lambda: late)


def make_method(kind: str, samples: Sequence[int] = range(BATCH)) -> Any:
    """A method for a batch of these samples; each chooses the same in any batch."""
    seeds = tuple(sample + 1 for sample in samples)
    tokens = RandomTokens((0, 2), seeds, share=0.6)
    made: dict[str, Callable[[], Any]] = {
        "weights": lambda: TestMethod(tokens),
        "neurons": lambda: TestMethod(None, RandomNeurons(seeds)),
        "means": lambda: TestMethod(tokens, RandomNeurons(seeds, compensated=True)),
        "limits": lambda: TestMethod(replace(tokens, weighed=False), LimitedNeurons(seeds, True)),
        "late": lambda: TestMethod(tokens, LateNeurons(seeds, compensated=True)),
        "product": lambda: method_from_text("corematching:keep=0.5,layer=1,beta=0.5"),
        "counts": lambda: method_from_text("corematching:keep=0.4,layer=1,neuron_score=none"),
        "rival": lambda: method_from_text("fastv"),
    }
    return made[kind]()


KINDS = ("weights", "neurons", "means", "limits", "late", "product", "counts", "rival")


@contextmanager
def at_work(model: Any, method: Any, engine: str) -> Iterator[Any]:
    """A method on a model; "replayed" replays decode steps on a stand-in for a GPU."""
    run = attach(model, method, "torch" if engine == "replayed" else engine)
    try:
        if engine == "replayed":
            sparse = run._session.sparse
            with replaying(run, lambda: Strict(sparse)):
                yield run
        else:
            yield run
    finally:
        detach(model)


@contextmanager
def talking(
    kind: str,
    engine: str,
    name: str = "llava",
    batch: int = BATCH,
    cache: Callable[[Any], Any] | None = None,
    lengths: Sequence[int] | None = None,
) -> Iterator[Turns]:
    """A conversation of some samples under a method; ``cache(model)`` gives the cache."""
    model = build(name)
    inputs = make_inputs(name, model, batch=batch, text_lengths=lengths)
    with at_work(model, make_method(kind, range(batch)), engine) as run:
        turns = Turns(model, inputs, None if cache is None else cache(model))
        turns.run, turns.kind, turns.single = run, kind, build(name)
        yield turns


def sample_of(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One sample of a batch of one image each, without its padding."""
    first = int(inputs["attention_mask"][row].argmax())
    batch, length = inputs["input_ids"].shape
    single = {}
    for name, value in inputs.items():
        own = value[row : row + 1] if len(value) == batch else value
        single[name] = own[:, first:] if own.shape[:2] == (1, length) else own
    return single


class Turns:
    """Feeds a model tokens by hand, and says what they must give.

    Parameters
    ----------
    model
        With a method on it.
    inputs : dict
        The prompts.
    cache : Cache, optional
        An empty one.
    """

    def __init__(self, model: Any, inputs: dict[str, Tensor], cache: Any = None) -> None:
        self.model, self.inputs = model, inputs
        self.mask = inputs["attention_mask"]
        self.rows = list(range(len(self.mask)))
        self.fed: list[list[Tensor]] = [[] for _ in self.rows]
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            out = model(**inputs, position_ids=positions, past_key_values=cache, use_cache=True)
        self.cache = out.past_key_values
        self.masked = True
        self.run: Any = None
        self.kind, self.single = "", None
        self._draws = torch.Generator().manual_seed(5)

    def draw(self, length: int = 1) -> Tensor:
        """(B, length) random text tokens."""
        shape = (len(self.rows), length)
        return torch.randint(5, 50, shape, generator=self._draws)

    def feed(self, length: int = 1, model: Any = None) -> Tensor:
        """(B, V) logits behind ``length`` random tokens of each row.

        Without a mask where ``self.masked`` is False, for prompts of one length.
        """
        ids = self.draw(length)
        mask = torch.cat([self.mask, torch.ones_like(ids)], 1)
        positions = (mask.cumsum(1) - 1)[:, -length:]
        with torch.no_grad():
            out = (self.model if model is None else model)(
                input_ids=ids,
                attention_mask=mask if self.masked else None,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
            )
        self.mask = mask
        for row, new in zip(self.fed, ids, strict=True):
            row.append(new)
        return out.logits[:, -1]

    def move(self, rows: Sequence[int], change: Callable[[Any], Any]) -> None:
        """Row i becomes what row ``rows[i]`` was; ``change`` does it to the cache."""
        change(self.cache)
        self.mask = self.mask[list(rows)]
        self.rows = [self.rows[row] for row in rows]
        self.fed = [list(self.fed[row]) for row in rows]

    def cut(self, count: int, change: Callable[[Any], Any]) -> None:
        """Take back the latest ``count`` tokens, which are whole turns."""
        change(self.cache)
        self.mask = self.mask[:, :-count]
        for row in self.fed:
            left = sum(map(len, row)) - count
            while sum(map(len, row)) > left:
                row.pop()
            assert sum(map(len, row)) == left, "whole turns only"

    def check(self, length: int = 1, model: Any = None) -> None:
        """Feed ``length`` tokens to each row; compare with the singles."""
        self._compare([self.feed(length, model)])

    def check_each(self, *lengths: int) -> None:
        """`check` several lengths in turn, with the singles run once."""
        self._compare([self.feed(length) for length in lengths])

    def check_answer(self, steps: int = 3) -> None:
        """Let generate() go on from two new tokens of each row; compare with the singles."""
        ids = self.draw(2)
        mask = torch.cat([self.mask, torch.ones_like(ids)], 1)
        ours = answer(self.model, ids, mask, self.cache, steps)
        theirs = []
        for row, (model, outs) in enumerate(self._singles(self.rows)):
            own, cache = ids[row : row + 1], outs[-1].past_key_values
            whole = torch.ones(1, int(mask[row].sum()), dtype=torch.long)
            theirs.append(answer(model, own, whole, cache, steps).logits[0])
        assert_close(ours.logits, torch.stack(theirs))

    def _singles(self, samples: Sequence[int]) -> Iterator[tuple[Any, list[Any]]]:
        """Every row's sample alone, fed as the rows were: the model, and what it gave each time."""
        model = self.single
        for sample, fed in zip(samples, self.fed, strict=True):
            attach(model, make_method(self.kind, [sample]), "torch")
            try:
                with torch.no_grad():
                    outs = [model(**sample_of(self.inputs, sample), use_cache=True)]
                    for ids in fed:
                        cache = outs[-1].past_key_values
                        outs += [model(input_ids=ids[None], past_key_values=cache, use_cache=True)]
                yield model, outs
            finally:
                detach(model)

    def _compare(self, ours: list[Tensor]) -> None:
        """``ours``: the logits (B, V) behind each of the latest turns."""
        theirs = [
            torch.stack([out.logits[0, -1] for out in outs[-len(ours) :]])
            for _, outs in self._singles(self.rows)
        ]
        assert_close(torch.stack(ours), torch.stack(theirs, 1))


def answer(model: Any, ids: Tensor, mask: Tensor, cache: Any, steps: int, **options: Any) -> Any:
    """What generate() gives that goes on from a cache."""
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=steps,
        do_sample=False,
        suppress_tokens=BANNED,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return Reference(out.sequences[:, -steps:], torch.stack(out.logits, 1))


def by_hand(change: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    """Replace all layers' keys and values."""

    def run(cache: Any) -> None:
        for layer in cache.layers:
            layer.keys, layer.values = change(layer.keys), change(layer.values)

    return run


def layer_by_layer(name: str, argument: Any) -> Callable[[Any], None]:
    """Call a method of each of the layers."""

    def run(cache: Any) -> None:
        for layer in cache.layers:
            getattr(layer, name)(argument)

    return run


def call(name: str, argument: Any) -> Callable[[Any], Any]:
    """Call a method of the cache."""
    return lambda cache: getattr(cache, name)(argument)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Logits within 1e-4 of their scale."""
    scale = float(theirs.abs().max())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * scale)
