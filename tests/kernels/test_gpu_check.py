"""The GPU check, rehearsed on the CPU: whoever has a GPU should only meet what only a GPU can show."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_check.py"
sys.path.insert(0, str(SCRIPT.parent))


def rehearse(*steps):
    done = subprocess.run([sys.executable, SCRIPT, "--rehearse", "--only", *steps], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (line.split(": ", 1) for line in done.stdout.splitlines() if line.split(": ")[0] in steps)
    return {step: json.loads(text) for step, text in lines if len(text) < 3000}


def test_every_step_that_needs_no_gpu(tmp_path):
    found = rehearse("memcheck", "eager", "candidate", "linear", "overlap", "bandwidth")
    assert found["candidate"]["rows"][0]["swap_ms"] > 0 and set(found["overlap"]["ms"]) == {"in one launch", "overlapped"}


@pytest.mark.heavy
def test_the_kernel_suite_with_travelling_tensors():
    found = rehearse("tests")["tests"]
    assert " passed" in found["kernel suite"] and "failed" not in found["kernel suite"]


def test_the_report_is_made_of_the_measures(tmp_path, monkeypatch):
    """The files' form; the numbers here are no measurement."""
    import gpu_report

    monkeypatch.setattr(gpu_report, "__file__", str(tmp_path / "gpu_report.py"))
    (tmp_path / "results").mkdir()
    row = {"shape": "7B", "layers": 20, "of_layers": 32, "experts": 3, "sparsify": "all", "elect": "sum", "normalize": True, "ms": 1.0,
           "bandwidth": 1e12, "copy_bandwidth": 2e12, "of_copy": 0.5}  # fmt: skip
    steps = {
        "bandwidth": {"rows": [row]}, "tests": {"error": "one failed"}, "overlap": {"ms": {"a": 1.0}},
        "eager": {"rows": [{"mode": "plain", "ms": 1.0, "eager_ms": 30.0, "times": 30.0}]},
        "candidate": {"rows": [{"shape": "1B", "swap_ms": 1.0, "answers_ms": 2.0}]},
        "linear": {"rows": [{"rows": 1, "merged_linear_ms": 1.0, "swap_and_linear_ms": 2.0}]},
    }  # fmt: skip
    gpu_report.write({"machine": {"torch": "2", "gpu": "Some GPU 80GB"}, "steps": steps})
    text = (tmp_path / "results" / "gpu-some-gpu-80gb.md").read_text()
    assert "| 7B, 20 layers | 3 | all | sum, normalized | 1.00 | 1.00 | **0.50** |" in text and "one failed" in text
    assert json.loads((tmp_path / "results" / "gpu-some-gpu-80gb.json").read_text())["steps"]["eager"]["rows"]
