"""One model per task: what all have in common once, and for each task a small difference (methods/variants.py)."""

from merge3.variants.about import ABOUT, FILE
from merge3.variants.kept import Kept
from merge3.variants.packed import Head, Variants, check_parts, write_parts

__all__ = ["ABOUT", "FILE", "Head", "Kept", "Variants", "check_parts", "write_parts"]
