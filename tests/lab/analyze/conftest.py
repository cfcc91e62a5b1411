"""The tiny model and the tiny split of the evaluation's tests."""

from tests.cli.conftest import tiny_vlm  # noqa: F401
from tests.lab.evaluate.conftest import split, subject, task  # noqa: F401
