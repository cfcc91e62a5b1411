"""Compiled kernels in the cache: made whole, loaded as they were made, and never anyone else's."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import stat
import subprocess
import time

import pytest

from corematching.backends.cpu.native import build, find_library, store

pytestmark = pytest.mark.skipif(find_library() is None, reason="no C compiler")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A library that is quickly compiled, the key of the usual one, and its name."""
    place = tmp_path_factory.mktemp("made")
    command = build._compiler()
    path, key = place / "kernels.so", build._key(command)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "FLAGS", ("-O0", "-shared", "-fPIC"))
        build._compile(command, path)
    return path, key, store.name_of(path, key)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache, and nothing loaded yet."""
    monkeypatch.setenv("CORE_MATCHING_CACHE", str(tmp_path))
    build._find_once.cache_clear()
    yield tmp_path / "native"
    build._find_once.cache_clear()


@pytest.fixture
def stored(fresh, made):
    """A cache with the library in it."""
    fresh.mkdir(mode=0o700)
    path, _, name = made
    shutil.copy(path, fresh / name)
    (fresh / name).chmod(0o500)
    return fresh / name


@pytest.fixture
def compiled(monkeypatch, made):
    """How often something is compiled; what comes out is there already."""
    calls = []

    def compile_again(command, out):
        calls.append(command)
        shutil.copy(made[0], out)

    monkeypatch.setattr(build, "_compile", compile_again)
    return calls


@pytest.fixture
def read_only(fresh, monkeypatch):
    """A cache directory that the system says cannot be written to, whoever runs the tests."""
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != fresh and real(path, mode))


def write_compiler(path, script):
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_compiles_once_and_leaves_nothing_else(fresh, compiled):
    assert find_library() is not None
    (only,) = fresh.iterdir()
    build._find_once.cache_clear()
    assert find_library() is not None
    assert list(fresh.iterdir()) == [only] and len(compiled) == 1
    assert stat.S_IMODE(only.stat().st_mode) == 0o500
    assert stat.S_IMODE(fresh.stat().st_mode) == 0o700


@pytest.mark.parametrize("compiler", ["false", "true"])
def test_a_broken_compiler_is_reported_once(fresh, monkeypatch, caplog, compiler):
    monkeypatch.setenv("CC", compiler)
    with caplog.at_level(logging.WARNING):
        assert find_library() is None and find_library() is None
    (message,) = [r.message for r in caplog.records]
    assert message.startswith("no native kernels, FFNs run in PyTorch:")
    assert not list(fresh.iterdir())


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[: len(b) // 2],
        lambda b: b"",
        lambda b: b"no library at all",
        lambda b: b[:-1] + bytes([b[-1] ^ 1]),
    ],
    ids=["truncated", "empty", "garbage", "one bit"],
)
def test_a_damaged_library_is_made_anew(stored, compiled, damage, caplog):
    contents = stored.read_bytes()
    stored.chmod(0o700)
    stored.write_bytes(damage(contents))
    with caplog.at_level(logging.WARNING):
        assert find_library() is not None
    assert len(compiled) == 1 and "is damaged" in caplog.text
    assert [path.read_bytes() for path in stored.parent.iterdir()] == [contents]


def test_an_intact_library_is_loaded(stored, compiled):
    assert find_library() is not None and not compiled


@pytest.mark.parametrize("kind", ["another library", "text"])
def test_what_is_no_library_of_ours_is_made_anew(stored, made, compiled, kind, tmp_path, caplog):
    """Its checksum is right: a compiler that makes something else has put it there."""
    other = tmp_path / "other.so"
    other.write_text("int cm_other(void) { return 1; }")
    if kind == "another library":
        command = [*build._compiler(), "-shared", "-fPIC", "-x", "c", "-o", str(tmp_path / "o.so")]
        subprocess.run([*command, str(other)], check=True, timeout=60)
        other = tmp_path / "o.so"
    stored.unlink()
    planted = stored.parent / store.name_of(other, made[1])
    shutil.copy(other, planted)
    planted.chmod(0o500)
    with caplog.at_level(logging.WARNING):
        assert find_library() is not None
    assert len(compiled) == 1 and "no library of these kernels" in caplog.text
    assert [path.name for path in stored.parent.iterdir()] == [made[2]]


def test_what_a_compiler_makes_instead_does_not_stay(fresh, monkeypatch, caplog):
    def compile_nothing(_, out):
        out.write_text("something else")

    monkeypatch.setattr(build, "_compile", compile_nothing)
    with caplog.at_level(logging.WARNING):
        assert find_library() is None
    assert "no library of these kernels" in caplog.text and not list(fresh.iterdir())


@pytest.mark.parametrize("mode", [0o777, 0o702])
def test_a_directory_that_everybody_writes_to_is_not_used(stored, compiled, mode, caplog):
    stored.parent.chmod(mode)
    with caplog.at_level(logging.WARNING):
        assert find_library() is not None
    assert len(compiled) == 1 and "everybody may write" in caplog.text
    assert "CORE_MATCHING_CACHE" in caplog.text


@pytest.mark.parametrize("mode", [0o522, 0o720, 0o702])
def test_a_library_that_others_write_to_is_not_loaded(stored, compiled, mode, caplog):
    stored.chmod(mode)
    with caplog.at_level(logging.WARNING):
        assert find_library() is not None
    assert len(compiled) == 1 and "others may write" in caplog.text


@pytest.mark.parametrize("which", ["library", "directory"])
def test_what_belongs_to_somebody_else_is_not_loaded(stored, compiled, which, monkeypatch, caplog):
    theirs = (stored if which == "library" else stored.parent).stat().st_ino
    real = store.Path.stat

    def stat_as_if(path, **kwargs):
        found = real(path, **kwargs)
        if found.st_ino != theirs:
            return found
        return os.stat_result([*found[:4], found.st_uid + 12345, *found[5:]])

    monkeypatch.setattr(store.Path, "stat", stat_as_if)
    with caplog.at_level(logging.WARNING):
        assert find_library() is not None
    assert len(compiled) == 1 and "belongs to somebody else" in caplog.text


def test_a_link_to_a_library_is_not_loaded(stored, made, compiled):
    stored.unlink()
    stored.symlink_to(made[0])
    assert find_library() is not None and len(compiled) == 1


def test_a_cache_that_cannot_be_made_is_replaced_once(fresh, compiled, tmp_path, caplog):
    (tmp_path / "native").write_text("a file where the directory should be")
    with caplog.at_level(logging.WARNING):
        assert find_library() is not None
    assert "for this process alone" in caplog.text and len(compiled) == 1


def test_a_complete_cache_may_be_read_only(stored, compiled, read_only):
    assert find_library() is not None and not compiled


def test_a_read_only_cache_is_replaced_once(fresh, compiled, read_only, caplog):
    with caplog.at_level(logging.WARNING):
        assert find_library() is not None
    assert "is read-only" in caplog.text and not list(fresh.iterdir())


def test_a_full_disk_is_replaced_once(fresh, compiled, monkeypatch, caplog):
    real = store.os.replace

    def replace(source, target):
        if fresh in store.Path(target).parents:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(store.os, "replace", replace)
    with caplog.at_level(logging.WARNING):
        assert find_library() is not None
    assert "No space left" in caplog.text and not list(fresh.iterdir())


def test_libraries_that_are_not_used_any_more_are_removed(fresh, compiled):
    fresh.mkdir(mode=0o700)
    old, new = fresh / "kernels-0123456789abcdef.so", fresh / "kernels-fedcba9876543210-00.so"
    left, busy = fresh / f"{store.BUILDING}old", fresh / f"{store.BUILDING}new"
    foreign = fresh / "notes.txt"
    for path in (old, new, foreign):
        path.write_text("")
    for path in (left, busy):
        path.mkdir()
        (path / "kernels.so").write_text("half a library")
    long_ago = time.time() - 2 * store.UNUSED_SECONDS
    for path in (old, foreign, left):
        os.utime(path, (long_ago, long_ago))
    assert find_library() is not None
    names = {path.name for path in fresh.iterdir()}
    assert not {old.name, left.name} & names and {new.name, busy.name, foreign.name} < names


def test_use_is_noted(stored):
    long_ago = time.time() - 2 * store.UNUSED_SECONDS
    os.utime(stored, (long_ago, long_ago))
    assert find_library() is not None
    assert time.time() - stored.stat().st_mtime < store.DAY


@pytest.mark.parametrize("words", ["", " ", "\t\n"])
def test_an_empty_choice_of_compiler_is_none(monkeypatch, words):
    monkeypatch.setenv("CC", words)
    assert build._compiler() in (["cc"], ["gcc"], ["clang"])


def test_all_words_of_the_compiler_run(fresh, monkeypatch, tmp_path):
    seen = tmp_path / "seen"
    wrapper = write_compiler(tmp_path / "my wrapper", f'echo "$@" >> {seen}\nexec "$@"')
    monkeypatch.setenv("CC", f"'{wrapper}' {build._compiler()[0]} -DCM_ONE -DCM_TWO")
    monkeypatch.setattr(build, "FLAGS", ("-O0", "-shared", "-fPIC"))
    assert find_library() is not None
    assert "-DCM_ONE -DCM_TWO" in seen.read_text()


def test_an_unfinished_choice_of_compiler_is_named(fresh, monkeypatch, caplog):
    monkeypatch.setenv("CC", "gcc 'half")
    with caplog.at_level(logging.WARNING):
        assert find_library() is None
    assert "is no command" in caplog.text


def test_a_compiler_may_speak_another_encoding(fresh, monkeypatch, tmp_path, caplog):
    script = "printf 'Erreur: fen\\352tre \\377\\n' >&2; exit 1"
    monkeypatch.setenv("CC", write_compiler(tmp_path / "cc", script))
    with caplog.at_level(logging.WARNING):
        assert find_library() is None
    assert "Erreur: fen" in caplog.text


def test_a_compiler_that_hangs_ends_with_all_that_it_started(fresh, monkeypatch, tmp_path, caplog):
    child = tmp_path / "child"
    script = f"sleep 60 & echo $! > {child}.new; mv {child}.new {child}; wait"
    monkeypatch.setenv("CC", write_compiler(tmp_path / "cc", script))
    monkeypatch.setattr(build, "ANSWER_SECONDS", 2)
    begun = time.monotonic()
    with caplog.at_level(logging.WARNING):
        assert find_library() is None
    assert time.monotonic() - begun < 50 and "did not end within 2 seconds" in caplog.text
    while child.exists() and is_running(int(child.read_text())):
        assert time.monotonic() - begun < 50
        time.sleep(0.05)


def is_running(number):
    """Whether a process runs; one that has ended and not been waited for does not."""
    try:
        with open(f"/proc/{number}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def test_the_store_gives_what_was_put(tmp_path, made):
    path = shutil.copy(made[0], tmp_path / "x.so")
    put = store.put(store.Path(path), tmp_path, "key")
    assert store.find_stored(tmp_path, "key") == put and store.find_stored(tmp_path, "no") is None
    assert ctypes.CDLL(str(put)).cm_has_tiles is not None
