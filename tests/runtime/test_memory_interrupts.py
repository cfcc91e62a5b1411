"""An interrupt at any line of what streams weights leaves the model as it was."""

from __future__ import annotations

import gc
import sys
from contextlib import contextmanager

import pytest

from corematching.runtime import detach, is_attached, load
from tests.models import build, make_inputs
from tests.runtime.capped import CAP, answer, in_memory, method, same, snapshot, unchanged

pytestmark = pytest.mark.usefixtures("own_cache")
