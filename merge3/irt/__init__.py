"""Item response theory: calibrate items once, then estimate accuracy from a few answers. Knows no merging."""

from merge3.irt.bank import ItemBank
from merge3.irt.responses import Responses, read_responses, write_responses

__all__ = ["ItemBank", "Responses", "read_responses", "write_responses"]
