from __future__ import annotations

import pytest

from corematching.runtime import attach, detach
from tests.isas import isa, native_prompts  # noqa: F401
from tests.models import build
from tests.runtime.native_prompts import native_calls  # noqa: F401


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Scratch files go to the test's own directory."""
    monkeypatch.setenv("CORE_MATCHING_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def stored(tmp_path_factory):
    """Directories of saved tiny models, by family."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            build(name).save_pretrained(made[name])
        return made[name]

    return get


@pytest.fixture
def attached():
    """`attach`, undone after the test."""
    models = []

    def put(model, method):
        models.append(model)
        return attach(model, method)

    yield put
    for model in models:
        detach(model)
