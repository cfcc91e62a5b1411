"""Ask about a scene: ten families of questions, each with several wordings.

The splits use all of a family's `WORDINGS`, training the first ones and `TRAINING_WORDINGS`: some
of the splits' questions are phrased as no training question was.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from classes import OBJECTS, WORDS, is_plural, plural, with_article
from scenes import SIZE, Item, Scene
from wordings import TRAINING_WORDINGS, WORDINGS

FAMILIES = (
    "exists", "count", "side", "relation", "bigger",
    "where", "list", "read", "choice", "describe",
)  # fmt: skip

# After one round of all families, training asks these again, in these shares; the easy ones only
# about every second picture.
ASKED = {"count": 4, "side": 3, "relation": 4, "bigger": 1, "where": 1, "list": 3, "describe": 4}
EASY = ("exists", "choice")
HELD_OUT_WORDINGS = 2
SIDES = {"left": "leftmost", "right": "rightmost", "top": "topmost", "bottom": "bottommost"}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


@dataclass
class Question:
    """A question about one scene and its answer."""

    family: str
    text: str
    answer: str
    new_wording: bool = False


class Interviewer:
    """Asks about scenes.

    Parameters
    ----------
    new_wordings : bool
        True asks as the splits do, in wordings that training never sees too; False as training.
    asked : dict
        In which shares `ask_many` asks families again.
    """

    def __init__(self, new_wordings: bool = False, asked: dict[str, int] = ASKED) -> None:
        self.new_wordings = new_wordings
        self.asked = asked

    def ask(self, rng: np.random.Generator, scene: Scene, family: str) -> Question | None:
        """One question of the family, or None if the scene allows none that is clear."""
        made = getattr(self, "_ask_" + family)(rng, scene)
        if made is None:
            return None
        slots, answer = made
        wordings = WORDINGS[family]
        trained = len(wordings) - HELD_OUT_WORDINGS
        if not self.new_wordings:
            wordings = wordings[:trained] + TRAINING_WORDINGS[family]
        index = int(rng.integers(len(wordings)))
        wording = wordings[index]
        verb = "are" if is_plural(slots.get("subject", "")) else "is"
        text = wording.format(**slots, **{"is": verb, "Is": verb.capitalize()})
        text += slots.get("options", "")
        return Question(family, text, answer, self.new_wordings and index >= trained)

    def ask_many(self, rng: np.random.Generator, scene: Scene, tries: int = 40) -> list[Question]:
        """Different questions about one scene: each family once, then the harder ones again."""
        questions: dict[str, Question] = {}
        order = [FAMILIES[i] for i in rng.permutation(len(FAMILIES))]
        families, weights = zip(*self.asked.items(), strict=True)
        again = rng.choice(len(families), tries, p=np.divide(weights, sum(weights)))
        for family in order + [families[i] for i in again]:
            if family in EASY and rng.random() < 0.5:
                continue
            question = self.ask(rng, scene, family)
            if question is not None:
                questions.setdefault(question.text, question)
        return list(questions.values())

    def _ask_exists(self, rng, scene):
        if rng.random() < 0.5:
            name = _choose(rng, scene.objects).name
            return {"a": with_article(name), "subject": name}, "yes"
        name = _choose_absent(rng, scene)
        return {"a": with_article(name), "subject": name}, "no"

    def _ask_count(self, rng, scene):
        counts = Counter(item.name for item in scene.objects)
        several = [name for name, number in counts.items() if number > 1]
        names = several if several and rng.random() < 0.75 else sorted(counts)
        if rng.random() < 0.25:
            return {"s": "objects"}, str(len(scene.objects))
        name = _choose(rng, names)
        return {"s": plural(name)}, str(counts[name])

    def _ask_side(self, rng, scene):
        if len(scene.objects) < 2:
            return None
        side = _choose(rng, tuple(SIDES))
        sign = -1 if side in ("right", "bottom") else 1
        axis = "cx" if side in ("left", "right") else "cy"
        ranked = sorted(scene.objects, key=lambda item: sign * getattr(item, axis))
        first, second = ranked[:2]
        if first.name != second.name and abs(getattr(first, axis) - getattr(second, axis)) < 16:
            return None
        return {"side": side, "most": SIDES[side]}, with_article(first.name)

    def _ask_relation(self, rng, scene):
        pair = _choose_pair(rng, scene)
        if pair is None:
            return None
        first, second = pair
        dx, dy = first.cx - second.cx, first.cy - second.cy
        if max(abs(dx), abs(dy)) < 24 or not (abs(dx) > 1.5 * abs(dy) or abs(dy) > 1.5 * abs(dx)):
            return None
        if abs(dx) > abs(dy):
            answer = "to the left" if dx < 0 else "to the right"
        else:
            answer = "above" if dy < 0 else "below"
        slots = {"b": "the " + first.name, "c": "the " + second.name, "subject": first.name}
        return slots, answer

    def _ask_bigger(self, rng, scene):
        pair = _choose_pair(rng, scene)
        if pair is None or not (
            pair[0].size > 1.35 * pair[1].size or pair[1].size > 1.35 * pair[0].size
        ):
            return None
        slots = {"b": "the " + pair[0].name, "c": "the " + pair[1].name}
        return slots, "the " + max(pair, key=lambda item: item.size).name

    def _ask_where(self, rng, scene):
        middle = SIZE / 2
        clear = [
            item
            for item in _unique(scene)
            if abs(item.cx - middle) > 14 and abs(item.cy - middle) > 14
        ]
        if not clear:
            return None
        item = _choose(rng, clear)
        row = "top" if item.cy < middle else "bottom"
        column = "left" if item.cx < middle else "right"
        return {"b": "the " + item.name, "subject": item.name}, f"{row} {column}"

    def _ask_list(self, rng, scene):
        return {}, ", ".join(with_article(name) for name in _names_in_order(scene))

    def _ask_read(self, rng, scene):
        return None if scene.word is None else ({}, scene.word)

    def _ask_choice(self, rng, scene):
        right = _choose(rng, scene.objects).name
        options = [right]
        while len(options) < 4:
            other = _choose_absent(rng, scene)
            if other not in options:
                options.append(other)
        options = [options[i] for i in rng.permutation(4)]
        lines = "".join(f"\n{letter}. {name}" for letter, name in zip("ABCD", options, strict=True))
        return {"options": lines}, "ABCD"[options.index(right)]

    def _ask_describe(self, rng, scene):
        counts = Counter(item.name for item in scene.objects)
        parts = [
            with_article(name) if counts[name] == 1 else f"{NUMBERS[counts[name]]} {plural(name)}"
            for name in _names_in_order(scene)
        ]
        listed = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
        sign = "" if scene.word is None else f" with the word {scene.word}"
        return {}, f"A picture of {listed}{sign}."


def _choose(rng, options):
    return options[int(rng.integers(len(options)))]


def _choose_absent(rng, scene: Scene) -> str:
    present = {item.name for item in scene.objects}
    while (name := _choose(rng, OBJECTS)) in present:
        pass
    return name


def _unique(scene: Scene) -> list[Item]:
    counts = Counter(item.name for item in scene.objects)
    return [item for item in scene.objects if counts[item.name] == 1]


def _choose_pair(rng, scene: Scene) -> tuple[Item, Item] | None:
    unique = _unique(scene)
    if len(unique) < 2:
        return None
    first, second = rng.permutation(len(unique))[:2]
    return unique[first], unique[second]


def _names_in_order(scene: Scene) -> list[str]:
    ordered = sorted(scene.objects, key=lambda item: item.cx)
    return list(dict.fromkeys(item.name for item in ordered))


assert not set(OBJECTS) & set(WORDS), "a word and an object share a name"
