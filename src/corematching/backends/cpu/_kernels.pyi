from typing import Any

MAX_BATCH: int
MAX_GEMMS: int

def __getattr__(name: str) -> Any: ...
