"""Items, prompts, scoring: a model's answers become responses. Knows no merging."""

from merge3.tasks.items import Item, items_hash, read_items, split_heldout
from merge3.tasks.score import Scorer

__all__ = ["Item", "Scorer", "items_hash", "read_items", "split_heldout"]
