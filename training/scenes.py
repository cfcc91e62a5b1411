"""Compose SceneQA's scenes: rendered objects and signs on varied backgrounds."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from classes import OBJECTS, WORDS, find_sprites

SIZE = 224  # pixels, the side of a scene
VIEW = 336  # pixels, the side of what the tower sees of it
PATCH = 14
GRID = VIEW // PATCH
BACKGROUND = 0  # class of a patch without an object; objects and words follow
CLASSES = ("background", *OBJECTS, *WORDS)
CLASS_ID = {name: i for i, name in enumerate(CLASSES)}
KINDS = ("plain", "gradient", "noise", "stripes", "checker", "clouds", "dots")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
_FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif-Bold", "DejaVuSansMono-Bold")
_FONT_SIZES = range(24, 41, 2)
_MIN_VISIBLE = 0.6
_COVERED = 0.18 * PATCH * PATCH  # pixels of a patch that an item covers at least
_SEEN = np.arange(VIEW) * SIZE // VIEW
_PATCH_OF_PIXEL = (np.arange(VIEW) // PATCH)[:, None] * GRID + np.arange(VIEW) // PATCH
_GRID = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) / SIZE
_HELD_OUT = 8  # one pair of contents in so many is kept for the test and development splits


@dataclass
class Item:
    """One object or sign in a scene; the box is in pixels.

    A sign's ``letters`` are (letter in lower case, left, right), pixels from the sign's left edge.
    """

    name: str
    is_word: bool
    x0: int
    y0: int
    width: int
    height: int
    letters: tuple[tuple[str, float, float], ...] = ()

    @property
    def cx(self) -> float:
        return self.x0 + self.width / 2

    @property
    def cy(self) -> float:
        return self.y0 + self.height / 2

    @property
    def size(self) -> int:
        return max(self.width, self.height)


@dataclass
class Scene:
    """A picture and what is in it."""

    image: np.ndarray  # (SIZE, SIZE, 3) uint8
    owner: np.ndarray  # (SIZE, SIZE) int8, index of the item on top, -1 for background
    items: list[Item] = field(default_factory=list)
    kind: str = "plain"

    @property
    def objects(self) -> list[Item]:
        return [item for item in self.items if not item.is_word]

    @property
    def word(self) -> str | None:
        return next((item.name for item in self.items if item.is_word), None)


class Sprites:
    """Every object's picture, cropped to its outline, at the sizes asked for so far."""

    def __init__(self, assets: Path) -> None:
        self._full: dict[str, Image.Image] = {}
        for name, path in find_sprites(assets).items():
            image = Image.open(path).convert("RGBA")
            outline = image.getchannel("A").point(lambda a: 255 * (a > 40)).getbbox()
            self._full[name] = image.crop(outline)
        self._scaled: dict[tuple[str, int], np.ndarray] = {}

    def get(self, name: str, size: int) -> np.ndarray:
        """(h, w, 4) uint8, the longer side ``size`` pixels rounded to a multiple of 4."""
        size = max(4, 4 * round(size / 4))
        key = (name, size)
        if key not in self._scaled:
            full = self._full[name]
            scale = size / max(full.size)
            shape = (max(1, round(full.width * scale)), max(1, round(full.height * scale)))
            self._scaled[key] = np.asarray(full.resize(shape, Image.Resampling.BOX))
        return self._scaled[key]


class Composer:
    """Draws scenes; the same generator state gives the same scene.

    Parameters
    ----------
    assets : Path
        The folder of sprites.
    held_out : bool
        False draws training scenes, in which no held-out pair of contents occurs; True draws
        scenes that hold at least one such pair, so that no composition is in both.
    signs : float
        Mean number of signs in a scene. Questions want one at most; only the vision tower, which
        has to learn to read, sees more.
    skew : float
        The larger, the smaller the objects: a number drawn between 0 and 1 is raised to it, and
        says where between the smallest and the largest size an object's lies.
    """

    def __init__(
        self, assets: Path, held_out: bool = False, signs: float = 0.35, skew: float = 0.8
    ) -> None:
        self.sprites = Sprites(assets)
        self.held_out = held_out
        self.signs, self.skew = signs, skew
        fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        self._fonts = {
            (name, size): ImageFont.truetype(str(fonts / f"{name}.ttf"), size)
            for name in _FONTS
            for size in _FONT_SIZES
        }

    def draw(self, rng: np.random.Generator) -> Scene:
        """Compose one scene."""
        while True:
            kind = KINDS[rng.integers(len(KINDS))]
            names = self._pick_contents(rng, kind)
            if names is None:
                continue
            scene = self._place(rng, kind, names)
            if scene is not None:
                return scene

    def _pick_contents(self, rng: np.random.Generator, kind: str) -> list[str] | None:
        count = int(rng.choice(6, p=[0.08, 0.2, 0.27, 0.22, 0.14, 0.09])) + 1
        names: list[str] = []
        while len(names) < count:
            if names and rng.random() < 0.25:
                names.append(names[-1])
                continue
            name = OBJECTS[rng.integers(len(OBJECTS))]
            if not self.held_out and any(is_held_out(name, other) for other in [kind, *names]):
                continue
            names.append(name)
        for _ in range(int(self.signs + rng.random())):
            names.append("word:" + WORDS[rng.integers(len(WORDS))])
        if self.held_out:
            things = sorted({kind, *(name for name in names if not name.startswith("word:"))})
            pairs = [(a, b) for i, a in enumerate(things) for b in things[i + 1 :]]
            if not any(is_held_out(a, b) for a, b in pairs):
                return None
        return names

    def _place(self, rng: np.random.Generator, kind: str, names: list[str]) -> Scene | None:
        canvas = draw_background(rng, kind)
        owner = np.full((SIZE, SIZE), -1, np.int8)
        items: list[Item] = []
        drawn: list[int] = []
        visible: list[int] = []
        largest = min(116.0, 210 / math.sqrt(len(names)))
        for index, name in enumerate(names):
            for _ in range(20):
                sprite, letters = self._draw_item(rng, name, largest)
                height, width = sprite.shape[:2]
                if height > SIZE or width > SIZE:
                    continue
                x0 = int(rng.integers(0, SIZE - width + 1))
                y0 = int(rng.integers(0, SIZE - height + 1))
                solid = sprite[..., 3] > 100
                under = owner[y0 : y0 + height, x0 : x0 + width]
                hidden = np.bincount(under[solid & (under >= 0)], minlength=len(names))
                left = [seen - hidden[i] for i, seen in enumerate(visible)]
                if any(rest < _MIN_VISIBLE * drawn[i] for i, rest in enumerate(left)):
                    continue
                under[solid] = index
                drawn.append(int(solid.sum()))
                visible = [*left, drawn[-1]]
                region = canvas[y0 : y0 + height, x0 : x0 + width]
                alpha = sprite[..., 3:].astype(np.float32) / 255
                region += (sprite[..., :3] - region) * alpha
                word = name.startswith("word:")
                name = name.removeprefix("word:")
                items.append(Item(name, word, x0, y0, width, height, letters))
                break
            else:
                return None
        return Scene(canvas.astype(np.uint8), owner, items, kind)

    def _draw_item(self, rng: np.random.Generator, name: str, largest: float):
        if name.startswith("word:"):
            return self._draw_sign(rng, name.removeprefix("word:"))
        size = 24 + (largest - 24) * rng.random() ** self.skew
        sprite = self.sprites.get(name, int(size))
        return (sprite[:, ::-1] if rng.random() < 0.5 else sprite), ()

    def _draw_sign(self, rng: np.random.Generator, word: str):
        font = self._fonts[
            _FONTS[rng.integers(len(_FONTS))], int(_FONT_SIZES[rng.integers(len(_FONT_SIZES))])
        ]
        text = (word, word.capitalize(), word.upper())[rng.integers(3)]
        left, top, right, bottom = font.getbbox(text)
        pad = int(rng.integers(3, 9))
        dark = rng.integers(0, 90, 3)
        light = rng.integers(170, 256, 3)
        ink, plate = (dark, light) if rng.random() < 0.6 else (light, dark)
        shape = (int(right - left) + 2 * pad, int(bottom - top) + 2 * pad)
        sign = Image.new("RGBA", shape, (*map(int, plate), 255))
        ImageDraw.Draw(sign).text((pad - left, pad - top), text, (*map(int, ink), 255), font)
        edges = [pad - left + font.getlength(text[:end]) for end in range(len(text) + 1)]
        return np.asarray(sign), tuple(zip(word, edges[:-1], edges[1:], strict=True))


def is_held_out(first: str, second: str) -> bool:
    """Whether this pair of contents (object classes or background kind) is never trained on."""
    if first == second:
        return False
    pair = "+".join(sorted((first, second)))
    return hashlib.sha256(pair.encode()).digest()[0] % _HELD_OUT == 0


def draw_background(rng: np.random.Generator, kind: str) -> np.ndarray:
    """A (SIZE, SIZE, 3) float32 background of the given kind, values 0 to 255."""
    first, second = rng.integers(20, 240, (2, 3)).astype(np.float32)
    second = first + (second - first) * rng.uniform(0.15, 0.6)
    y, x = _GRID
    angle = rng.uniform(0, 2 * math.pi)
    along = x * math.cos(angle) + y * math.sin(angle)
    period = rng.uniform(0.06, 0.25)
    if kind == "plain":
        blend = np.zeros_like(x)
    elif kind == "gradient":
        blend = (along - along.min()) / (along.max() - along.min())
    elif kind == "noise":
        blend = rng.random((SIZE, SIZE), np.float32)
    elif kind == "stripes":
        blend = ((along / period) % 1 > 0.5).astype(np.float32)
    elif kind == "checker":
        blend = ((x // period + y // period) % 2).astype(np.float32)
    elif kind == "clouds":
        coarse = Image.fromarray((rng.random((7, 7)) * 255).astype(np.uint8))
        blend = np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) / np.float32(255)
    else:
        dots = (x / period % 1 - 0.5) ** 2 + (y / period % 1 - 0.5) ** 2
        blend = (dots < 0.08).astype(np.float32)
    return first + blend[..., None] * (second - first)


def count_pixels(scene: Scene) -> np.ndarray:
    """(1 + items, GRID, GRID): how many pixels of each patch, at the tower's size, are whose.

    Row 0 is the background's.
    """
    kinds = len(scene.items) + 1
    owner = scene.owner[_SEEN][:, _SEEN] + 1 + kinds * _PATCH_OF_PIXEL
    counts = np.bincount(owner.ravel(), minlength=kinds * GRID * GRID)
    return counts.reshape(GRID, GRID, kinds).transpose(2, 0, 1)


def label_patches(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """What the vision tower learns to say about each patch.

    Returns
    -------
    labels : ndarray
        (GRID * GRID,) int64, the class of the item that covers most of the patch, or background.
    geometry : ndarray
        (GRID * GRID, 4) float32, that item's centre and extent (x, y, width, height) over SIZE.
    """
    counts = count_pixels(scene)
    counts[0] = int(_COVERED)
    winner = counts.argmax(0).reshape(-1)
    ids = [BACKGROUND] + [CLASS_ID[item.name] for item in scene.items]
    boxes = [(0.0, 0.0, 0.0, 0.0)]
    boxes += [(item.cx, item.cy, item.width, item.height) for item in scene.items]
    return np.asarray(ids)[winner], (np.asarray(boxes, np.float32) / SIZE)[winner]


def label_letters(scene: Scene) -> np.ndarray:
    """Which letters each patch shows.

    Returns
    -------
    ndarray
        (GRID * GRID, 26) bool: a letter counts where it is at least 3 pixels wide in the patch,
        and only in patches that the sign covers.
    """
    shown = np.zeros((GRID, GRID, len(LETTERS)), bool)
    counts = count_pixels(scene)
    side = SIZE / GRID
    for index, item in enumerate(scene.items):
        if not item.is_word:
            continue
        rows = counts[index + 1] > _COVERED
        for letter, start, stop in item.letters:
            edges = np.arange(GRID + 1) * side - item.x0
            overlap = np.minimum(stop, edges[1:]) - np.maximum(start, edges[:-1])
            shown[:, overlap >= 3, LETTERS.index(letter)] |= rows[:, overlap >= 3]
    return shown.reshape(-1, len(LETTERS))
