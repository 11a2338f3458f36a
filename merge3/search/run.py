"""A run from its configuration to its winner: check, calibrate, search, race, measure on items never seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from merge3 import __version__
from merge3.engine import Engine
from merge3.errors import ResumeMismatch
from merge3.files import write_atomically
from merge3.methods import METHODS
from merge3.recipe import Recipe
from merge3.search.asking import Asking, SpotCheck, prepare
from merge3.search.compaction import Compaction, check_held, compaction
from merge3.search.config import EvolveConfig
from merge3.search.context import Progress, Search
from merge3.search.elites import FOLDER as ELITES
from merge3.search.elites import Over, close
from merge3.search.front import Front, believed, check_member, check_pick, measure_front
from merge3.search.front_race import Believed, FrontRace, settle_front
from merge3.search.identity import beside, identity, versions
from merge3.search.journal import Candidate, Journal
from merge3.search.loop import search_generations
from merge3.search.measure import Measured, measure, measure_all, name_of, possible_baselines
from merge3.search.optimizers import Optimizer, check_installed
from merge3.search.places import read_start
from merge3.search.policy import Policy
from merge3.search.prior import with_prior
from merge3.search.questions import Questions
from merge3.search.race import Race, Ranked, settle
from merge3.search.stages import FOLDER, Winner, check_stages, generations, second, winner_of
from merge3.search.start import check_start, definition_of, near_start
from merge3.search.steady import begun_with, in_flight, search_steadily
from merge3.search.successive import check_rounds, of_round, race_rounds
from merge3.space import Space


@dataclass(frozen=True)
class Ledger:
    """Item answers spent, by what for, and what a search on all items would have taken."""

    calibration: int
    search: int
    checks: int
    race: int
    full: int
    elites: int = 0
    fit: int = 0

    @property
    def total(self) -> int:
        """All that was spent."""
        return self.calibration + self.search + self.checks + self.race + self.elites + self.fit


@dataclass(frozen=True)
class Outcome:
    """What a finished search found. best: the winner as the search saw it; race: what settled it, if anything did;
    swap_share: of the candidates' seconds, spent merging; heldout, baselines: accuracy on held-out items, where none
    are on the search's own. below: of a run in stages, the first one's winner. front: of several objectives, of which
    `best` is the member picked. compaction: of experts that are not held as they are. rounds: of a run in rounds, all
    but the last; between: the race of each one's best."""

    best: Candidate
    recipe: Recipe
    candidates: int
    failed: int
    seconds: float
    swap_share: float
    policy: Policy
    ledger: Ledger
    race: Race | None
    checks: list[SpotCheck]
    drifted: list[int]
    heldout: Measured
    baselines: dict[str, Measured]
    below: Winner | None = None
    front: Front | None = None
    compaction: Compaction | None = None
    rounds: Sequence[Over] = ()
    between: Race | None = None


def run(
    config: EvolveConfig,
    questions: Questions,
    engine: Engine,
    journal: Journal,
    resume: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
    stop: Callable[[], bool] = lambda: False,
    pick: str | None = None,
    spent: int = 0,
) -> Outcome | None:
    """Search to the end of the budget. None if `stop` asked to leave early (the journal has it all). pick: see
    Front.pick; spent: answers that a fit took at which the search begins.

    Raises ResumeMismatch if the directory holds another run, or this one without `resume`, and BadInput for whatever
    merging, asking or exporting would refuse at the end, before the first candidate.
    """
    check_installed(config.optimizer.name)
    space = Space(definition_of(config, journal), engine.info().layout)
    # A start that no genome is near to is refused before anything is read for the search.
    search = begun_with(Search(config.of_stage(0), questions, engine, space, journal, report, stop))
    search, start = near_start(search)
    check_stages(config, engine)
    check_rounds(config, search)
    check_pick(pick, search.objectives, search.fronts)
    _stage(search, "statistics")
    engine.prepare(search.asks([*questions.search, *questions.heldout]))
    engine.check(space.uniform_recipe())
    if start is not None:
        check_start(search, start)
    search = with_prior(search)
    baselines = possible_baselines(search)
    if config.fit is not None:
        baselines.append(("fit", read_start(config.genome.start, config.models)))
    if journal.begin(identity(search), beside(search), versions(search)) and not resume:
        raise ResumeMismatch(journal.directory, "this run has begun", "a new directory", "continue it with --resume")
    write_atomically(journal.directory / "config.yaml", config.to_yaml())
    if engine.info().experts != "full":
        _stage(search, "experts")
    checks = check_held(search)
    asking = None if search.stop() else prepare(search)
    if asking is None:
        return None
    below, over, between = None, (), None
    if config.optimizer.rounds > 1:
        found, asking, over, between = _in_rounds(asking, config)
    else:
        found = _searched(asking, ending=_front if search.fronts else _winner)
    answers = sum(one.answers for one in over)
    if found is not None and config.stages:
        below, answers = winner_of(journal, found.recipe), found.answers
        write_atomically(journal.directory / f"{FOLDER}.yaml", best_yaml(found.recipe, config))
        baselines = [*baselines, (FOLDER, below.recipe)]
        first, asking = generations(asking.search), second(asking, config, below)
        found = _searched(asking, first)
    if found is None:
        return None
    baselines += [(f"round {one.number}", one.recipe) for one in over if one.best is not found.best]
    candidates, measured = journal.candidates(), questions.heldout or questions.search
    _stage(asking.search, "held-out" if questions.heldout else "own items", len(candidates), found.best)
    if found.members is not None:
        check_member(pick, len(found.members))  # some may leave when they are measured
    others, front, best = measure_all(asking.search, baselines, measured), None, found.best
    if others is None:
        return None
    if found.members is not None:
        front = measure_front(search, found.members, found.race, others, measured)
        if front is None:
            return None
        picked = front.members[front.pick(pick)]
        best, found = picked.candidate, found._replace(recipe=picked.recipe, race=None)
        heldout = picked.heldout
    elif search.stop():
        return None
    else:
        heldout = measure(asking.search, name_of(best), found.recipe, measured)
    written = replace(found.recipe, merged={})  # what was merged for it will lie in a folder
    held = engine.info().experts
    write_atomically(journal.directory / "best.yaml", best_yaml(written, config, below, over, held))
    seconds = sum(c.seconds for c in candidates)
    return Outcome(
        best,
        found.recipe,
        len(candidates),
        sum(c.error is not None for c in candidates),
        seconds,
        sum(c.swap_seconds for c in candidates) / seconds if seconds else 0.0,
        questions.policy,
        _ledger(asking, answers + found.answers, len(candidates), spent),
        found.race,
        asking.checks,
        asking.drifted,
        heldout,
        others,
        below,
        front,
        compaction(asking.search, checks, best, found.recipe, measured),
        over,
        between,
    )


class _Found(NamedTuple):
    """What one search came to. answers: it took, calibration and race aside. members: of several objectives, those who
    may be on the front, `best` being the first."""

    best: Candidate
    recipe: Recipe
    race: Race | FrontRace | None
    answers: int
    members: Sequence[Believed] | None = None


def _searched(asking: Asking, first: int = 0, ending: Callable[..., _Found | None] | None = None) -> _Found | None:
    """Search, then let the best race. None if stopped. first: see search_generations. ending: default: _winner."""
    search, journal = asking.search, asking.search.journal
    optimizer = (search_steadily if in_flight(search) else search_generations)(asking, first)
    if optimizer is None:
        return None
    candidates = [c for c in journal.candidates() if c.generation >= first][: search.config.optimizer.budget]
    answers = sum(len(c.responses) for c in candidates if c.responses is not None)
    return (ending or _winner)(asking, optimizer, candidates, answers)


def _winner(asking: Asking, optimizer: Optimizer, candidates: list[Candidate], answers: int) -> _Found | None:
    search = asking.search
    ranked = rank(candidates, optimizer)
    best = ranked[0].candidate
    _stage(search, "race", len(candidates), best)
    settled = settle(asking, ranked, answers, optimizer.favorite() is not None)
    if search.stop():
        return None
    best, race = settled if settled is not None else (best, None)
    return _Found(best, search.space.recipe(best.genome), race, answers)


def _in_rounds(asking: Asking, config: EvolveConfig) -> tuple[_Found | None, Asking, list[Over], Race | None]:
    """(what the rounds came to, the last one's asking, those before it, the race between all). None if stopped."""
    search, over, rounds = asking.search, [], config.optimizer.rounds
    for number in range(rounds):
        asking = replace(asking, search=of_round(search, config, number, over[-1].elites if over else ()))
        ending = _elites if number + 1 < rounds else _winner
        found = _searched(asking, over[-1].last + 1 if over else 0, ending)
        if found is None:
            return None, asking, over, None
        if number + 1 < rounds:
            folder = search.journal.directory / ELITES
            folder.mkdir(exist_ok=True)
            for elite in found.elites:
                text = best_yaml(replace(elite.recipe, merged={}), config, over=over)
                write_atomically(folder / f"{Path(elite.name).name}.yaml", text)
            over.append(found)
    best, recipe, between = race_rounds(asking, (found.best, found.recipe), over)
    if search.stop():
        return None, asking, over, None
    race = found.race if best is found.best else None  # of candidates of whom none has won
    return found._replace(best=best, recipe=recipe, race=race), asking, over, between


def _elites(asking: Asking, optimizer: Optimizer, candidates: list[Candidate], answers: int) -> Over | None:
    ranked = rank(candidates, optimizer)
    _stage(asking.search, ELITES, len(candidates), ranked[0].candidate)
    return close(asking, ranked, candidates)


def _front(asking: Asking, optimizer: Optimizer, candidates: list[Candidate], answers: int) -> _Found | None:
    search = asking.search
    _stage(search, "race", len(candidates))
    members, race = settle_front(asking, believed(search, candidates, optimizer), answers)
    if search.stop():
        return None
    first = members[0].candidate
    return _Found(first, search.space.recipe(first.genome), race, answers, members)


def rank(candidates: list[Candidate], optimizer: Optimizer) -> list[Ranked]:
    """Best first; of equals the earliest, and no recipe twice."""
    first = {c.recipe_hash: c for c in reversed(candidates) if not math.isnan(c.value)}
    known = list(first.values())
    believed = optimizer.beliefs([c.genome for c in known])
    values, stderrs = believed if believed else ([c.value for c in known], [c.stderr for c in known])
    ranked = [Ranked(c, float(value), float(stderr)) for c, value, stderr in zip(known, values, stderrs)]
    return sorted(ranked, key=lambda r: (-r.value, r.candidate.generation, r.candidate.position))


def best_yaml(
    recipe: Recipe,
    config: EvolveConfig,
    below: Winner | None = None,
    over: Sequence[Over] = (),
    experts: str = "full",
) -> str:
    """The winner as a mergekit recipe. below: a first stage's, which is one of its models; over: rounds, whose elites
    may be; experts: how they were held."""
    seed = config.optimizer.seed
    head = f"# found by merge3 {__version__} ({config.optimizer.name}, seed {seed})\n"
    if METHODS[recipe.method].stochastic:
        head += f"# random keeps: the searched model is `merge3-client merge best.yaml OUT --seed {seed}`\n"
    if experts != "full":
        head += f"# searched with experts held as {experts}; a merge of this recipe reads the full checkpoints\n"
    if recipe.tower:
        head += "# `tower` says where a language model lies in the base: merge3 reads it, mergekit does not\n"
    if below is not None:
        head += f"# {below.name} is the merge of {FOLDER}.yaml\n"
    models = set(map(str, recipe.models()))
    for elite in (elite for one in over for elite in one.elites if elite.name in models):
        head += f"# {elite.name} is the merge of {ELITES}/{Path(elite.name).name}.yaml\n"
    return head + recipe.to_yaml()


def _stage(search: Search, stage: str, done: int = 0, best: Candidate | None = None) -> None:
    progress = Progress(stage=stage, done=done, budget=search.config.optimizer.budget)
    if best is not None:
        progress.best, progress.best_stderr = best.value, best.stderr
    search.report(progress)


def _ledger(asking: Asking, answers: int, candidates: int, spent: int) -> Ledger:
    search, journal = asking.search, asking.search.journal
    full = candidates * len(search.questions.search)
    beside = journal.answers("check"), journal.answers("race"), full, journal.answers(ELITES)
    return Ledger(asking.answers, answers, *beside, spent)
