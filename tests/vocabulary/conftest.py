"""Models that speak otherwise than each other."""

import shutil
import warnings

import pytest
import torch

from merge3.errors import Merge3Warning
from merge3.recipe import Recipe
from tests.speakers import make_speakers
from tests.worlds import shared


@pytest.fixture(scope="session")
def speakers():
    yield from shared(make_speakers)


@pytest.fixture(scope="session")
def bf16_speakers():
    yield from shared(make_speakers, dtype=torch.bfloat16, padded=5)


@pytest.fixture(scope="session")
def tied_speakers():
    yield from shared(make_speakers, tied=True)


@pytest.fixture
def own_speakers(speakers, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(speakers, tmp_path / "speakers")


@pytest.fixture
def recipe_of():
    return _recipe_of


def _recipe_of(root, names=("one", "two"), method="task_arithmetic", base="base", weight=0.4, **changes):
    models = [{"model": str(root / name), "parameters": {"weight": weight}} for name in names]
    data = {"merge_method": method, "models": models} | changes
    return Recipe.parse(data | ({"base_model": str(root / base)} if base else {}))


@pytest.fixture(autouse=True)
def _no_strangers():
    """They were never trained, so they do not seem to come from each other."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*does not seem to be a fine-tune", Merge3Warning)
        yield
