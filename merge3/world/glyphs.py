"""Pictures of a coloured sign, and questions about them in English and Italian: asked with the picture, or of a
sentence that says what is on it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

CELLS, CELL = 3, 4  # a picture is CELLS x CELLS cells of CELL x CELL pixels, one of which has the sign
SIDE = CELLS * CELL
COLOURS = {
    "red": (230, 40, 40),
    "green": (40, 200, 40),
    "blue": (40, 40, 230),
    "yellow": (220, 220, 40),
    "white": (240, 240, 240),
}
SHAPES = {
    "dot": ("    ", " ## ", " ## ", "    "),
    "cross": ("#  #", " ## ", " ## ", "#  #"),
    "ring": ("####", "#  #", "#  #", "####"),
    "bar": ("    ", "####", "####", "    "),
}
_ITALIAN = {"dot": "punto", "cross": "croce", "ring": "anello", "bar": "barra"}
_FEMININE = ("cross", "bar")
_ROSSO = {"red": "rosso", "green": "verde", "blue": "blu", "yellow": "giallo", "white": "bianco"}


@dataclass(frozen=True)
class Scene:
    """A sign's shape and colour, and the cell that it is in."""

    shape: str
    colour: str
    row: int
    column: int

    def pixels(self, rng: np.random.Generator) -> np.ndarray:
        """The picture, on a dark ground and with some noise: uint8 [SIDE, SIDE, 3]."""
        picture = np.full((SIDE, SIDE, 3), 60.0)
        sign = np.array([[mark == "#" for mark in line] for line in SHAPES[self.shape]])
        top, left = self.row * CELL, self.column * CELL
        picture[top : top + CELL, left : left + CELL][sign] = COLOURS[self.colour]
        return (picture + rng.normal(scale=12, size=picture.shape)).clip(0, 255).astype(np.uint8)


def scene(rng: random.Random) -> Scene:
    """Any sign, anywhere."""
    return Scene(rng.choice(list(SHAPES)), rng.choice(list(COLOURS)), rng.randrange(CELLS), rng.randrange(CELLS))


@dataclass(frozen=True)
class Language:
    """How one speaks of a scene. says: a sentence; asks: question -> its answer."""

    says: Callable[[Scene], str]
    asks: dict[str, Callable[[Scene], str]]


def _italian(s: Scene) -> str:
    colour = _ROSSO[s.colour]
    agreeing = colour.removesuffix("o") + "a" if s.shape in _FEMININE and colour.endswith("o") else colour
    return f"{_ITALIAN[s.shape]} {agreeing}"


LANGUAGES = {
    "english": Language(
        lambda s: f"here is a {s.colour} {s.shape} .",
        {
            "which colour ?": lambda s: s.colour,
            "which shape ?": lambda s: s.shape,
            "what is here ?": lambda s: f"{s.colour} {s.shape}",
        },
    ),
    "italian": Language(
        lambda s: f"qui c'è {_italian(s)} .",
        {
            "quale colore ?": lambda s: _ROSSO[s.colour],
            "quale forma ?": lambda s: _ITALIAN[s.shape],
            "che cosa vedi ?": _italian,
        },
    ),
}
_OTHERS = ["here", "is", "a", ".", "which", "colour", "shape", "?", "what", "qui", "c'è", "quale", "colore", "forma",
           "che", "cosa", "vedi", "rossa", "gialla", "bianca"]  # fmt: skip
WORDS = [*COLOURS, *SHAPES, *_ROSSO.values(), *_ITALIAN.values(), *_OTHERS]


def question(rng: random.Random, language: str, seen: Scene) -> tuple[str, str]:
    """(one of the language's questions, its answer)"""
    asks = LANGUAGES[language].asks
    asked = rng.choice(list(asks))
    return asked, asks[asked](seen)
