"""The assembled SceneVLM in the user's cache: built once, whole or not at all, checked on use."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corematching.demo.assemble import Progress, assemble
from corematching.demo.assets import CONFIG_NAME, SceneAssets, sha256_of
from corematching.demo.language import LanguageSource, find_language_model
from corematching.devices import default_device, product_dtype
from corematching.directories import CACHE_VARIABLE, cache_root
from corematching.errors import InputError, first_line
from corematching.loading import load_processor, load_weights

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

MANIFEST = "checksums.json"
PREFIX = "scenevlm-"
NEEDED = {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json"}
LAYOUT = 1
UNUSED_SECONDS = 7 * 24 * 3600
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
    target = device or default_device()
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
        Default: the package's own, and the installed wheel.
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
    source = language or find_language_model()
    target = root / f"{PREFIX}{cache_key(parts, source)}"
    if is_intact(target):  # needs no lock, and so no right to write
        mark_used(target)
        return target
    lock = FileLock(root / "scenevlm.lock")
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        held = "a damaged" if os.path.lexists(target) else "no"
        raise InputError(
            f"the cache {root} holds {held} SceneVLM and cannot be written to "
            f"({error.strerror or error}): set {CACHE_VARIABLE} to a directory that you can write "
            "to"
        ) from error
    try:
        if is_intact(target):  # another process has built it meanwhile
            return target
        if os.path.lexists(target):
            logger.warning("%s is damaged, building it again", target)
        build(target, parts, source, progress)
        remove_old(target)
    finally:
        lock.release()
    return target


def cache_key(assets: SceneAssets, source: LanguageSource) -> str:
    """A short name that changes with the shipped assets and with the language model."""
    shipped = (assets.directory / CONFIG_NAME).read_bytes()  # holds the weights' checksum
    return hashlib.sha256(f"{LAYOUT};{source.identity};".encode() + shipped).hexdigest()[:12]


def build(
    target: Path, assets: SceneAssets, source: LanguageSource, progress: Progress | None
) -> None:
    """Assemble beside ``target`` and move the finished directory there; the lock is held."""
    for leftover in target.parent.glob(".building-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    require_space(target.parent, source.num_bytes + 2 * assets.num_bytes + SPARE_BYTES)
    scratch: Path | None = None
    try:
        scratch = Path(tempfile.mkdtemp(prefix=".building-", dir=target.parent))
        assemble(assets, source, scratch, progress)
        write_manifest(scratch)
        clear_place(target)
        scratch.rename(target)
    except Exception as error:
        if not is_of_file(error):
            raise
        raise InputError(
            f"cannot write SceneVLM to {target.parent} ({first_line(error)}): free some space or "
            f"set {CACHE_VARIABLE} to another directory"
        ) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def is_of_file(error: Exception) -> bool:
    """Whether an error is one of writing a file; writers in Rust raise their own types."""
    return isinstance(error, OSError) or "(os error " in str(error)


def clear_place(target: Path) -> None:
    """Remove anything at the model's path; of a symbolic link, the link alone."""
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)


def mark_used(folder: Path) -> None:
    """Note that a model is in use, where the cache can be written to."""
    with contextlib.suppress(OSError):
        os.utime(folder / MANIFEST)


def remove_old(current: Path) -> None:
    """Remove the models of other versions that were not used for `UNUSED_SECONDS`."""
    oldest = time.time() - UNUSED_SECONDS
    for folder in current.parent.glob(f"{PREFIX}*"):
        if folder == current or folder.is_symlink() or not folder.is_dir():
            continue
        with contextlib.suppress(OSError):
            manifest = folder / MANIFEST
            used = (manifest if manifest.exists() else folder).stat().st_mtime
            if used < oldest:
                shutil.rmtree(folder, ignore_errors=True)


def require_space(folder: Path, needed: int) -> None:
    """Check the free space before the assembly."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"no room on disk: SceneVLM needs {needed >> 20} MiB in {folder}, {free >> 20} MiB "
            f"are free: free some space or set {CACHE_VARIABLE} to a directory on another disk"
        )


def write_manifest(folder: Path) -> None:
    """Write the checksum of every file in ``folder``."""
    sums = {file.name: sha256_of(file) for file in sorted(folder.iterdir()) if file.is_file()}
    (folder / MANIFEST).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")


def is_intact(folder: Path) -> bool:
    """Whether the folder holds a whole model: every file of the manifest, unchanged."""
    try:
        sums = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        names = {entry.name for entry in folder.iterdir()}
        if not isinstance(sums, dict) or not NEEDED <= set(sums) <= names:
            return False
        return all(sha256_of(folder / name) == digest for name, digest in sums.items())
    except (OSError, ValueError, RecursionError):
        return False
