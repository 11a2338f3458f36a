"""Small checkpoints of any architecture, their fine-tunes, and merges of them."""

import json
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from merge3.errors import Merge3Warning
from merge3.export import merge_to_disk
from merge3.recipe import Recipe

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    tie_word_embeddings=False,
)


class Workshop:
    """Makes checkpoints in a folder of its own, by name."""

    def __init__(self, root: Path):
        self.root = root

    def model(self, name, arch="llama", seed=0, dtype=torch.float32, loader="AutoModelForCausalLM", **changes):
        """A random model whose norms and biases are not constant either."""
        import transformers

        torch.manual_seed(seed)
        config = transformers.AutoConfig.for_model(arch, **(SIZES | changes))
        model = getattr(transformers, loader).from_config(config).to(dtype)
        self._perturb(model, 0.02)
        model.save_pretrained(self.root / name)
        return self.root / name

    def expert(self, base, name, seed=1, scale=0.02, loader="AutoModelForCausalLM", rows=None):
        """A fine-tune of a model made before: it plus noise. rows: of its embedding."""
        import transformers

        torch.manual_seed(100 + seed)
        model = getattr(transformers, loader).from_pretrained(self.root / base, dtype="auto")
        if rows:
            model.resize_token_embeddings(rows)
        self._perturb(model, scale)
        model.save_pretrained(self.root / name)
        return self.root / name

    def edited(self, source, name, tensors=lambda t: None, config=lambda c: None):
        """A copy of a model with its tensors and its config.json changed in place by two functions."""
        import shutil

        shutil.copytree(self.root / source, self.root / name)
        stored = load_file(self.root / name / "model.safetensors")
        tensors(stored)
        save_file(
            {k: v.contiguous() for k, v in stored.items()},
            self.root / name / "model.safetensors",
            metadata={"format": "pt"},
        )
        file = self.root / name / "config.json"
        settings = json.loads(file.read_text())
        config(settings)
        file.write_text(json.dumps(settings))
        return self.root / name

    def recipe(self, models, base=None, method="task_arithmetic", weight=0.5, **changes):
        """A recipe over models by name; changes: further top-level keys."""
        entries = [{"model": str(self.root / m), "parameters": {"weight": weight}} for m in models]
        data = {"merge_method": method, "models": entries} | changes
        if base:
            data["base_model"] = str(self.root / base)
        return Recipe.parse(yaml.safe_load(yaml.safe_dump(data)))

    def merge(self, models, base=None, out="out", quiet=True, drop=(), **recipe):
        """(result, tensors by name) of a merge; with quiet=False a warning is an error."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if quiet else "error", Merge3Warning)
            result = merge_to_disk(self.recipe(models, base, **recipe), self.root / out, drop=drop)
        return result, self.tensors(out)

    def tensors(self, name):
        return load_file(self.root / name / "model.safetensors")

    def config(self, name):
        return json.loads((self.root / name / "config.json").read_text())

    @staticmethod
    def _perturb(model, scale):
        with torch.no_grad():
            for p in {id(p): p for p in model.parameters()}.values():
                p.add_((torch.randn(p.shape) * scale).to(p.dtype))


@pytest.fixture
def workshop(tmp_path):
    return Workshop(tmp_path)
