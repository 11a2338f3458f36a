"""Charts inside a page: numbers as JSON, the charting library and a script that draws, all in the one file.

The library is dygraphs (MIT; 125 kB, from the package of that name), which knows standard errors. What is drawn is
said in data, so that no page has a script of its own:

chart   {id, title, y, xs: [axis, ..], series: [series, ..]}; with several axes a reader chooses one
        marks: [index, ..], where it has any: values of the axis at which a line stands
axis    {name, values, errors}; errors: none, or one per value
series  {name, style, values, errors}; style: points | best | line | front; values: null where there is none
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

STYLES = ("points", "best", "line", "front")
_FILE = Path("assets") / "dygraph-combined.js"


def axis(name: str, values: Sequence[float], errors: Sequence[float | None] = ()) -> dict[str, Any]:
    """Where points lie from left to right, in any order."""
    return {"name": name, "values": rounded(values), "errors": rounded(errors)}


def series(
    name: str, style: str, values: Sequence[float | None], errors: Sequence[float | None] = ()
) -> dict[str, Any]:
    """One value for each of the axis's. errors: standard errors, of all of them or none."""
    return {"name": name, "style": style, "values": rounded(values), "errors": rounded(errors)}


def rounded(values: Sequence[float | None]) -> list[float | None]:
    """Six digits, and null for what is not a number: JSON has none, and a picture shows no more."""
    found: list[float | None] = []
    for value in values:
        if value is None or not math.isfinite(value):
            found.append(None)
        else:
            found.append(value if isinstance(value, int) else float(f"{value:.6g}"))
    return found


@cache
def library() -> str | None:
    """dygraphs, as one script; None where the package is not installed."""
    found = importlib.util.find_spec("dygraphs")  # which does not import it: it is Python for other uses
    for folder in (found.submodule_search_locations or ()) if found else ():
        if (Path(folder) / _FILE).is_file():
            script = (Path(folder) / _FILE).read_text(encoding="utf-8")
            # A browser would ask for the map, which is not there.
            return script.split("//# sourceMappingURL")[0].replace("</script", "<\\/script")
    return None


def head() -> str:
    """What a page with charts needs in its head."""
    own = Path(__file__)
    style = own.with_name("charts.css").read_text(encoding="utf-8")
    return f"<style>\n{style}</style>\n<script>{library() or ''}</script>"


def body(data: Mapping[str, Any]) -> str:
    """What draws `data["charts"]` into the page's elements of their ids, and asks for the next page while
    `data["alive"]`. Where there is no script, or no library, what stood in the elements stays."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    script = Path(__file__).with_name("charts.js").read_text(encoding="utf-8")
    return f'<script type="application/json" id="merge3-data">{text}</script>\n<script>\n{script}</script>'
