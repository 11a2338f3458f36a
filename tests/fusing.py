"""fusion_bench, where it is installed, in a process of its own: its packages are entered in a way of their own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

missing = pytest.mark.skipif(importlib.util.find_spec("fusion_bench") is None, reason="fusion_bench is not installed")
LEARNED = Path(__file__).parent / "learn" / "run_fusion_bench.py"


def fusion_bench(folder, asked, runner=LEARNED):
    """What the script `runner` makes of what is asked; both go through files of torch's in `folder`."""
    torch.save(asked, folder / "in.pt")
    done = subprocess.run(
        [sys.executable, runner, folder / "in.pt", folder / "out.pt"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(folder / "out.pt")
