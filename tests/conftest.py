"""Real, tiny checkpoints made by transformers, shared by all tests."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit what follows
    # What was found out about architectures in another run, by other code, must not answer for this one's.
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    os.environ.setdefault("MPLCONFIGDIR", str(caches / "matplotlib"))  # its fonts take seconds to find again
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="merge3-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

from merge3.threads import configure

configure()  # as the commands do: on a machine that others use too, spinning threads make minutes of seconds

import pytest  # noqa: E402
import torch  # noqa: E402

from merge3.world.family import make_family  # noqa: E402
from merge3.world.searched import make_searched  # noqa: E402
from tests.worlds import shared  # noqa: E402


def pytest_collection_modifyitems(items):
    """The file that takes longest begins first: at the end nothing would be beside it."""
    items.sort(key=lambda item: item.path.name != "test_emulated.py")


@pytest.fixture(scope="session", autouse=True)
def _quiet():
    import transformers

    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def family():
    """Four-layer float32 Llamas: a base and three experts."""
    yield from shared(make_family)


@pytest.fixture(scope="session")
def bf16_family():
    """The same in bfloat16, where magnitudes tie massively."""
    yield from shared(make_family, dtype=torch.bfloat16, scale=0.002)


@pytest.fixture(scope="session")
def tied_family():
    """Llamas whose head is the embedding."""
    yield from shared(make_family, experts=2, tied=True)


@pytest.fixture(scope="session")
def tiny_world():
    """The demo's models, barely trained: base, four experts, items and an evolve.yaml."""
    yield from shared(make_searched, base_steps=60, expert_steps=10)


@pytest.fixture(scope="session")
def solving_world():
    """The same, trained until each item is solved by some models: calibration has something to learn."""
    yield from shared(make_searched, base_steps=160, expert_steps=15)


@pytest.fixture
def own_world(tiny_world, tmp_path):
    """A copy of the tiny world that a test may change."""
    return shutil.copytree(tiny_world, tmp_path / "world")
