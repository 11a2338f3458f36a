"""What to merge: mergekit's YAML as validated, frozen objects, and back.

A recipe knows names only. Whether layers exist and tensors fit is found when it meets checkpoints, and so is which
parameters a method takes: `Recipe` accepts any.
"""

from merge3.recipe.checks import CHAT_TEMPLATES, DTYPES, TOP_KEYS
from merge3.recipe.references import ModelRef
from merge3.recipe.text import built, load_yaml, nearest
from merge3.recipe.tokenizer import BASE, UNION, Tokenizer, TokenRow, read_tokenizer
from merge3.recipe.values import Parameters, Recipe, Slice, Source

__all__ = [
    "BASE",
    "CHAT_TEMPLATES",
    "DTYPES",
    "TOP_KEYS",
    "UNION",
    "ModelRef",
    "Parameters",
    "Recipe",
    "Slice",
    "Source",
    "TokenRow",
    "Tokenizer",
    "built",
    "load_yaml",
    "nearest",
    "read_tokenizer",
]
