"""Settings that all tests share."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; each core has a worker

from hypothesis import settings

settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")
