"""Item response theory: calibrate items once, then estimate accuracy from a few answers. Knows no merging.

    from merge3 import irt
    bank = irt.fit(irt.read_responses("answers.csv"))
    subset = irt.extract(bank, responses, "irt", 20)
    found = irt.estimate(irt.prepare(bank, responses, subset), answers)

Imported on first use: `fit` needs torch and Pyro, the rest NumPy alone.
"""

import importlib

_HOMES = {
    "ItemBank": "merge3.irt.bank",
    "Responses": "merge3.irt.responses",
    "read_responses": "merge3.irt.responses",
    "write_responses": "merge3.irt.responses",
    "fit": "merge3.irt.fitting",
    "extract": "merge3.irt.extraction",
    "prepare": "merge3.irt.estimation",
    "estimate": "merge3.irt.estimation",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'merge3.irt' has no attribute {name!r}")
