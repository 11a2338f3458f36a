"""The GPU check, rehearsed on the CPU: whoever has a GPU should only meet what only a GPU can show."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_check.py"
sys.path.insert(0, str(SCRIPT.parent))
CPU = torch.device("cpu")
GIB = 1 << 30


def command(out, *names):
    return [sys.executable, SCRIPT, "--rehearse", "--out", out, "--only", *names]


def rehearse(out, *names):
    done = subprocess.run(command(out, *names), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return read(out)


def read(out):
    return json.loads((out / "rehearsal.json").read_text())["steps"]


@pytest.mark.heavy
def test_every_step_that_needs_no_gpu(tmp_path):
    steps = rehearse(tmp_path, "measure", "memcheck", "variants")
    assert list(steps) == ["bandwidth", "candidate", "eager", "overlap", "memcheck", "variants"]
    rows = {step: result["rows"] for step, result in steps.items()}
    assert rows["candidate"][0]["swap_ms"] > 0 and len(rows["eager"]) == 2
    assert [row["mode"] for row in rows["overlap"]] == ["in one launch", "overlapped", "written to disk and loaded"]
    assert len({(r["experts"], r["sparsify"], r["elect"], r["normalize"]) for r in rows["bandwidth"]}) == 60
    assert len(rows["variants"]) == 48 and {row["variant"] for row in rows["variants"]} == {"as built"}
    assert steps["variants"]["notes"][0].startswith("fastest: as built, ")
    assert all("seconds" in result and "cut" not in result for result in steps.values())
    assert (tmp_path / "rehearsal.md").read_text().startswith("Rehearsed on a CPU, small")


@pytest.mark.heavy
def test_the_kernel_suite_with_travelling_tensors(tmp_path):
    suite, own = rehearse(tmp_path, "tests")["tests"]["rows"]
    assert suite["check"] == "kernel suite" and " passed" in suite["result"] and "failed" not in suite["result"]
    assert own["check"] == "gpu only"


@pytest.mark.heavy
def test_a_run_that_is_killed_has_left_its_rows_and_the_next_call_adds_to_them(tmp_path):
    with subprocess.Popen(command(tmp_path, "bandwidth"), stdout=subprocess.PIPE, text=True) as running:
        for _ in range(3):
            line = running.stdout.readline()
            assert line.startswith("bandwidth: {"), line
        running.kill()
    left = read(tmp_path)["bandwidth"]
    assert 3 <= len(left["rows"]) < 60 and left["cut"]
    assert "| bandwidth | cut short |" in (tmp_path / "rehearsal.md").read_text()
    steps = rehearse(tmp_path, "eager")
    assert steps["bandwidth"] == left and len(steps["eager"]["rows"]) == 2


def test_a_row_is_on_disk_before_the_next_is_measured(tmp_path, monkeypatch):
    import gpu_check
    import gpu_report

    found = {"machine": {"torch": "2"}, "steps": {}}
    first = {"check": "one", "result": "fine"}
    seen = []

    def step(device):
        yield first
        seen.append(read(tmp_path)["racecheck"])
        yield "of a kind"
        seen.append(read(tmp_path)["racecheck"])
        raise RuntimeError("no more")

    monkeypatch.setattr(gpu_check, "racecheck", step)
    gpu_check.perform("racecheck", CPU, found, lambda: gpu_report.write(found, tmp_path))
    assert all(s["rows"] == [first] and s["cut"] for s in seen)
    assert [s["notes"] for s in seen] == [[], ["of a kind"]]
    end = read(tmp_path)["racecheck"]
    assert end["rows"] == [first] and end["error"] == "RuntimeError: no more" and "cut" not in end
    assert not list(tmp_path.glob("*.partial"))


def test_what_is_worth_most_comes_first():
    import gpu_check

    assert gpu_check.steps_of(["check", "measure"])[:3] == ["build", "bandwidth", "candidate"]
    assert gpu_check.steps_of(["check"]) == ["build", "tests", "memcheck", "racecheck", "variants"]
    assert gpu_check.steps_of(["racecheck", "eager"]) == ["eager", "racecheck"]
    assert set(gpu_check.steps_of(gpu_check.STAGES)) == set(gpu_check.STEPS)


@pytest.mark.parametrize(
    "free,measured,left_out",
    [
        (78, ["1B", "7B"], []),
        (60, ["1B", "3B"], ["7B"]),
        (39, ["1B", "3B"], ["7B"]),
        (23.5, ["1B"], ["3B", "7B"]),
        (7.5, ["0.4B"], ["1B", "3B", "7B"]),
        (3, [], ["0.4B", "1B", "3B", "7B"]),
    ],
)
def test_the_largest_candidate_that_fits(free, measured, left_out):
    from gpu_measures import candidate_sizes

    shapes, notes = candidate_sizes(int(free * GIB))
    assert shapes == measured and [note.split(" left out: it needs ")[0] for note in notes] == left_out
    assert all(note.endswith(f"GiB, {free:.1f} GiB are free") for note in notes)


def test_a_candidates_size_is_that_of_its_model():
    from gpu_measures import CANDIDATES, SHAPES, candidate_bytes, config_of, parameters_of
    from transformers import LlamaForCausalLM

    for shape in SHAPES:
        with torch.device("meta"):
            assert parameters_of(shape) == sum(p.numel() for p in LlamaForCausalLM(config_of(shape)).parameters())
    sizes = [candidate_bytes(shape) for shape in CANDIDATES]
    assert sizes == sorted(sizes) and 62 * GIB < sizes[-1] < 66 * GIB


def test_a_candidate_that_does_not_fit_after_all_is_reported(monkeypatch):
    import gpu_measures

    def full(shape, device):
        raise torch.OutOfMemoryError("out of memory\nin detail")

    monkeypatch.setattr(gpu_measures, "one_candidate", full)
    assert list(gpu_measures.candidate(CPU)) == ["tiny left out: out of memory"]


def test_the_report_is_made_of_the_measures(tmp_path):
    """The files' form; the numbers here are no measurement."""
    import gpu_report

    row = {
        "shape": "7B",
        "layers": 20,
        "of_layers": 32,
        "experts": 3,
        "sparsify": "all",
        "elect": "sum",
        "normalize": True,
        "ms": 1.0,
        "bandwidth": 1e12,
        "copy_bandwidth": 2e12,
        "of_copy": 0.5,
    }
    steps = {
        "bandwidth": {"rows": [row], "cut": True},
        "tests": {"rows": [{"check": "gpu only", "result": "9 passed"}], "error": "one | failed"},
        "overlap": {"rows": [{"mode": "a", "ms": 1.0}]},
        "eager": {"rows": [{"mode": "plain", "ms": 1.0, "eager_ms": 30.0, "times": 30.0}]},
        "variants": {"rows": [row | {"variant": "as built"}, row | {"variant": "depth 2", "of_copy": 0.75}]},
        "candidate": {"rows": [{"shape": "1B", "swap_ms": 1.0, "answers_ms": 2.0}], "notes": ["7B left out"]},
    }
    machine = {"torch": "2", "gpu": "Some GPU 80GB"}
    gpu_report.write({"machine": machine, "steps": steps}, tmp_path / "new")
    text = (tmp_path / "new" / "gpu-some-gpu-80gb.md").read_text()
    assert "| 7B, 20 layers | 3 | all | sum, normalized | 1.00 | 1.00 | **0.50** |" in text
    for cells in ("gpu only | 9 passed", "tests | failed: one / failed", "bandwidth | cut short"):
        assert f"| {cells} |" in text
    assert "candidate: 7B left out" in text
    assert "| experts | sparsify | elect | as built | depth 2 |" in text
    assert "| 3 | all | sum, normalized | 0.50 | **0.75** |" in text
    assert gpu_report.earlier(machine, tmp_path / "new") == steps
    assert gpu_report.earlier(machine | {"kernels": "others"}, tmp_path / "new") == {}
    assert gpu_report.earlier(machine, tmp_path) == {}


def test_the_fastest_variant_is_named():
    from gpu_variants import fastest

    shares = {"as built": [0.5, 0.8], "depth 2": [0.6, 0.7], "128 threads": [0.9, 0.4]}
    assert fastest(shares) == "depth 2, 0.648 of a copy on average; as built 0.632"
