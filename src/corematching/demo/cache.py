"""The assembled SceneVLM in the user's cache: built once, whole or not at all, checked on use."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corematching.demo.assemble import Progress, assemble
from corematching.demo.assets import CONFIG_NAME, SceneAssets, sha256_of
from corematching.demo.language import LanguageSource, find_language_model
from corematching.devices import product_dtype
from corematching.errors import InputError
from corematching.loading import load_processor, load_weights

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

ENVIRONMENT = "CORE_MATCHING_CACHE"
MANIFEST = "checksums.json"
LAYOUT = 1
SPARE_BYTES = 32 << 20


def load_demo(
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    cache_dir: Path | str | None = None,
    progress: Progress | None = None,
) -> tuple[Any, Any]:
    """Load SceneVLM, assembling it first when the cache does not hold it.

    Parameters
    ----------
    dtype : torch.dtype or str, optional
        Default: bfloat16, as stored, or float32 on a CPU that multiplies no bfloat16.
    device : torch.device or str, optional
        Default: a CUDA device when there is one, else the CPU.
    cache_dir : path, optional
        Default: ``$CORE_MATCHING_CACHE``, or the user's cache directory.
    progress : callable, optional
        Called as ``progress(step, done)`` while the model is assembled, ``done`` in [0, 1].

    Returns
    -------
    (LlavaForConditionalGeneration, LlavaProcessor)

    Raises
    ------
    InputError
        The language model's wheel is missing, the disk is full, or a shipped file is damaged.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    path = demo_directory(cache_dir, progress=progress)
    target = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or product_dtype(target, torch.bfloat16)
    model = load_weights(AutoModelForImageTextToText, path, dtype=dtype)
    return model.to(target), load_processor(path, backend="pil")


def demo_directory(
    cache_dir: Path | str | None = None,
    assets: SceneAssets | None = None,
    language: LanguageSource | None = None,
    progress: Progress | None = None,
) -> Path:
    """Return SceneVLM's directory, building it when it is missing, damaged or out of date.

    Parameters
    ----------
    cache_dir : path, optional
        As in `load_demo`.
    assets, language : optional
        Default: what the package ships, and the installed wheel.
    progress : callable, optional
        As in `assemble`; called only when something is built.

    Raises
    ------
    InputError
        As in `load_demo`.
    """
    from filelock import FileLock

    parts = assets or SceneAssets.read()
    root = cache_root(cache_dir)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot write to the cache {root} ({error.strerror}): set {ENVIRONMENT} to a "
            "directory that you can write to"
        ) from error
    source = language or find_language_model()
    target = root / f"scenevlm-{cache_key(parts, source)}"
    with FileLock(root / "scenevlm.lock"):
        if is_intact(target):
            return target
        if target.exists():
            logger.warning("%s is damaged, building it again", target)
        return build(target, parts, source, progress)


def cache_root(cache_dir: Path | str | None = None) -> Path:
    """The directory that holds assembled models."""
    import platformdirs

    chosen = cache_dir or os.environ.get(ENVIRONMENT)
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("corematching"))


def cache_key(assets: SceneAssets, source: LanguageSource) -> str:
    """A short name that changes with the shipped assets and with the language model."""
    shipped = (assets.directory / CONFIG_NAME).read_bytes()  # holds the weights' checksum
    return hashlib.sha256(f"{LAYOUT};{source.identity};".encode() + shipped).hexdigest()[:12]


def build(
    target: Path, assets: SceneAssets, source: LanguageSource, progress: Progress | None
) -> Path:
    """Assemble beside ``target`` and move the finished directory there; the lock is held."""
    for leftover in target.parent.glob(".building-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    require_space(target.parent, source.num_bytes + 2 * assets.num_bytes + SPARE_BYTES)
    scratch = Path(tempfile.mkdtemp(prefix=".building-", dir=target.parent))
    try:
        assemble(assets, source, scratch, progress)
        write_manifest(scratch)
        if target.exists():
            shutil.rmtree(target)
        scratch.rename(target)
    except OSError as error:
        raise InputError(
            f"cannot write SceneVLM to {target.parent} ({error.strerror or error}): free some "
            f"space or set {ENVIRONMENT} to another directory"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def require_space(folder: Path, needed: int) -> None:
    """Refuse to start what cannot be finished."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"no room on disk: SceneVLM needs {needed >> 20} MiB in {folder}, {free >> 20} MiB "
            f"are free: free some space or set {ENVIRONMENT} to a directory on another disk"
        )


def write_manifest(folder: Path) -> None:
    """Write the checksum of every file in ``folder``."""
    sums = {file.name: sha256_of(file) for file in sorted(folder.iterdir()) if file.is_file()}
    (folder / MANIFEST).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")


def is_intact(folder: Path) -> bool:
    """Whether every file that the manifest names is there, unchanged."""
    try:
        sums = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return all(sha256_of(folder / name) == digest for name, digest in sums.items())
    except (OSError, ValueError, AttributeError):
        return False
