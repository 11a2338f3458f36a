"""How many candidates an engine asks abreast, and what each of them answers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from merge3.abreast.ask import Abreast
from merge3.abreast.course import Unfit
from merge3.errors import BadInput
from merge3.live.slot import Slot
from merge3.memory import FILE, HOST, available
from merge3.program import Program
from merge3.tasks.requests import Pass
from merge3.tasks.score import Answers, Scorer

PAYS = 4  # candidates, where models are streamed: twice as many gain little, and take twice the room
SHARE = 4  # of the memory that is free, one part in so many is for the states of forwards that wait
_STATES = 4  # of a position that waits: what goes into a layer, and what is computed of it
Rounds = Sequence[tuple[Sequence[int], Scorer]]  # whose positions among all items, and what asks them


class Groups:
    """Of one engine. wanted: candidates at once; None: as many as pay where models are streamed, else one after the
    other, which is as fast where a candidate's questions cost more than reading the models does."""

    def __init__(self, slot: Slot, wanted: int | None = None):
        self.slot, self.wanted = slot, wanted
        self._abreast: Abreast | None = None
        self._most, self._reserved = 2**10, 0  # candidates that there is a way and room for; bytes that they take

    def size(self) -> int:
        """How many to ask at once, where they can be asked so."""
        away = self.slot.pool.memory.away.values()
        pays = PAYS if any(tier in (FILE, HOST) for tier, _ in away) else 1
        return min(self.wanted or pays, self._most)

    def takes(self, rounds: Rounds) -> bool:
        """Whether these questions can be asked so at all: none of them waits for answers before it goes on."""
        return bool(rounds) and all(scorer.in_passes for _, scorer in rounds)

    def ask(
        self, programs: Sequence[Program], rounds: Rounds, count: int, seed: int
    ) -> tuple[list[Answers | BadInput], float] | None:
        """(each candidate's answers, or why it has none; seconds of merging). rounds: that it `takes`. count: of the
        items. None where this model or these programs are not fit for it, or there is no room: they are to be asked one
        candidate after the other."""
        self.slot.placed()  # its own layers: a path has others
        if not self._fits(rounds[0][1]) or any(self._abreast.outputs - program.shapes.keys() for program in programs):
            return None
        asking: list[list[list[Pass]]] = []  # of each candidate and question
        for _ in programs:
            asking.append(list(chain.from_iterable(scorer.passes(self.slot.model) for _, scorer in rounds)))
        if not self._holds(list(chain.from_iterable(asking[0])), len(programs)) or not self._room(len(programs)):
            return None
        told, seconds = self._abreast.ask(programs, asking, seed)
        return [_answered(rounds, questions, count) for questions in told], seconds

    def give_up(self) -> bool:
        """Leave the room that candidates took to others, until the next group. Whether they took any."""
        taken, self._reserved = self._reserved > 0, 0
        if self._abreast is not None:
            self._abreast.give_up()
        if taken:
            self.slot.pool.reserve(0)
        return taken

    def fewer(self) -> None:
        """What so many take was not there: half of them from now on."""
        self.give_up()
        self._most = max(self.size() // 2, 1)

    def _fits(self, scorer: Scorer) -> bool:
        if self._abreast is None and self._most > 1:
            try:
                self._abreast = Abreast(self.slot, scorer.passes(self.slot.model)[0])
            except Unfit:
                self._most = 1
        return self._abreast is not None

    def _holds(self, passes: Sequence[Pass], candidates: int) -> bool:
        """Whether there is memory for the states of all forwards, which wait at once."""
        settings = self.slot.model.config.get_text_config()
        width, layers = getattr(settings, "hidden_size", 4096), self.slot.pool.searched.layers
        itemsize = next(self.slot.model.parameters()).itemsize
        states = sum((2 * layers if one.keeps else _STATES) * one.positions for one in passes)
        return candidates * states * width * itemsize <= available(self.slot.pool.device) // SHARE

    def _room(self, candidates: int) -> bool:
        """Whether a budget has room for so many blocks beside all else."""
        self._reserved = max(self._reserved, candidates * self._abreast.size)
        try:
            self.slot.pool.reserve(self._reserved)
        except BadInput:
            self.fewer()
            return False
        return True


def _answered(rounds: Rounds, told: list[list[Any]], count: int) -> Answers | BadInput:
    """told: of each question of each round."""
    responses, raw, lengths = np.empty(count), {}, np.empty(count)
    left = iter(told)
    try:
        for positions, scorer in rounds:
            answers = scorer.judged([next(left) for _ in scorer.asked])
            responses[positions], lengths[positions] = answers.responses, answers.lengths
            raw |= {positions[at]: found for at, found in answers.raw.items()}
    except BadInput as problem:
        return problem
    return Answers(responses, raw, lengths)
