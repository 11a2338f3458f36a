"""Runs mergekit on recipes with tokenizers: python run_mergekit.py IN_DIR OUT_DIR (every IN_DIR/*.yaml).

mergekit itself takes models in the order of a set and tokens in that of a hash table, other ones in every process: it
numbers new tokens differently each time, and without a base_model takes any model's tokenizer for the base's. Here both
orders are fixed, and nothing else.
"""

import sys
from pathlib import Path

import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from transformers import PreTrainedTokenizerFast

_models, _vocabulary = MergeConfiguration.referenced_models, PreTrainedTokenizerFast.get_vocab


def in_order(self):
    named = [self.base_model] if self.base_model else []
    named += [m.model for m in self.models or ()]
    for module in (self.modules or {}).values():  # where the planner has put models and slices by then
        named += [m.model for m in module.models or ()]
        named += [s.model for part in module.slices or () for s in part.sources]
    named += [s.model for part in self.slices or () for s in part.sources]
    found = list(dict.fromkeys(named))
    assert set(found) == set(_models(self))
    return found


MergeConfiguration.referenced_models = in_order
PreTrainedTokenizerFast.get_vocab = lambda self: dict(sorted(_vocabulary(self).items(), key=lambda pair: pair[1]))

for file in sorted(Path(sys.argv[1]).glob("*.yaml")):
    config = MergeConfiguration.model_validate(yaml.safe_load(file.read_text()))
    out = Path(sys.argv[2]) / file.stem
    try:
        run_merge(config, str(out), MergeOptions(random_seed=0, quiet=True))
    except Exception as error:  # it names what mergekit does with a recipe that we refuse
        out.mkdir(parents=True, exist_ok=True)
        (out / "error.txt").write_text(f"{type(error).__name__}: {error}")
