"""A harness's questions as chat turns, with pictures where they belong."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from corematching import media
from corematching.chat import Part, Turn
from corematching.errors import InputError

_PLACE = re.compile(r"<image(?: (\d+))?>")


def user_turn(text: str, visuals: Sequence[Any]) -> list[Turn]:
    """One question of a user.

    Parameters
    ----------
    text : str
        May hold places for pictures, ``<image>`` or ``<image 2>``.
    visuals : sequence
        Pictures, see `open_picture`. Those without a place come first.

    Raises
    ------
    InputError
        A visual is no picture.
    """
    pictures = [open_picture(visual) for visual in visuals]
    parts, placed = place_pictures(text, pictures)
    first = [_image(picture) for index, picture in enumerate(pictures) if index not in placed]
    return [{"role": "user", "content": first + parts}]


def place_pictures(text: str, pictures: Sequence[Image.Image]) -> tuple[list[Part], set[int]]:
    """Split a text at its places for pictures.

    A numbered place that is named a second time, or has no picture, stays text; an unnumbered one
    without a picture goes.

    Returns
    -------
    parts : list of Part
    placed : set of int
        The pictures that are in ``parts``.
    """
    numbers = [int(number) - 1 for number in _PLACE.findall(text) if number]
    free = iter([index for index in range(len(pictures)) if index not in numbers])
    parts: list[Part] = []
    placed: set[int] = set()
    written = ""
    start = 0
    for match in _PLACE.finditer(text):
        written += text[start : match.start()]
        start = match.end()
        index = int(match[1]) - 1 if match[1] else next(free, None)
        if index is None:
            continue
        if index in placed or not 0 <= index < len(pictures):
            written += match[0]
            continue
        parts += [*_text(written), _image(pictures[index])]
        placed.add(index)
        written = ""
    return parts + _text(written + text[start:]), placed


def read_turns(messages: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """Turns as lmms-eval's tasks give them: parts of type "text" or "image", or a bare text.

    Raises
    ------
    InputError
        A part is neither text nor a picture.
    """
    turns = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        turns.append({"role": message["role"], "content": [_read_part(part) for part in content]})
    return turns


def open_picture(visual: Any) -> Image.Image:
    """A picture as RGB, from a PIL image or a path.

    Raises
    ------
    InputError
        It is neither, or cannot be read.
    """
    if isinstance(visual, Image.Image):
        return media.to_rgb(visual)
    if not isinstance(visual, str | Path):
        raise _not_a_picture(type(visual).__name__)
    try:
        return media.open_picture(visual)
    except InputError as error:
        raise _not_a_picture(str(visual)) from error


def _read_part(part: Mapping[str, Any]) -> Part:
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    if part["type"] != "image":
        raise _not_a_picture(part["type"])
    return _image(open_picture(part["image"] if "image" in part else part["url"]))


def _not_a_picture(what: str) -> InputError:
    return InputError(
        f"the task shows '{what}', but this model takes pictures and text only: choose tasks "
        "without video and audio, and with pictures that can be read"
    )


def _image(picture: Image.Image) -> Part:
    return {"type": "image", "image": picture}


def _text(text: str) -> list[Part]:
    return [{"type": "text", "text": text}] if text else []
