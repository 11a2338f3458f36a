"""What to merge: mergekit's YAML as validated, frozen objects, and back.

A recipe knows names only. Whether layers exist and tensors fit is found when it meets checkpoints, and so is which
parameters a method takes: `Recipe` accepts any.
"""

from merge3.recipe.checks import CHAT_TEMPLATES, DTYPES, TOP_KEYS
from merge3.recipe.text import load_yaml, nearest
from merge3.recipe.values import ModelRef, Parameters, Recipe, Slice, Source

__all__ = [
    "CHAT_TEMPLATES",
    "DTYPES",
    "TOP_KEYS",
    "ModelRef",
    "Parameters",
    "Recipe",
    "Slice",
    "Source",
    "load_yaml",
    "nearest",
]
