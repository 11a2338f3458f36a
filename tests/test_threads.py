"""Threads: as many as the process may use, or as --threads says; and what was set by hand is kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from merge3 import threads
from tests.commands import client, server

ROOT = Path(__file__).resolve().parents[1]
COMPUTING = ("merge", "evolve", "evaluate", "calibrate", "extract", "estimate", "report", "demo")
VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "KMP_BLOCKTIME",
    "OPENBLAS_NUM_THREADS",
)


def python(code, *arguments, environment=None, **options):
    """A process of its own, without the variables of this one."""
    bare = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=bare | (environment or {}),
        **options,
    )


@pytest.mark.parametrize(
    "groups, files, expected",
    [
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"}, 2),  # a parent's, rounded up
        ("0::/a/b", {"a/b/cpu.max": "300000 100000", "a/cpu.max": "500000 100000"}, 3),  # the smallest
        ("0::/a", {"a/cpu.max": "1000 100000"}, 1),  # never none
        ("0::/", {"cpu.max": "400000 100000"}, 4),  # a container with a namespace of its own
        ("0::/../../other", {"cpu.max": "400000 100000"}, 4),  # a path out of the namespace
        ("0::/a", {"unified/a/cpu.max": "200000 100000"}, 2),  # both versions mounted
        (
            "5:cpuset:/x\n4:cpu,cpuacct:/docker/1",
            {"cpu,cpuacct/cpu.cfs_quota_us": "250000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            3,
        ),
        ("1:cpu:/x", {"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "100000"}, 64),
        ("2:cpuset:/x", {"cpuset/x/cpu.max": "100000 100000"}, 64),  # another controller's
        ("0::/a", {"a/cpu.max": "many\n"}, 64),
        ("nonsense", {}, 64),
        (None, {}, 64),
    ],
)
def test_cgroup_quotas_bound_the_cores(monkeypatch, tmp_path, groups, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    for name, content in files.items():
        (tmp_path / "mount" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mount" / name).write_text(content)
    if groups is not None:
        (tmp_path / "groups").write_text(groups + "\n")
    assert threads.available(tmp_path / "groups", tmp_path / "mount") == expected


PINNED = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_affinity_bounds_the_cores():
    asked = (
        "from merge3.threads import available, configure; configure(); "
        "import torch; print(available(), torch.get_num_threads())"
    )
    done = python(PINNED + asked)
    assert done.stdout.split() == ["1", "1"], done.stderr


SHOW = "from merge3.threads import configure; configure({}); import os, json; print(json.dumps(dict(os.environ)))"


def test_variables_that_are_set_are_kept():
    own = {"OMP_NUM_THREADS": "7", "OMP_WAIT_POLICY": "ACTIVE", "OPENBLAS_NUM_THREADS": "3"}
    found = json.loads(python(SHOW.format(""), environment=own).stdout)
    assert {n: found.get(n) for n in VARIABLES} == dict.fromkeys(VARIABLES) | own


def test_without_any_threads_sleep_while_they_wait():
    found = json.loads(python(SHOW.format("")).stdout)
    assert found["OMP_NUM_THREADS"] == str(threads.available()) and found["OMP_WAIT_POLICY"] == "PASSIVE"


def test_the_option_goes_before_variables():
    own = {"OMP_NUM_THREADS": "7", "MKL_NUM_THREADS": "5", "OMP_WAIT_POLICY": "ACTIVE"}
    found = json.loads(python(SHOW.format("3"), environment=own).stdout)
    assert (found["OMP_NUM_THREADS"], found["MKL_NUM_THREADS"], found["OMP_WAIT_POLICY"]) == ("3", "3", "ACTIVE")


# The command, and at its end the threads that torch would use and those that there are.
COUNTED = """
import atexit, os, sys
def show():
    import torch
    print(torch.get_num_threads(), len(os.listdir("/proc/self/task")), file=sys.stderr)
atexit.register(show)
from merge3.client.cli import main
main()
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="Linux only")
@pytest.mark.parametrize("count", [1, 2])
def test_the_option_limits_torch_and_the_kernels(family, tmp_path, count):
    models = [{"model": str(family / f"e{i}"), "parameters": {"weight": 0.5, "density": 0.5}} for i in range(2)]
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump({"merge_method": "ties", "base_model": str(family / "base"), "models": models})
    )
    done = python(COUNTED, "merge", tmp_path / "recipe.yaml", tmp_path / "out", "--threads", count, "--quiet")
    assert done.returncode == 0, done.stderr
    wanted, running = map(int, done.stderr.split("\n")[-2].split())
    # A small merge may have fewer pieces than there are threads; with one allowed there is never another.
    assert wanted == count and 1 <= running <= count


# The kernels without torch: how many threads there ever were while they ran, beside this one and the one that looks.
ARRAYS = """
import os, threading
import numpy as np
from merge3 import arrays
most, done = 0, threading.Event()
def look():
    global most
    while not done.is_set():
        most = max(most, len(os.listdir("/proc/self/task")) - 2)
watcher = threading.Thread(target=look)
watcher.start()
base, *experts = [np.ones(1 << 20, np.float32) for _ in range(3)]
for _ in range(20):
    arrays.gram([base], experts, 1)
done.set()
watcher.join()
print(most)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="Linux only")
def test_the_kernels_without_torch_follow_too():
    pytest.importorskip("merge3.arrays")
    one = {"OPENBLAS_NUM_THREADS": "1"}  # NumPy's own
    for environment, before in (({"OMP_NUM_THREADS": "1"}, ""), ({"OMP_NUM_THREADS": "3"}, ""), ({}, PINNED)):
        done = python(before + ARRAYS, environment=one | environment)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) <= int(environment.get("OMP_NUM_THREADS", "1")) - 1


@pytest.mark.parametrize("invalid", ["0", "-1", "two", "1.5", "", "9" * 5000])
def test_numbers_that_are_none_are_one_line(invalid, tmp_path):
    for done in (
        client("merge", "recipe.yaml", "out", "--threads", invalid),
        server("serve", "--root", tmp_path, "--threads", invalid),
    ):
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("error: --threads: found ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", COMPUTING)
def test_every_command_that_computes_has_the_option(name):
    assert "--threads N" in client(name, "--help").stdout


def test_the_daemon_has_it_too():
    assert "--threads N" in server("serve", "--help").stdout


FEW = """
from merge3.threads import configure, few_threads
configure(2)
import torch
counts = [torch.get_num_threads()]
with few_threads(1000):
    counts.append(torch.get_num_threads())
counts.append(torch.get_num_threads())
try:
    with few_threads(1000):
        raise ValueError
except ValueError:
    counts.append(torch.get_num_threads())
with few_threads(10**9):
    counts.append(torch.get_num_threads())
print(*counts)
"""


def test_small_work_runs_on_one_thread_and_gives_the_others_back():
    done = python(FEW)
    assert done.stdout.split() == ["2", "1", "2", "2", "2"], done.stderr
