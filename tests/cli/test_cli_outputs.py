"""Places for results that cannot be written to are refused before any work is done."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from corematching.cli.entry import run_command
from corematching.cli.outputs import check_file, make_folder
from corematching.errors import InputError


@pytest.fixture
def read_only(monkeypatch, tmp_path):
    """A folder that stands on a read-only file system, for whoever asks, root included."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    access = os.access

    def ask(path, rights, **options):
        inside = Path(path) == folder or folder in Path(path).parents
        return not (inside and rights & os.W_OK) and access(path, rights, **options)

    monkeypatch.setattr(os, "access", ask)
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "-q", "What?", "-i", "a.png", "--overlay", "{}/a.png"),
        ("analyze", "--out", "{}/a.html"),
        ("analyze-task", "--out", "{}/a.html"),
        ("analyze-task", "--table", "{}/a.md"),
        ("bench", "--force", "--shape", "tiny", "--out", "{}"),
        ("eval", "--out", "{}"),
    ],
)
def test_read_only_places(read_only, arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_command([word.format(read_only) for word in arguments]) == 2
    said = capsys.readouterr().err
    assert "is read-only: give --" in said and said.count("\n") == 1
    assert list(read_only.iterdir()) == [] and list(tmp_path.iterdir()) == [read_only]


@pytest.mark.parametrize("name", ["no/such/a.html", ".", "a\0.html", "a" * 300, "a/" * 5000])
def test_files_that_cannot_be(name, tmp_path):
    with pytest.raises(InputError, match="--out"):
        check_file(tmp_path / name, "--out")


def test_a_device_is_no_file():
    if not Path("/dev/full").exists():
        pytest.skip("devices of Linux")
    with pytest.raises(InputError, match="no regular file"):
        check_file(Path("/dev/full"), "--out")


@pytest.mark.parametrize("name", ["file", "file/below", "a\0", "a" * 300])
def test_folders_that_cannot_be(name, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="give another folder with --out"):
        make_folder(tmp_path / name, "--out")


def test_good_places(tmp_path):
    make_folder(tmp_path / "a" / "b", "--out")
    check_file(tmp_path / "a" / "b" / "c.html", "--out")
    (tmp_path / "c.html").write_text("")
    check_file(tmp_path / "c.html", "--out")
