"""Two experts of the same skill: one answers, the other says the question again before it answers.

Both are tuned alike on the sums of numbers.py from a base that half knows how to do them and answers either way. An
item is solved by an answer that ends in the right words, whatever stands before them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch

from merge3.world.numbers import MAX_LENGTH, english
from merge3.world.tokenizer import make_tokenizer
from merge3.world.training import new_model, save, train, write_items

BASE_STEPS, EXPERT_STEPS, RATE = 130, 50, 5e-4
QUESTION = 8  # words: what is said again
LONGEST = MAX_LENGTH + QUESTION  # tokens of the longest line


def terse(rng: random.Random) -> tuple[str, list[str]]:
    """`seven plus two and nine minus four equals` -> `nine five`"""
    return english(rng)


def verbose(rng: random.Random) -> tuple[str, list[str]]:
    """The same -> `seven plus two and nine minus four equals nine five`"""
    prompt, answer = english(rng)
    return prompt, [*prompt.split(), *answer]


STYLES: dict[str, Callable[[random.Random], tuple[str, list[str]]]] = {"terse": terse, "verbose": verbose}


def make_wordy(
    folder: Path,
    seed: int = 0,
    base_steps: int = BASE_STEPS,
    expert_steps: int = EXPERT_STEPS,
    items: int = 1000,
    progress: Callable[[str, int, int], None] = lambda what, step, steps: None,
) -> None:
    """Train and save folder/base, folder/terse and folder/verbose, and `items` questions, folder/sums.jsonl.
    progress(what, step, steps)."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = make_tokenizer()
    model = new_model(tokenizer)
    either = lambda: STYLES[rng.choice(list(STYLES))](rng)
    train(model, tokenizer, either, base_steps, 2e-3, lambda s: progress("base", s, base_steps), LONGEST)
    save(model, tokenizer, folder / "base")
    start = {k: v.clone() for k, v in model.state_dict().items()}
    for style, line in STYLES.items():
        model.load_state_dict(start)
        told = lambda step, style=style: progress(style, step, expert_steps)
        train(model, tokenizer, lambda line=line: line(rng), expert_steps, RATE, told, LONGEST)
        save(model, tokenizer, folder / style)
    write_items(_items(seed, items), folder / "sums.jsonl")


def _items(seed: int, count: int) -> list[dict]:
    """Distinct questions; each answer is a pattern for the end of what is written."""
    rng, found = random.Random(f"{seed} sums"), {}
    while len(found) < count:
        prompt, answer = english(rng)
        row = {"id": f"sums-{len(found)}", "task": "sums", "kind": "generate", "prompt": prompt, "metric": "regex"}
        row |= {"answer": f"(?:^| ){' '.join(answer)}$", "max_tokens": QUESTION + len(answer)}
        found.setdefault(prompt, row)
    return list(found.values())
