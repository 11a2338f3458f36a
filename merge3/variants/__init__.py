"""One model per task: what all have in common once, and for each task a small difference (methods/variants.py)."""

from merge3.variants.kept import Kept
from merge3.variants.packed import ABOUT, FILE, Variants, write_parts

__all__ = ["ABOUT", "FILE", "Kept", "Variants", "write_parts"]
