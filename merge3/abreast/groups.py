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
from merge3.memory import FILE, HOST
from merge3.program import Program
from merge3.tasks.requests import Pass
from merge3.tasks.score import Answers, Scorer

PAYS = 4  # candidates, where models are streamed: twice as many gain little, and take twice the room
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

    def ask(
        self, programs: Sequence[Program], rounds: Rounds, count: int, seed: int
    ) -> tuple[list[Answers | BadInput], float] | None:
        """(each candidate's answers, or why it has none; seconds of merging). count: of the items. None where these
        questions cannot be asked so, or there is no room: they are to be asked one candidate after the other."""
        self.slot.placed()  # its own layers: a path has others
        asking: list[list[list[Pass]]] = []  # of each candidate and question
        for _ in programs:
            own = [scorer.passes(self.slot.model) for _, scorer in rounds]
            if any(questions is None for questions in own):
                return None
            asking.append(list(chain.from_iterable(own)))
        if not self._fits(rounds[0][1]) or not self._room(len(programs)):
            return None
        told, seconds = self._abreast.ask(programs, asking, seed)
        return [_answered(rounds, questions, count) for questions in told], seconds

    def _fits(self, scorer: Scorer) -> bool:
        if self._abreast is None and self._most > 1:
            try:
                self._abreast = Abreast(self.slot, scorer.passes(self.slot.model)[0])
            except Unfit:
                self._most = 1
        return self._abreast is not None

    def _room(self, candidates: int) -> bool:
        """Whether a budget has room for so many blocks beside all else; if not, half of them are tried next."""
        self._reserved = max(self._reserved, candidates * self._abreast.size)
        try:
            self.slot.pool.reserve(self._reserved)
        except BadInput:
            self._most, self._reserved = candidates // 2, 0
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
