"""Worlds that all runs of the tests share, in build/worlds."""

from pathlib import Path

from merge3.world.kept import made

WORLDS = Path(__file__).resolve().parents[1] / "build" / "worlds"


def shared(make, **arguments):
    """For a fixture to `yield from`: the folder that `make` fills. Fails at the end where a test has changed it."""
    folder = made(WORLDS, make, **arguments)
    before = _listing(folder)
    yield folder
    assert _listing(folder) == before, f"a test changed {folder}: delete it, and let that test work on a copy"


def _listing(folder):
    """Every file with its size and the time of its last change."""
    return {(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}
