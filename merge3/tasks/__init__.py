"""Items, what they ask of a model, what its answers are worth: responses. Knows no merging."""

from merge3.tasks.fit import fit_to_model
from merge3.tasks.forward import LogitsError
from merge3.tasks.items import Item, items_hash, split_heldout
from merge3.tasks.reading import read_items
from merge3.tasks.score import Scorer

__all__ = ["Item", "LogitsError", "Scorer", "fit_to_model", "items_hash", "read_items", "split_heldout"]
