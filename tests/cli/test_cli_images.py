from __future__ import annotations

import http.server
import threading

import pytest
from PIL import Image

from corematching.cli.images import read_image
from corematching.errors import InputError


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


@pytest.fixture
def server(tmp_path):
    Image.new("RGB", (3, 2), "green").save(tmp_path / "a.png")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_picture_from_a_url(server, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    assert read_image(f"{server}/a.png").size == (3, 2)
    with pytest.raises(InputError, match=r"cannot fetch .*b\.png \(File not found\)"):
        read_image(f"{server}/b.png")
