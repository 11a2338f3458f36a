"""The command methods: every method there is, what it needs and what it ends in."""

from __future__ import annotations

import json

from merge3.client.options import Json


def methods(as_json: Json = False):
    """List the merge methods: where they come from, what they need, what they end in, their parameters."""
    from merge3.methods import LEARNED, METHODS, VARIANTS, ZIPPED
    from merge3.methods.base import REQUIRED

    listed, fitted = METHODS | VARIANTS, LEARNED | ZIPPED
    if as_json:
        found = {name: told(row) | {"parameters": list(row.parameters)} for name, row in listed.items()}
        print(json.dumps(found | {name: told(row) | {"learned": True} for name, row in fitted.items()}))
        return
    for name, method in listed.items():
        _show(name, method)
        for parameter, spec in method.parameters.items():
            default = "required" if spec.default is REQUIRED else f"default {spec.default}"
            print(f"    {parameter:<18} {spec.help} ({default})")
    for name, row in fitted.items():
        _show(name, row, " (merge3-client fit)")


def told(row) -> dict[str, str]:
    """What the rows of every table of methods say of themselves."""
    return {"summary": row.summary, "source": row.reference, "needs": row.needs, "result": row.result}


def _show(name: str, row, how: str = "") -> None:
    print(f"{name}: {row.summary}{how}")
    source = f"; {row.reference}" if row.reference else ""
    print(f"    needs: {row.needs}; result: {row.result}{source}")


COMMANDS = (  # each with its example
    (methods, "methods"),
)
