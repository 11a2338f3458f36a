"""Runs mergekit itself on recipes: python run_mergekit.py IN_DIR OUT_DIR (every IN_DIR/*.yaml)."""

import sys
from pathlib import Path

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

for file in sorted(Path(sys.argv[1]).glob("*.yaml")):
    config = MergeConfiguration.model_validate(yaml.safe_load(file.read_text()))
    torch.manual_seed(0)
    run_merge(config, str(Path(sys.argv[2]) / file.stem), MergeOptions(random_seed=0, quiet=True))
