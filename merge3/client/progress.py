"""What a person or a machine sees while a search runs: a live panel, log lines, or JSON lines."""

from __future__ import annotations

import json
import sys
import time
from contextlib import AbstractContextManager

from merge3.search.context import Progress

STAGES = {
    "experts": "asking experts as they are held, and as their files have them",
    "statistics": "computing what the search needs to know of the task vectors, once",
    "steady": "the next candidate is asked when one is answered, so that no worker waits (asking: steady)",
    "calibration": "calibrating: the endpoints and random merges answer the items",
    "elites": "choosing elites: the round's contenders answer the same items",
    "race": "the best candidates race on more items",
    "held-out": "measuring the winner and the baselines on held-out items",
    "own items": "measuring the winner and the baselines on the search's own items: none are held out",
}


class Live(AbstractContextManager):
    """A panel that redraws in place, for terminals."""

    def __enter__(self):
        from rich.live import Live as RichLive

        self._live = RichLive(refresh_per_second=4, transient=True)
        self._live.__enter__()
        self._began = time.perf_counter()
        return self

    def __call__(self, p: Progress) -> None:
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        rate = rate_of(p)
        table = Table.grid(padding=(0, 2))
        table.add_row("stage", STAGES.get(p.stage, p.stage))
        if p.rounds > 1:
            table.add_row("round", f"{p.round} of {p.rounds}")
        table.add_row(
            "candidates", f"{p.done} of {p.budget}" + (f" ({p.replayed} from the journal)" if p.replayed else "")
        )
        table.add_row("", ProgressBar(total=p.budget or 1, completed=p.done, width=40))
        table.add_row("best", f"{p.best:.4f} ± {p.best_stderr:.4f}   mean of last generation {p.mean:.4f}")
        table.add_row("rate", f"{rate * 60:.0f} candidates per minute, {left(p, rate)} left")
        table.add_row("item answers", f"{p.item_answers:,} (a full search: {p.full_answers:,})")
        if p.failed:
            table.add_row("failed", str(p.failed))
        self._live.update(Panel(table, title="merge3 evolve", width=90))

    def __exit__(self, *exc):
        return self._live.__exit__(*exc)


class Lines(AbstractContextManager):
    """One line per generation on standard error, for logs."""

    def __init__(self):
        self._generation, self._stage = -1, ""

    def __call__(self, p: Progress) -> None:
        before, self._stage = self._stage, p.stage
        if p.stage == "search" and p.generation == self._generation and p.done < p.budget:
            return
        self._generation = p.generation
        if p.stage != "search":
            if p.stage != before:
                print(STAGES.get(p.stage, p.stage), file=sys.stderr, flush=True)
            return
        rate, of_round = rate_of(p), f"round {p.round}/{p.rounds}  " if p.rounds > 1 else ""
        print(
            f"{of_round}generation {p.generation}  {p.done}/{p.budget}  best {p.best:.4f} ± {p.best_stderr:.4f}  "
            f"{rate * 60:.0f}/min  {left(p, rate)} left",
            file=sys.stderr,
            flush=True,
        )

    def __exit__(self, *exc):
        return None


class Machine(Lines):
    """One JSON object per candidate on standard error."""

    def __call__(self, p: Progress) -> None:
        data = dict(vars(p))
        for key, value in data.items():
            if isinstance(value, float) and value != value:
                data[key] = None  # JSON has no NaN
        print(json.dumps(data), file=sys.stderr, flush=True)


def chosen(as_json: bool, quiet: bool):
    """The progress that fits: none, JSON lines, a panel on a terminal, lines elsewhere."""
    if quiet:
        return Silent()
    if as_json:
        return Machine()
    return Live() if sys.stderr.isatty() and sys.stdout.isatty() else Lines()


class Silent(Lines):
    """Nothing."""

    def __call__(self, p: Progress) -> None:
        pass


def rate_of(p: Progress) -> float:
    """Candidates per second, the journal's not counted."""
    return (p.done - p.replayed) / p.seconds if p.seconds > 0 else 0.0


def left(p: Progress, rate: float) -> str:
    """Minutes and seconds to the end of the budget at this rate, later rounds included."""
    if rate <= 0:
        return "?"
    seconds = int((p.budget - p.done + p.later) / rate)
    return f"{seconds // 60}:{seconds % 60:02d}"
