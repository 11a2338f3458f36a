"""What compacted experts take: by plan at the shapes of a 7B model, and in a process of its own."""

import json
import os
import subprocess
import sys

import pytest
import torch

from merge3 import Pool
from merge3.checkpoint import Checkpoint, TensorInfo
from merge3.checkpoint.layout import Ref
from merge3.experts import Compacted, Experts
from merge3.memory import COMPACT, DEVICE
from merge3.planning import plan_pool
from merge3.world.family import make_family

GB, MIB = 10**9, 2**20


def llama_7b():
    """Names and shapes of Llama-2-7B, 6.74 billion parameters."""
    shapes = {"model.embed_tokens.weight": (32000, 4096), "lm_head.weight": (32000, 4096), "model.norm.weight": (4096,)}
    for layer in range(32):
        at = f"model.layers.{layer}."
        for name in ("q", "k", "v", "o"):
            shapes[f"{at}self_attn.{name}_proj.weight"] = (4096, 4096)
        shapes |= {f"{at}mlp.{name}_proj.weight": (11008, 4096) for name in ("gate", "up")}
        shapes[f"{at}mlp.down_proj.weight"] = (4096, 11008)
        shapes |= {f"{at}{name}_layernorm.weight": (4096,) for name in ("input", "post_attention")}
    return shapes


def pool_7b(tmp_path, experts="full"):
    """A pool whose weights are nowhere: headers are all that a plan reads."""
    sizes = {n: 2 * torch.Size(s).numel() for n, s in llama_7b().items()}
    tensors = {n: TensorInfo(n, torch.bfloat16, s, tmp_path / "none", 0, sizes[n]) for n, s in llama_7b().items()}
    pool = Pool({m: Checkpoint(tmp_path, {}, dict(tensors)) for m in ("base", "e0", "e1", "e2")}, torch.device("cpu"))
    pool.compacted = Compacted(pool, Experts.parse(experts), pool._ties.stored)
    return pool


def test_a_base_and_three_experts_of_7b_fit_24_gb_as_residuals(tmp_path):
    full = plan_pool(pool_7b(tmp_path), None, 0)
    plan = plan_pool(pool_7b(tmp_path, "residual:0.1"), None, 0)
    assert full.resident == pytest.approx(53.9 * GB, rel=0.01)
    assert plan.resident + plan.compact == pytest.approx(20.05 * GB, rel=0.01)
    assert plan.resident + plan.compact + plan.window < 24 * GB and plan.file == plan.host == 0
    # A bit per parameter and a tenth of its bytes, for each of three; vectors and the base are as they are.
    parameters = sum(torch.Size(s).numel() for s in llama_7b().values() if len(s) > 1)
    assert plan.compact == pytest.approx(3 * parameters * (1 / 8 + 0.2), rel=1e-3)
    assert "compacted experts 6.1" in plan.describe() and f"window {plan.window / 2**30:.2f} GiB" in plan.describe()
    bytes_ = plan_pool(pool_7b(tmp_path, "int8"), None, 0)
    assert bytes_.compact == pytest.approx(3 * parameters, rel=1e-3)


def test_within_a_budget_compacted_experts_stay_and_the_base_is_streamed(tmp_path):
    """Beside a live model nothing of 7B is left of 24 GB for a whole base; but what is streamed is a quarter."""
    full, plan = (plan_pool(pool_7b(tmp_path, e), 24 * GB, 0) for e in ("full", "residual:0.1"))
    assert plan.total <= 24 * GB and full.total <= 24 * GB
    assert plan.compact == pytest.approx(6.57 * GB, rel=0.01)
    assert 9 * GB < plan.file < 11 * GB and full.file > 44 * GB
    assert {plan.tier(key) for key in plan.away if key.model != "base"} == {COMPACT}
    room = plan_pool(pool_7b(tmp_path, "residual:0.1"), 36 * GB, 0)
    assert room.file == 0 and all(room.tier(key) == COMPACT for key in room.away)
    assert room.tier(Ref("base", "lm_head.weight")) == DEVICE


CHILD = """
import json, sys
import torch, transformers
from transformers import LlamaForCausalLM  # what the models need, before the count begins
from merge3 import Pool, Recipe, Slot

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

models, experts = json.loads(sys.argv[1]), sys.argv[2]
Slot(Pool.open(sys.argv[3], [sys.argv[4]], experts_as="int8")).model(torch.tensor([[1, 2, 3]]))
before = status("VmRSS")
pool = Pool.open(models[0], models[1:], experts_as=experts)
pool.read_all()
slot = Slot(pool)
found = {"plan": pool.memory.total, "resident": pool.memory.resident, "compact": pool.memory.compact}
for density in (0.3, 0.6):
    sources = [{"model": m, "parameters": {"weight": 0.5, "density": density}} for m in models[1:]]
    slot.swap(Recipe.parse({"merge_method": "ties", "base_model": models[0], "models": sources}))
found |= {"now": status("VmRSS") - before, "most": status("VmHWM") - before}
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.heavy
@pytest.mark.parametrize("experts,width", [("residual:0.1", 640), ("int8", 768)])
def test_a_process_takes_what_the_plan_says(family, tmp_path, experts, width):
    """A process of its own with a base and three experts, 30 to 45 M parameters each in float32; recipe/test_memory.py
    has the same of experts as they are."""
    make_family(tmp_path, layers=4, hidden_size=width, intermediate_size=10 * width // 3 // 8 * 8, vocab_size=8000)
    models = json.dumps([str(tmp_path / n) for n in ("base", "e0", "e1", "e2")])
    # Tensors of 7B are too large for glibc's heap, which would keep what these free.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MIB)}
    command = [sys.executable, "-c", CHILD, models, experts, str(family / "base"), str(family / "e0")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0.9 * found["plan"] < found["most"] < 1.1 * found["plan"], found
    assert found["compact"] < found["resident"] < 0.7 * found["plan"]
