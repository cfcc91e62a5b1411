"""The machine that a run's times come from."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any


def describe_machine(device: Any) -> str:
    """The processor and how many cores this process may use; on a GPU its name as well."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = f"{_read_processor()}, {count} cores, {platform.system()}"
    if getattr(device, "type", "cpu") != "cuda":
        return text
    import torch

    return f"{torch.cuda.get_device_name(device)}, {text}"


def _read_processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
