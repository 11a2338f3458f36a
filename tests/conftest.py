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

SIZES = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, vocab_size=64, max_position_embeddings=128)


@pytest.fixture(scope="session", autouse=True)
def _quiet():
    import transformers

    transformers.utils.logging.disable_progress_bar()


def save_family(root, experts=3, dtype=torch.float32, scale=0.02, layers=4, tied=False, **overrides):
    """A Llama base and experts that differ from it by noise of `scale`: root/base, root/e0, .."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**(SIZES | dict(num_hidden_layers=layers, tie_word_embeddings=tied) | overrides))
    model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(root / "base")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for i in range(experts):
        g = torch.Generator().manual_seed(i + 1)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_((start[name].float() + torch.randn(p.shape, generator=g) * scale).to(dtype))
        model.save_pretrained(root / f"e{i}")
    return root


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """Four-layer float32 Llamas: a base and three experts."""
    return save_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="session")
def bf16_family(tmp_path_factory):
    """The same in bfloat16, where magnitudes tie massively."""
    return save_family(tmp_path_factory.mktemp("bf16"), dtype=torch.bfloat16, scale=0.002)


@pytest.fixture(scope="session")
def tied_family(tmp_path_factory):
    """Llamas whose head is the embedding."""
    return save_family(tmp_path_factory.mktemp("tied"), experts=2, tied=True)


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    """The demo's models, barely trained: base, four experts, items and an evolve.yaml."""
    return make_world(tmp_path_factory.mktemp("tiny"), base_steps=60, expert_steps=10)


@pytest.fixture(scope="session")
def solving_world(tmp_path_factory):
    """The same, trained until each item is solved by some models: calibration has something to learn."""
    return make_world(tmp_path_factory.mktemp("solving"), base_steps=160, expert_steps=15)


def make_world(root, base_steps, expert_steps):
    import yaml

    from merge3.client import tiny

    tiny.make_models(root, seed=0, base_steps=base_steps, expert_steps=expert_steps)
    for task in tiny.TASKS:
        lines = (root / f"{task}.jsonl").read_text().splitlines()[:40]
        (root / f"{task}.jsonl").write_text("\n".join(lines) + "\n")
    config = {
        "genome": {
            "models": ["./english", "./italian", "./translation"], "base_model": "./base", "merge_method": "ties",
            "layer_granularity": 2, "allow_negative_weights": True,
        },
        "tasks": [{"items": f"./{task}.jsonl"} for task in ("english", "translation")],
        "optimizer": {"budget": 24, "population": 6, "seed": 3},
    }  # fmt: skip
    (root / "evolve.yaml").write_text(yaml.safe_dump(config))
    return root
