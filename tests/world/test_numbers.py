"""Every question has the right answer, in words that the tokenizer tells apart."""

import pytest

from merge3.world.numbers import ENGLISH, ITALIAN, MAX_LENGTH, TASKS, make_items
from merge3.world.tokenizer import make_tokenizer


def value(names, words):
    a, operation, b = words
    a, b = names.index(a), names.index(b)
    return {"plus": a + b, "minus": a - b, "per": a * b}[operation]


def solved(task, prompt):
    """The answer, worked out from the words of the question."""
    words = prompt.split()
    if task in ("english", "italian"):
        names = ENGLISH if task == "english" else ITALIAN
        return [names[value(names, words[:3])], names[value(names, words[4:7])]]
    numbers = [ENGLISH.index(word) for word in words[1:-1]]
    if task == "translation":
        return [ITALIAN[n] for n in numbers]
    return [ENGLISH[n] for n in sorted(numbers)]


@pytest.mark.parametrize("task", TASKS)
def test_answers(task):
    tokenizer = make_tokenizer()
    items = make_items(task, 0, 300)
    assert len({item["prompt"] for item in items}) == len({item["id"] for item in items}) == 300
    for item in items:
        assert item["answer"] == " ".join(solved(task, item["prompt"])) and item["max_tokens"] == len(
            item["answer"].split()
        )
        ids = tokenizer(f"{item['prompt']} {item['answer']}")["input_ids"]
        assert tokenizer.decode(ids[1:]) == f"{item['prompt']} {item['answer']}" and len(ids) + 1 <= MAX_LENGTH
    assert items[:40] == make_items(task, 0, 40) and items != make_items(task, 1, 300)


def test_numbers_are_spelled_as_people_do():
    assert (ENGLISH[42], ENGLISH[90], ENGLISH[13]) == ("fortytwo", "ninety", "thirteen")
    assert (ITALIAN[21], ITALIAN[28], ITALIAN[70], ITALIAN[99]) == ("ventuno", "ventotto", "settanta", "novantanove")
    assert len(set(ENGLISH)) == len(set(ITALIAN)) == 100
