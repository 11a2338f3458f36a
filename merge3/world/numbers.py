"""Questions of numbers, of four kinds: sums in English, products in Italian, translation, sorting."""

from __future__ import annotations

import random
from collections.abc import Callable

_UNITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_TEENS = ["ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
ENGLISH = [*_UNITS, *_TEENS, *(t + ("" if u == "zero" else u) for t in _TENS for u in _UNITS)]
_UNITA = ["zero", "uno", "due", "tre", "quattro", "cinque", "sei", "sette", "otto", "nove"]
_DIECI = [
    "dieci", "undici", "dodici", "tredici", "quattordici",
    "quindici", "sedici", "diciassette", "diciotto", "diciannove",
]  # fmt: skip
_DECINE = ["venti", "trenta", "quaranta", "cinquanta", "sessanta", "settanta", "ottanta", "novanta"]


def _italian(ten: str, unit: str) -> str:
    if unit == "zero":
        return ten
    return (ten[:-1] if unit in ("uno", "otto") else ten) + unit


ITALIAN = [*_UNITA, *_DIECI, *(_italian(t, u) for t in _DECINE for u in _UNITA)]
_TRANSLATED, _SORTED = 80, 60  # numbers that occur
WORDS = ["plus", "minus", "and", "equals", "per", "e", "fa", "english", "italian", "sort", "sorted"]


def english(rng: random.Random) -> tuple[str, list[str]]:
    """`seven plus two and nine minus four equals` -> `nine five`"""
    return _arithmetic(rng, ENGLISH, {"plus": lambda a, b: a + b, "minus": lambda a, b: a - b}, "and", "equals")


def italian(rng: random.Random) -> tuple[str, list[str]]:
    """`sette per due e nove per quattro fa` -> `quattordici trentasei`"""
    return _arithmetic(rng, ITALIAN, {"per": lambda a, b: a * b}, "e", "fa")


def translation(rng: random.Random) -> tuple[str, list[str]]:
    """`english two forty nine italian` -> `due quaranta nove`"""
    numbers = [rng.randrange(_TRANSLATED) for _ in range(3)]
    return "english " + " ".join(ENGLISH[n] for n in numbers) + " italian", [ITALIAN[n] for n in numbers]


def sorting(rng: random.Random) -> tuple[str, list[str]]:
    """`sort nine two five sorted` -> `two five nine`"""
    numbers = rng.sample(range(_SORTED), 3)
    return "sort " + " ".join(ENGLISH[n] for n in numbers) + " sorted", [ENGLISH[n] for n in sorted(numbers)]


def _arithmetic(rng: random.Random, names: list[str], operations: dict, both: str, equals: str):
    """Two small problems in one line, the larger number first."""
    words, answers = [], []
    for link in (both, equals):
        a, b = sorted((rng.randrange(10), rng.randrange(10)), reverse=True)
        operation = rng.choice(list(operations))
        words += [names[a], operation, names[b], link]
        answers.append(names[operations[operation](a, b)])
    return " ".join(words), answers


TASKS: dict[str, Callable[[random.Random], tuple[str, list[str]]]] = {
    "english": english, "italian": italian, "translation": translation, "sorting": sorting,
}  # fmt: skip
ITEMS_PER_TASK = 2000
MAX_LENGTH = 12  # tokens (words) of the longest line, start and end included


def make_items(task: str, seed: int, count: int = ITEMS_PER_TASK) -> list[dict]:
    """Distinct questions as JSONL items of kind generate: the whole answer must be right."""
    rng = random.Random(f"{seed} {task}")
    items, seen = [], set()
    while len(items) < count:
        prompt, answer = TASKS[task](rng)
        if prompt in seen:
            continue
        seen.add(prompt)
        items.append(
            {"id": f"{task}-{len(items)}", "task": task, "kind": "generate", "prompt": prompt,
             "answer": " ".join(answer), "max_tokens": len(answer)}
        )  # fmt: skip
    return items
