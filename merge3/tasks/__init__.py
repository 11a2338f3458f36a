"""Items, what they ask of a model, what its answers are worth: responses. Knows no merging."""

from merge3.tasks.fit import fit_to_model
from merge3.tasks.forward import LogitsError
from merge3.tasks.grouping import by_task, item_key, keys_by_task, places_by_task
from merge3.tasks.items import Item, items_hash, split_heldout
from merge3.tasks.reading import read_items
from merge3.tasks.score import Scorer

__all__ = [
    "Item",
    "LogitsError",
    "Scorer",
    "by_task",
    "fit_to_model",
    "item_key",
    "items_hash",
    "keys_by_task",
    "places_by_task",
    "read_items",
    "split_heldout",
]
