"""Loggers: imported only where they are asked for, told all of a run, and no run ends because one fails."""

import importlib.util
import subprocess
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
import yaml

from merge3.client import run
from merge3.client.loggers import LOGGERS, Loggers, Row, check_loggers
from merge3.errors import ConfigError, Unavailable
from merge3.search.config_files import load_config
from merge3.search.watching import JournalReader
from tests.commands import client
from tests.watching import candidate, journaled

RESULT = {"heldout": 0.75, "baselines": {"base": 0.25, "uniform_linear": 0.5}, "candidates": 5}


@pytest.fixture
def came(tmp_path):
    """Five candidates in three generations, one of them failed."""
    values = ([0.25], [0.5], None, [0.125], [0.75])
    reader = JournalReader(journaled(tmp_path / "run", *(candidate(i, v) for i, v in enumerate(values))))
    yield reader.new()
    reader.close()


@pytest.fixture(scope="module")
def config(tiny_world):
    return load_config(tiny_world / "evolve.yaml")


@pytest.fixture
def recorded(monkeypatch):
    """What a logger of the name `recording` is told; it fails in the call that `.fails` names."""
    told = SimpleNamespace(calls=[], fails="")

    def call(name, *arguments):
        told.calls.append((name, *arguments))
        if name == told.fails:
            raise RuntimeError(f"no {name}")

    logger = SimpleNamespace(
        candidate=lambda number, seen, best: call("candidate", number, seen.values[0], best),
        generation=lambda *arguments: call("generation", *arguments),
        end=lambda result: call("end", result),
    )
    module = ModuleType("recording_logger")
    module.open_logger = lambda directory, config: call("open") or logger
    monkeypatch.setitem(sys.modules, "recording_logger", module)
    monkeypatch.setitem(LOGGERS, "recording", Row("json", "recording_logger"))
    return told


def test_a_logger_is_told_candidates_generations_and_the_end(recorded, came, tmp_path, config):
    loggers = Loggers(["recording", "recording"], tmp_path, config)
    loggers([])
    loggers(came[:2])
    loggers(came[2:])
    loggers.end(RESULT)
    assert recorded.calls == [
        ("open",),
        ("candidate", 1, 0.25, 0.25),
        ("candidate", 2, 0.5, 0.5),
        ("generation", 0, 2, 0.375),
        ("candidate", 3, None, 0.5),
        ("candidate", 4, 0.125, 0.5),
        ("generation", 1, 4, 0.125),
        ("candidate", 5, 0.75, 0.75),
        ("generation", 2, 5, 0.75),
        ("end", RESULT),
    ]
    loggers.end(RESULT)
    assert len(recorded.calls) == 10, "an ended logger is told nothing"


def test_who_comes_late_ends_no_generation(recorded, tmp_path, config):
    """Asked before the last one was told, and counted with those among which it came."""
    numbered = [candidate(number, [0.25 * number]) for number in (0, 3, 1, 2)]
    loggers = Loggers(["recording"], tmp_path, config)
    reader = JournalReader(journaled(tmp_path, *numbered))
    loggers(reader.new())
    reader.close()
    loggers.end(RESULT)
    ended = [call for call in recorded.calls if call[0] == "generation"]
    assert ended == [("generation", 0, 1, 0.0), ("generation", 1, 4, 0.5)]


@pytest.mark.parametrize("fails, calls", [("open", 1), ("candidate", 2), ("generation", 4), ("end", 10)])
def test_one_that_fails_is_said_once_and_left_alone(recorded, came, tmp_path, config, capsys, fails, calls):
    recorded.fails = fails
    loggers = Loggers(["recording"], tmp_path, config)
    loggers(came)
    loggers.end(RESULT)
    assert len(recorded.calls) == calls
    assert capsys.readouterr().err == f"logging to recording ended: RuntimeError: no {fails}\n"


def test_a_run_tells_its_loggers_even_when_it_is_resumed(recorded, tiny_world, tmp_path):
    data = yaml.safe_load((tiny_world / "evolve.yaml").read_text())
    config = load_config(tiny_world / "evolve.yaml").model_copy(update={"logging": ("recording",)})
    result = run.evolve(config, tmp_path, quiet=True, export=False)
    numbers = [call[1] for call in recorded.calls if call[0] == "candidate"]
    assert numbers == list(range(1, data["optimizer"]["budget"] + 1)) and recorded.calls[-1] == ("end", result)
    before, recorded.calls[:] = list(recorded.calls), []
    again = run.evolve(config, tmp_path, resume=True, quiet=True, export=False)
    assert recorded.calls[:-1] == before[:-1] and recorded.calls[-1] == ("end", again)


def test_a_run_that_fails_ends_its_loggers(recorded, tiny_world, tmp_path, monkeypatch):
    config = load_config(tiny_world / "evolve.yaml").model_copy(update={"logging": ("recording",)})
    (tmp_path / "best.yaml").mkdir()  # the winner cannot be written
    with pytest.raises(Exception, match=r"best\.yaml"):
        run.evolve(config, tmp_path, quiet=True, export=False)
    assert recorded.calls[-1] == ("end", None)
    assert '"state":"failed"' in (tmp_path / "report.html").read_text()


def test_what_is_not_there_is_said_before_anything_is_opened(tiny_world, tmp_path, monkeypatch):
    done = client("evolve", tiny_world / "evolve.yaml", "--run-dir", tmp_path / "run", "--log", "tensorbord")
    assert done.returncode == 2 and "logging: found 'tensorbord'" in done.stderr and "tensorboard" in done.stderr
    monkeypatch.setitem(LOGGERS, "away", Row("merge3_no_such_package", "merge3.no_such_module"))
    done = client("evolve", tiny_world / "evolve.yaml", "--run-dir", tmp_path / "run", "--log", "away")
    assert done.returncode == 1 and done.stderr == (
        "error: logging: away: the package merge3_no_such_package is not installed; "
        "expected pip install 'merge3-gpu[away]'\n"
    )
    assert not (tmp_path / "run").exists()
    with pytest.raises(Unavailable):
        check_loggers(["away"])
    with pytest.raises(ConfigError):
        check_loggers(["away "])
    check_loggers([])


def test_nothing_is_imported_that_was_not_asked_for():
    program = "import sys, merge3.client.run; print(sorted({'tensorboard', 'wandb', 'dygraphs'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_who_is_told_makes_no_other_run(tiny_world, own_world):
    asked = yaml.safe_load((own_world / "evolve.yaml").read_text())
    hashes = set()
    for logging in ([], ["tensorboard"], "wandb", ["tensorboard", "wandb"]):
        (own_world / "told.yaml").write_text(yaml.safe_dump(asked | {"logging": logging}))
        config = load_config(own_world / "told.yaml")
        assert config.logging == ((logging,) if isinstance(logging, str) else tuple(logging))
        hashes.add(config.hash())
    assert hashes == {load_config(own_world / "evolve.yaml").hash()}


def test_rows_name_what_there_is():
    assert all(importlib.util.find_spec(row.module) for row in LOGGERS.values())


def test_tensorboard_has_every_candidate_once_after_a_resume(came, tmp_path, config):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for seen, result in ((came[:3], None), (came, RESULT)):  # killed, then resumed: it is told whole again
        loggers = Loggers(["tensorboard"], tmp_path, config)
        loggers(seen)
        loggers.end(result)
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    points = lambda tag: [(event.step, event.value) for event in read.Scalars(tag)]
    assert points("estimate/accuracy") == [(1, 0.25), (2, 0.5), (4, 0.125), (5, 0.75)]
    assert points("best") == [(1, 0.25), (2, 0.5), (3, 0.5), (4, 0.5), (5, 0.75)]
    assert points("generation/mean") == [(2, 0.375), (4, 0.125), (5, 0.75)]
    assert points("heldout/evolved") == [(5, 0.75)] and points("heldout/uniform_linear") == [(5, 0.5)]


def test_wandb_keeps_a_run_offline(came, tmp_path, config, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    loggers = Loggers(["wandb"], tmp_path, config)
    loggers(came)
    loggers.end(RESULT)
    (record,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 60  # another process of wandb's writes it
    while b"heldout/uniform_linear" not in (content := record.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.02)
    for name in (b"estimate/accuracy", b"generation/mean", b"heldout/uniform_linear", b"merge_method"):
        assert name in content, name
