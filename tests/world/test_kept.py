"""Worlds are made once, whoever asks, and are whole or not there."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from merge3.world.kept import made
from merge3.world.training import make_models

ROOT = Path(__file__).resolve().parents[2]


def grow(folder, word, wait=0.0):
    """Two files, with a while between them."""
    with open(folder.parent / "calls", "a") as calls:
        calls.write(f"{word}\n")
    (folder / "first").write_text(word)
    time.sleep(wait)
    (folder / "second").write_text(f"{word} {torch.rand(1).item()} {torch.get_num_threads()}")


def calls(root):
    return (root / "calls").read_text().split()


def test_the_same_is_made_once_and_something_else_beside_it(tmp_path):
    first, again, other = made(tmp_path, grow, word="a"), made(tmp_path, grow, word="a"), made(tmp_path, grow, word="b")
    assert first == again != other and first.name.startswith("grow-")
    assert calls(tmp_path) == ["a", "b"] and (other / "first").read_text() == "b"


def test_who_asks_at_the_same_time_waits_for_it(tmp_path):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(made(tmp_path, grow, word="a", wait=0.3))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls(tmp_path) == ["a"] and len(found) == 4 and len(set(found)) == 1
    assert {p.name for p in found[0].iterdir()} == {"first", "second"}


def test_the_random_state_is_its_own(tmp_path):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    made(tmp_path, grow, word="a")
    assert torch.equal(torch.get_rng_state(), before)


KILLED = """
import sys
from pathlib import Path
from merge3.world.kept import made
from tests.world.test_kept import grow
made(Path(sys.argv[1]), grow, word="a", wait=600.0)
"""


def test_a_maker_that_is_killed_leaves_nothing(tmp_path):
    maker = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT)
    while not list(tmp_path.glob(".grow-*.partial/first")):
        assert maker.poll() is None
        time.sleep(0.01)
    maker.send_signal(signal.SIGKILL)
    maker.wait()
    (partial,) = tmp_path.glob(".grow-*.partial")
    (partial / "leftover").write_text("")
    assert not list(tmp_path.glob("grow-*"))
    # The same place, this time to the end.
    name = partial.name.removeprefix(".").removesuffix(".partial")
    folder = made(tmp_path, quickly(grow), word="a", wait=600.0)
    assert folder.name == name and {p.name for p in folder.iterdir()} == {"first", "second"} and not partial.exists()


def quickly(make):
    """As it is for whoever looks at it, without the waiting."""
    from functools import wraps

    @wraps(make)
    def hurried(folder, word, wait):
        make(folder, word)

    return hurried


def test_training_gives_the_same_bits(tmp_path):
    few = dict(seed=1, base_steps=2, expert_steps=1, items=3)
    one, two = (made(tmp_path / name, make_models, **few) for name in ("one", "two"))
    files = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
    assert len(files) > 5 * 3 and all((one / f).read_bytes() == (two / f).read_bytes() for f in files)
    weights = {
        (one / name / "model.safetensors").read_bytes()
        for name in ("base", "english", "italian", "translation", "sorting")
    }
    assert len(weights) == 5
