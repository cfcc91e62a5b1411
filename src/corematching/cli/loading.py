"""Models by name, with progress and notes for the terminal."""

from __future__ import annotations

import os
import socket
import urllib.parse
from pathlib import Path

from corematching.cli import console
from corematching.named_models import LoadedModel, is_scenevlm, load_named


def load_model(
    name: str | None,
    device: str | None = None,
    dtype: str = "auto",
    memory: str | None = None,
) -> LoadedModel:
    """`load_named`, with a bar and with a note where the dtype is slow here."""
    from corematching.devices import multiplies

    console.quieten_libraries()
    if name is None or is_scenevlm(name):
        console.hide_library_bars()
        with console.stepping("assembling SceneVLM (once)") as progress:
            return load_named(name, device, dtype, progress=progress)
    go_offline_without_network(name)
    with console.waiting(f"loading {name}"):
        loaded = load_named(name, device, dtype, memory)
    if not multiplies(loaded.model.device, loaded.model.dtype):
        console.note(
            f"this processor multiplies no {str(loaded.model.dtype).removeprefix('torch.')}: "
            "--dtype float32 is several times faster if the memory holds it"
        )
    return loaded


def go_offline_without_network(name: str) -> None:
    """Spare the user half a minute of retries when the hub's name cannot even be looked up."""
    proxied = any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"))
    if Path(name).is_dir() or proxied or os.environ.get("HF_HUB_OFFLINE"):
        return
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        socket.getaddrinfo(urllib.parse.urlparse(endpoint).hostname, 443)
    except OSError:
        from huggingface_hub import constants

        constants.HF_HUB_OFFLINE = True
