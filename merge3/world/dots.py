"""Pictures of coloured dots, and questions about them in English and Italian: asked with the picture, or of a sentence
that says what would be on it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

CELLS, CELL = 4, 4  # a picture is CELLS x CELLS cells of CELL x CELL pixels, each empty or with one dot
MOST = 6  # dots of a picture
SIDE = CELLS * CELL
COLOURS = {
    "red": (230, 40, 40),
    "green": (40, 200, 40),
    "blue": (40, 40, 230),
    "yellow": (220, 220, 40),
    "white": (240, 240, 240),
}
_ENGLISH = ["one", "two", "three", "four", "five", "six"]
_ITALIAN = ["uno", "due", "tre", "quattro", "cinque", "sei"]
_ROSSI = {"red": "rossi", "green": "verdi", "blue": "blu", "yellow": "gialli", "white": "bianchi"}


@dataclass(frozen=True)
class Scene:
    """dots: (row, column) of each; colour: of all of them."""

    dots: tuple[tuple[int, int], ...]
    colour: str

    def pixels(self, rng: np.random.Generator) -> np.ndarray:
        """The picture, on a dark ground and with some noise: uint8 [SIDE, SIDE, 3]."""
        picture = np.full((SIDE, SIDE, 3), 60.0)
        for row, column in self.dots:
            top, left = row * CELL + 1, column * CELL + 1
            picture[top : top + CELL - 2, left : left + CELL - 2] = COLOURS[self.colour]
        return (picture + rng.normal(scale=12, size=picture.shape)).clip(0, 255).astype(np.uint8)


def scene(rng: random.Random) -> Scene:
    """One to six dots of one colour, anywhere."""
    cells = rng.sample([(r, c) for r in range(CELLS) for c in range(CELLS)], rng.randint(1, MOST))
    return Scene(tuple(sorted(cells)), rng.choice(list(COLOURS)))


@dataclass(frozen=True)
class Language:
    """How one speaks of a scene. says: a sentence; asks: question -> its answer."""

    says: Callable[[Scene], str]
    asks: dict[str, Callable[[Scene], str]]


def _number(names: list[str], seen: Scene) -> str:
    return names[len(seen.dots) - 1]


LANGUAGES = {
    "english": Language(
        lambda s: f"here are {_number(_ENGLISH, s)} {s.colour} dots .",
        {
            "how many dots ?": lambda s: _number(_ENGLISH, s),
            "which colour ?": lambda s: s.colour,
            "what is here ?": lambda s: f"{_number(_ENGLISH, s)} {s.colour} dots",
        },
    ),
    "italian": Language(
        lambda s: f"qui ci sono {_number(_ITALIAN, s)} punti {_ROSSI[s.colour]} .",
        {
            "quanti punti ?": lambda s: _number(_ITALIAN, s),
            "quale colore ?": lambda s: _ROSSI[s.colour],
            "che cosa vedi ?": lambda s: f"{_number(_ITALIAN, s)} punti {_ROSSI[s.colour]}",
        },
    ),
}
_OTHERS = ["here", "are", "dots", ".", "how", "many", "which", "colour", "what", "is", "?", "qui", "ci", "sono", "punti",
           "quanti", "quale", "colore", "che", "cosa", "vedi"]  # fmt: skip
WORDS = [*_ENGLISH, *_ITALIAN, *COLOURS, *_ROSSI.values(), *_OTHERS]


def question(rng: random.Random, language: str, seen: Scene) -> tuple[str, str]:
    """(one of the language's questions, its answer)"""
    asks = LANGUAGES[language].asks
    asked = rng.choice(list(asks))
    return asked, asks[asked](seen)
