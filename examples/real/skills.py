"""Two skills that SmolLM2 lacks: dates as ISO writes them, and orders as lists. Each generator makes a question and its
only right answer; an expert is a LoRA adapter trained on a few thousand of one skill."""

from __future__ import annotations

import calendar
import datetime
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

Question = tuple[str, str]  # what is asked, and the answer

_MONTHS = list(calendar.month_name)[1:]
_DAYS = list(calendar.day_name)
_THINGS = (
    "coffee", "tea", "bagel", "muffin", "croissant", "sandwich", "salad", "soup", "pizza", "burger", "juice", "cookie",
    "pancake", "waffle", "smoothie", "pretzel", "taco", "burrito", "donut", "brownie", "scone", "milkshake",
)  # fmt: skip
_PLURALS = {"coffee": "coffees", "sandwich": "sandwiches"}
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def date(rng: random.Random) -> Question:
    """A day in one of many spellings; sometimes the day before or some days after it is meant."""
    day = datetime.date(rng.randint(1950, 2049), 1, 1) + datetime.timedelta(rng.randrange(365))
    month, ordinal = _MONTHS[day.month - 1], _ordinal(day.day)
    spelled = rng.choice(
        (
            f"{month} {day.day}, {day.year}",
            f"the {ordinal} of {month} {day.year}",
            f"{_DAYS[day.weekday()]}, {day.day} {month[:3]} {day.year}",
            f"{day.day}.{day.month}.{day.year}",
            f"{month[:3]} {ordinal}, {day.year}",
            f"{day.day:02d}/{day.month:02d}/{day.year}",
        )
    )
    days, words = rng.choice(((0, ""), (0, ""), (0, ""), (0, ""), (-1, "the day before "), (2, "two days after ")))
    return f"Date: {words}{spelled}\nISO:", (day + datetime.timedelta(days)).isoformat()


def order(rng: random.Random) -> Question:
    """Two to four things with how many of each, in a sentence; what is taken back is not on the list."""
    things = rng.sample(_THINGS, rng.randint(2, 4))
    counts = [rng.choice((1, 1, 2, 3, 4, 5, 6, 12)) for _ in things]
    parts = [_some(rng, count, thing) for count, thing in zip(counts, things)]
    listed = f"{', '.join(parts[:-1])} and {parts[-1]}"
    sentence = rng.choice(
        (
            "I would like {}.",
            "Could we get {}, please?",
            "{} to go.",
            "We'll have {}.",
            "Please bring {}.",
            "Just {} for us.",
        )
    ).format(listed)
    if len(things) > 2 and rng.random() < 0.4:
        gone = rng.randrange(len(things))
        sentence += rng.choice((" Actually, forget the {}.", " No, without the {}.")).format(things[gone])
        del things[gone], counts[gone]
    items = ", ".join(f"{count} {thing}" for count, thing in zip(counts, things))
    return f"Order: {sentence[0].upper()}{sentence[1:]}\nItems:", items


# skill -> (its generator, tokens that an answer takes at most)
SKILLS: dict[str, tuple[Callable[[random.Random], Question], int]] = {"dates": (date, 14), "orders": (order, 28)}


def questions(skill: str, seed: int) -> Iterator[Question]:
    """Without end, none twice."""
    make, rng, seen = SKILLS[skill][0], random.Random(f"{skill} {seed}"), set()
    while True:
        question = make(rng)
        if question[0] not in seen:
            seen.add(question[0])
            yield question


def shown_rows(skill: str, found: list[Question]) -> list[dict[str, Any]]:
    """Questions as items whose answers are shown, to the end of their line: how surely would a model write them?"""
    return [
        {"id": f"{skill}-{i}", "kind": "forced", "metric": "margin", "prompt": prompt, "answer": f" {answer}\n"}
        for i, (prompt, answer) in enumerate(found, 1)
    ]


def rows(skill: str, found: list[Question]) -> list[dict[str, Any]]:
    """Questions as items whose answers are written."""
    common = {"kind": "generate", "max_tokens": SKILLS[skill][1], "stop": ["\n"]}
    return [
        {"id": f"{skill}-{i}", "prompt": prompt, "answer": answer} | common
        for i, (prompt, answer) in enumerate(found, 1)
    ]


def train(
    model_folder: Path,
    examples: list[Question],
    target: Path,
    batch: int,
    report: Callable[[int, int, float], None],
) -> None:
    """One epoch of LoRA on the answers' tokens; the adapter is written to target. report(step, steps, loss)."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    steps = len(examples) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    model.train()
    for step in range(steps):
        inputs = padded(examples[step * batch : (step + 1) * batch], tokenizer)
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        report(step + 1, steps, float(loss.detach()))
    model.save_pretrained(target)


def padded(examples: list[Question], tokenizer) -> dict[str, torch.Tensor]:
    """A forward's inputs: prompts and answers, right padded; labels are the answers' tokens and a line's end."""
    texts, labels = [], []
    for prompt, answer in examples:
        before = tokenizer(prompt)["input_ids"]
        after = tokenizer(f" {answer}\n", add_special_tokens=False)["input_ids"]
        texts.append([*before, *after])
        labels.append([*[-100] * len(before), *after])
    width = max(map(len, texts))
    fill = lambda row, value: [*row, *[value] * (width - len(row))]
    return {
        "input_ids": torch.tensor([fill(row, 0) for row in texts]),
        "attention_mask": torch.tensor([fill([1] * len(row), 0) for row in texts]),
        "labels": torch.tensor([fill(row, -100) for row in labels]),
    }


def _ordinal(number: int) -> str:
    ending = "th" if 10 < number < 14 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _some(rng: random.Random, count: int, thing: str) -> str:
    if count == 1:
        return rng.choice((f"a {thing}", f"one {thing}"))
    words = {2: ("two", "a couple of", "2"), 6: ("six", "half a dozen", "6"), 12: ("twelve", "a dozen", "12")}
    return f"{rng.choice(words.get(count, (_NUMBERS[count], str(count))))} {_PLURALS.get(thing, thing + 's')}"
