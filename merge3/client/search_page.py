"""report.html of a search while it runs."""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge3.client.charts import body, head, library
from merge3.client.progress import STAGES, left, rate_of
from merge3.client.rewriting import PATIENCE, Pace
from merge3.client.rounds import begun
from merge3.client.search_charts import search_charts
from merge3.errors import Merge3Error
from merge3.search.config import EvolveConfig
from merge3.search.context import Progress
from merge3.search.watching import JournalReader, Seen

if TYPE_CHECKING:
    from merge3.client.channel import Target

STAGES_ASKED = ("calibration", "search", "checks", "elites", "race")  # as result.json's ledger names them
_JOURNAL = {"checks": "check"}


class SearchPage:
    """What `Rewriting` calls. full: item answers that a search on all items would take; workers: who is at work now."""

    def __init__(
        self,
        directory: Path,
        config: EvolveConfig,
        full: int,
        workers: Callable[[], Sequence[Mapping[str, Any]]],
    ):
        self.directory, self.config, self.full = directory, config, full
        self._workers = workers
        self.progress = Progress(budget=config.optimizer.budget)
        self._drawn: Progress | None = None
        self._reader: JournalReader | None = None
        self._seen: list[Seen] = []
        self._taken = 0
        self._times: deque[tuple[float, int]] = deque()  # when there were how many

    def tell(self, progress: Progress) -> None:
        """From the search's own thread, which changes its progress afterwards."""
        self.progress = replace(progress)

    def __call__(self, pace: Pace) -> str | None:
        """The page; None where nothing is new and none is due."""
        if self._reader is None:
            self._reader = JournalReader(self.directory)
        new, progress = self._reader.new(), self.progress
        self._seen += new
        if not (pace.due or new) and progress is self._drawn:
            return None
        self._drawn = progress
        data = self.data(progress, self._reader.answers(), pace)
        if not pace.alive:
            self._reader.close()
        return page(data, self.config)

    def taken(self) -> list[Seen]:
        """Candidates seen since the last call: at first all of the journal's, also those of a run that is resumed."""
        new = self._seen[self._taken :]
        self._taken += len(new)
        return new

    def data(self, progress: Progress, answers: Mapping[str, int], pace: Pace) -> dict[str, Any]:
        """What the page says, as it is embedded in it."""
        ledger = {name: int(answers.get(_JOURNAL.get(name, name), 0)) for name in STAGES_ASKED}
        ledger["search"] = sum(c.answers for c in self._seen)
        ledger |= {"total": sum(ledger.values()), "full": self.full}
        rate = rate_of(progress) if progress.stage == "search" else 0.0
        facts = asdict(progress) | {"failed": sum(c.error is not None for c in self._seen)}
        return {
            "kind": "search",
            "written": round(time.time(), 3),
            "patience": PATIENCE,
            **_json(asdict(pace)),
            "progress": _json(facts),
            "candidates": len(self._seen),
            "per_minute": 60 * rate,
            "last_minute": self._last_minute(),
            "left": left(progress, rate) if rate else "",
            "ledger": ledger,
            "workers": [dict(w) for w in self._workers()] if pace.alive else [],
            "charts": search_charts(self._seen, begun(self.config)),
        }

    def _last_minute(self) -> float:
        """Candidates that came in the last minute, as far as this process saw them come."""
        now, count = time.monotonic(), len(self._seen)
        if not self._times:  # what is in the journal when a run is resumed did not come now
            self._times.append((now - self.progress.seconds, self.progress.replayed))
        self._times.append((now, count))
        while len(self._times) > 2 and self._times[1][0] < now - 60:
            self._times.popleft()
        began, before = self._times[0]
        return round(60 * (count - before) / max(now - began, 1e-3), 1)


def page(data: Mapping[str, Any], config: EvolveConfig) -> str:
    """The page of this data."""
    import jinja2

    template = Path(__file__).with_name("search_page.html.j2").read_text(encoding="utf-8")
    return jinja2.Template(template, autoescape=True).render(
        data=data,
        config=config.to_yaml(),
        method=config.genome.merge_method,
        models=config.models,
        stage=STAGES.get(data["progress"]["stage"], data["progress"]["stage"]),
        drawable=library() is not None,
        head=head(),
        body=body(data),
    )


def workers_here(device: str) -> list[dict[str, Any]]:
    """This process, as a worker."""
    return [{"name": "this process", "device": device, "pid": os.getpid(), "busy": ""}]


def workers_of(target: Target) -> list[dict[str, Any]]:
    """A daemon's; none where it does not say at once."""
    from merge3.client.status import status_of

    with contextlib.suppress(Merge3Error):
        found = status_of(target, 2).workers
        return [{"name": w.name, "device": w.device, "pid": w.pid, "busy": w.busy_with or "idle"} for w in found]
    return []


def _json(facts: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    return {name: None if isinstance(value, float) and value != value else value for name, value in facts.items()}
