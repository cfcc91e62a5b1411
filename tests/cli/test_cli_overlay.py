from __future__ import annotations

from math import nan

import numpy as np
import pytest
from PIL import Image

from corematching.cli.overlay import (
    Choice,
    dim_dropped,
    draw_overlay,
    grid_side,
    outline,
    shown_area,
)
from corematching.errors import InputError


@pytest.mark.parametrize(
    ("tokens", "images", "side"),
    [(196, 1, 14), (392, 2, 14), (195, 1, None), (196, 3, None), (4, 0, None), (0, 1, 0)],
)
def test_grid_side(tokens, images, side):
    assert grid_side(tokens, images) == side


def test_only_dropped_patches_are_dimmed():
    image = Image.new("RGB", (896, 896), (200, 0, 0))
    mask = np.array([[True, False], [False, True]])
    pixels = dim_dropped(image, mask)
    assert (pixels[:448, :448] == (200, 0, 0)).all()
    assert (pixels[448:, 448:] == (200, 0, 0)).all()
    dropped = pixels[:448, 448:]
    assert (dropped == dropped[0, 0]).all() and (dropped[0, 0] > 150).all()


def test_outline_goes_round_the_kept_patches():
    mask = np.zeros((3, 3), dtype=bool)
    mask[1, 2] = True
    square = {((2, 1), (3, 1)), ((2, 2), (3, 2)), ((2, 1), (2, 2)), ((3, 1), (3, 2))}
    assert set(outline(mask)) == square


def test_centre_crop_is_followed():
    class Crop:
        do_center_crop = True

    assert shown_area(Image.new("RGB", (80, 40)), Crop()).size == (40, 40)
    assert shown_area(Image.new("RGB", (80, 40)), None).size == (80, 40)


def test_picture_and_curve(tmp_path):
    keep = [index % 3 == 0 for index in range(16)]
    scores = [16.0 - index if kept else 0.1 for index, kept in enumerate(keep)]
    path = tmp_path / "out.png"
    assert draw_overlay(path, [Image.new("RGB", (32, 32), "red")], Choice(keep, scores, 1.0))
    with Image.open(path) as drawn:
        drawn.load()
        assert drawn.format == "PNG" and drawn.width > drawn.height
        colours = {colour for _, colour in drawn.convert("RGB").getcolors(1 << 20)}
    assert (255, 0, 0) in colours


def test_only_the_curve_where_there_is_no_grid(tmp_path):
    keep = [True] * 5 + [False] * 10
    choice = Choice(keep, [*map(float, range(15))], nan)
    image = Image.new("RGB", (32, 32), "red")
    assert not draw_overlay(tmp_path / "a.png", [image], choice)
    assert not draw_overlay(tmp_path / "b.png", [image], Choice(keep[:4], [0.0] * 4, nan), False)
    with Image.open(tmp_path / "a.png") as drawn:
        colours = {colour for _, colour in drawn.convert("RGB").getcolors(1 << 20)}
    assert (255, 0, 0) not in colours


def test_tokens_that_were_never_scored(tmp_path):
    choice = Choice([True, False, False, True], [2.0, nan, 1.0, 2.0], 2.0)
    assert draw_overlay(tmp_path / "a.png", [Image.new("RGB", (8, 8))], choice)


def test_nothing_to_draw(tmp_path):
    with pytest.raises(InputError, match="no image token"):
        draw_overlay(tmp_path / "a.png", [], Choice([], [], nan))


def test_path_that_cannot_be_written(tmp_path):
    choice = Choice([True], [1.0], 1.0)
    with pytest.raises(InputError, match="give --overlay another path"):
        draw_overlay(tmp_path, [Image.new("RGB", (8, 8))], choice)
