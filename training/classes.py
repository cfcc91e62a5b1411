"""What SceneQA's world holds: the object classes and the words that can be read."""

from __future__ import annotations

from pathlib import Path

import emoji

OBJECTS = (
    "airplane ambulance anchor ant avocado axe backpack balloon banana baseball basketball "
    "bat bear bed bee beetle bell bicycle bomb bread broccoli broom bus butterfly cactus "
    "camel camera candle candy carrot castle cat chair cherries chicken cloud coconut coin "
    "compass cookie cow crab crocodile crown cucumber deer dog dolphin dragon dress drum duck "
    "egg eggplant elephant envelope eye feather fish flashlight flute fox frog ghost giraffe "
    "glasses gloves gorilla grapes guitar hammer helicopter horse house jellyfish kangaroo "
    "key keyboard kite ladder laptop lemon lion lizard magnet microphone microscope "
    "motorcycle mouse mushroom newspaper octopus onion owl package pancakes panda parachute "
    "parrot pear pencil penguin pie pig pineapple pizza popcorn potato rabbit radio rainbow "
    "robot rocket rose sandwich scissors scroll shark ship skull snail snake socks spider "
    "spoon strawberry sun sunflower taxi telephone telescope television tent tiger toilet "
    "tomato toothbrush tornado tractor train trophy trumpet turtle umbrella violin volcano "
    "watch watermelon whale wheel wolf wrench zebra"
).split()

WORDS = (
    "apple river stone bridge winter summer market paper music table north south forest sugar "
    "metal gold orange purple green yellow black white open closed exit enter stop start left "
    "right hello sale free fresh hot cold fast slow library museum office school tower light "
    "water park road city town shop book club hall lake gate wall post"
).split()

_ALIASES = {"bee": "honeybee"}
_PLURALS = {
    "wolf": "wolves", "jellyfish": "jellyfish",
    "mouse": "mice", "fish": "fish", "deer": "deer", "octopus": "octopuses",
    "bread": "bread", "broccoli": "broccoli", "popcorn": "popcorn",
}  # fmt: skip
_PLURAL_ONLY = frozenset("glasses gloves pancakes scissors socks cherries grapes".split())
_MASS = frozenset("bread broccoli popcorn".split())


def plural(name: str) -> str:
    """The plural of an object's name."""
    if name in _PLURALS:
        return _PLURALS[name]
    if name in _PLURAL_ONLY:
        return name
    if name.endswith(("s", "x", "ch", "sh")):
        return name + "es"
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    if name in ("potato", "tomato", "tornado", "volcano"):
        return name + "es"
    return name + "s"


def is_plural(name: str) -> bool:
    """Whether one instance of the object is spoken of in the plural."""
    return name in _PLURAL_ONLY


def with_article(name: str) -> str:
    """The name as a sentence mentions one instance of it: "a dog", "an owl", "scissors"."""
    if name in _PLURAL_ONLY or name in _MASS:
        return name
    return ("an " if name[0] in "aeiou" else "a ") + name


def find_sprites(assets: Path) -> dict[str, Path]:
    """Map each object class to its sprite, by the names that the `emoji` package gives.

    Raises
    ------
    FileNotFoundError
        If a class has no sprite in ``assets``.
    """
    by_name: dict[str, Path] = {}
    for path in sorted(assets.glob("*.webp")):
        try:
            symbol = "".join(chr(int(code, 16)) for code in path.stem.split("-"))
        except (ValueError, OverflowError):
            continue
        name = emoji.demojize(symbol)
        if name == symbol:
            name = emoji.demojize(symbol.replace("\ufe0f", ""))
        by_name.setdefault(name.strip(":").replace("_", " "), path)
    sprites = {}
    for name in OBJECTS:
        source = _ALIASES.get(name, name)
        if source not in by_name:
            raise FileNotFoundError(f"no sprite named '{source}' in {assets}")
        sprites[name] = by_name[source]
    return sprites
