from __future__ import annotations

import contextlib
import io
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from corematching.errors import InputError
from corematching.media import Limits, decode_picture, read_file, read_picture, to_rgb
from tests.media.conftest import answer

read_image = partial(read_picture, public_only=False)


def encode(picture, format="PNG", **options):
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def test_picture_becomes_rgb(tmp_path):
    Image.new("RGBA", (5, 4), (255, 0, 0, 128)).save(tmp_path / "a.png")
    image = read_image(str(tmp_path / "a.png"))
    assert image.mode == "RGB" and image.size == (5, 4)


def test_rotation_in_the_metadata_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(str(tmp_path / "a.jpg")).size == (4, 6)


def test_missing_picture(tmp_path):
    with pytest.raises(InputError, match=r"no picture at .*check the path"):
        read_image(str(tmp_path / "none.png"))


def test_directory_is_no_picture(tmp_path):
    with pytest.raises(InputError, match="give a picture file"):
        read_image(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"hello", None])
def test_broken_picture(tmp_path, content):
    path = tmp_path / "a.png"
    if content is None:  # cut off in the middle
        Image.effect_noise((64, 64), 50).save(path)
        content = path.read_bytes()[:900]
    path.write_bytes(content)
    with pytest.raises(InputError, match="no picture that can be read"):
        read_image(str(path))


def test_picture_from_a_url(serve):
    server = serve(answer(encode(Image.new("RGB", (3, 2), "green"))))
    assert read_image(f"{server.url}/a.png").size == (3, 2)
    with pytest.raises(InputError, match="no public address"):
        read_picture(f"{server.url}/a.png")


@pytest.mark.parametrize("place", ["ftp://host/a.png", "file:///a.png", "data://x"])
def test_other_schemes(place):
    with pytest.raises(InputError, match="only http and https"):
        read_image(place)


@pytest.mark.parametrize("place", ["~nouser/x.png", "a\0.png", "a" * 5000, "\ud800.png", ""])
def test_paths_that_are_none(place):
    with pytest.raises(InputError, match=r"path|picture"):
        read_image(place)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="devices of POSIX")
@pytest.mark.parametrize("place", ["/dev/zero", "/dev/null"])
def test_devices(place):
    with pytest.raises(InputError, match="a device, a pipe or a socket"):
        read_image(place)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes of POSIX")
@pytest.mark.parametrize("link", [False, True])
def test_pipes_do_not_block(tmp_path, link):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    if link:
        path = tmp_path / "link"
        path.symlink_to("pipe")
    with pytest.raises(InputError, match="a device, a pipe or a socket"):
        read_image(str(path))


def test_larger_file_than_the_limit(tmp_path):
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # takes no room
    with pytest.raises(InputError, match="1 TiB or more, the limit is 64 MiB"):
        read_image(str(path))


def test_file_that_does_not_tell_its_size():
    path = Path("/proc/self/status")
    if not path.exists():
        pytest.skip("no /proc")
    with pytest.raises(InputError, match="the limit is 10 B"):
        read_file(path, Limits(bytes=10))


@pytest.mark.parametrize("side", [9_000, 13_000, 20_000, 60_000])
def test_more_pixels_than_the_limit(side):
    data = b"P4\n%d %d\n" % (side, side)
    with pytest.raises(InputError, match=rf"{side * side:,} pixels, the limit is 64,000,000"):
        decode_picture(data, "bomb.pbm")


def test_the_limit_on_pixels_is_exact():
    data = encode(Image.new("L", (10, 10)))
    assert decode_picture(data, "a", Limits(pixels=100)).size == (10, 10)
    with pytest.raises(InputError, match="100 pixels, the limit is 99"):
        decode_picture(data, "a", Limits(pixels=99))


def test_programs_are_not_run(tmp_path):
    with pytest.raises(InputError, match="no picture that can be read"):
        decode_picture(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a.eps")


RAMP = np.linspace(0, 1, 256, dtype=np.float64).reshape(16, 16)


@pytest.mark.parametrize(
    ("values", "format"),
    [
        ((RAMP * 65535).round().astype(np.uint16), "PNG"),
        ((RAMP * 65535).round().astype(np.uint16), "TIFF"),
        ((RAMP * 65535).round().astype(np.uint16), "PPM"),
        ((RAMP * 65535).round().astype(np.uint16), "JPEG2000"),
        ((RAMP * 65535).round().astype(np.uint16).astype(">u2"), "TIFF"),
        ((RAMP * 65535).round().astype(np.int32), "TIFF"),
        ((RAMP * 255).round().astype(np.int32), "TIFF"),
        ((RAMP * 2**31 - 2**30).round().astype(np.int32), "TIFF"),
        (RAMP.astype(np.float32), "TIFF"),
        ((RAMP * 255).astype(np.float32), "TIFF"),
        ((RAMP * 3000 - 1000).astype(np.float32), "TIFF"),
        (((RAMP - 0.5) * 3e38).astype(np.float32), "TIFF"),
    ],
)
def test_more_than_8_bits(values, format):
    shown = np.asarray(decode_picture(encode(Image.fromarray(values), format), "a"))
    wanted = (RAMP * 255).round()[..., None]
    assert np.abs(shown - wanted).max() <= (3 if format == "JPEG2000" else 1)


def test_dark_16_bit_pictures_stay_dark():
    dark = Image.fromarray(np.full((4, 4), 257 * 3, np.uint16))
    assert np.unique(np.asarray(decode_picture(encode(dark), "a"))).tolist() == [3]


def test_values_that_are_none():
    values = np.array([[np.nan, 0.0], [np.inf, 1.0]], np.float32)
    shown = np.asarray(decode_picture(encode(Image.fromarray(values), "TIFF"), "a"))
    assert shown[..., 0].tolist() == [[0, 0], [255, 255]]
    with pytest.raises(InputError, match="no finite value"):
        to_rgb(Image.fromarray(np.full((2, 2), np.nan, np.float32)))


def test_constant_picture():
    grey = to_rgb(Image.fromarray(np.full((2, 2), 1e9, np.float32)))
    assert grey.getpixel((0, 0)) == (0, 0, 0)


def test_rotated_16_bit_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(np.zeros((4, 6), np.uint16))
    for format in ("PNG", "TIFF"):
        assert decode_picture(encode(picture, format, exif=exif), "a").size == (4, 6)


@settings(max_examples=150, derandomize=True)
@given(data=st.data())
def test_damaged_files_are_refused_or_read(data):
    good = data.draw(st.sampled_from(GOOD))
    place = data.draw(st.integers(0, len(good) - 1))
    piece = data.draw(st.binary(max_size=8))
    with contextlib.suppress(InputError):
        assert decode_picture(good[:place] + piece + good[place + len(piece) :], "a").mode == "RGB"


GOOD = [
    encode(Image.effect_noise((9, 7), 50).convert(mode), format)
    for format, mode in (
        ("PNG", "P"),
        ("PNG", "RGB"),
        ("JPEG", "RGB"),
        ("WEBP", "RGB"),
        ("GIF", "P"),
        ("BMP", "RGB"),
        ("TIFF", "RGB"),
        ("PPM", "RGB"),
    )
]
