"""Kind `generate`: a greedy continuation, compared with accepted texts, numbers or patterns."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import regex as patterns

from merge3.errors import ItemsError
from merge3.tasks.images import seen
from merge3.tasks.items import Item, place, shown
from merge3.tasks.prompts import Reader
from merge3.tasks.requests import Start, Written

_PATTERN_SECONDS = 1.0
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?")


def answer(given, choices: Sequence[str], metric: str, where: str) -> tuple[str, ...]:
    """Accepted texts, of one text or number or a list of them. Raises ItemsError for what is neither, or no pattern or
    number where the metric wants one."""
    texts = given if isinstance(given, (list, tuple)) else (given,)
    if not texts or not all(isinstance(t, (str, int, float)) and not isinstance(t, bool) for t in texts):
        raise ItemsError(where, f"answer is {shown(given)}", "a text, a number or a list of them")
    texts = tuple(str(t) for t in texts)
    if metric == "regex":
        for pattern in texts:
            try:
                patterns.compile(pattern)
            except patterns.error as error:
                found = f"answer {shown(pattern)} is no pattern ({error})"
                raise ItemsError(where, found, "a regular expression") from None
    if metric == "number":
        texts = tuple(_number(text, where) for text in texts)
    return texts


def request(item: Item, reader: Reader) -> Start:
    """The prompt's tokens, and where the answer ends at the latest. Raises ItemsError where a prompt has none."""
    _, tokens, *image = seen(item, reader) if item.image else reader.prompt(item)
    return Start(tokens, item.max_tokens, item.stop, image=image[0] if image else {})


def target(item: Item, asked: Start, reader: Reader) -> tuple[int, ...]:
    """Token ids of the first accepted text, with the space before it that a prompt without one leaves open, and the
    token that ends a text where there is room. Raises ItemsError for a pattern, which is no text to be learned."""
    if item.metric == "regex":
        raise ItemsError(place(item), "its answer is a pattern", "a text or a number, where answers are learned from")
    text, answer = reader.wrapped(item.prompt), item.answer[0]
    if not (reader.chat or text[-1:].isspace() or answer[:1].isspace()):
        answer = f" {answer}"
    tokens = reader.following(text, reader.tokens(text), answer)[: item.max_tokens]
    end = reader.tokenizer.eos_token_id
    if not tokens:
        raise ItemsError(place(item), f"answer {shown(item.answer[0])} without tokens", "text the tokenizer knows")
    return (*tokens, end) if end is not None and len(tokens) < item.max_tokens else tokens


def exact(item: Item, found: Written) -> float:
    """1.0 if the text, but for outer white space, is one of the accepted, else 0.0."""
    return float(found.text.strip() in {text.strip() for text in item.answer})


def number(item: Item, found: Written) -> float:
    """1.0 if the text's last number equals one of the accepted, else 0.0."""
    numbers = _NUMBER.findall(found.text)
    return float(bool(numbers) and float(numbers[-1].replace(",", "")) in {float(text) for text in item.answer})


def regex(item: Item, found: Written) -> float:
    """1.0 if one of the patterns matches anywhere in the text, else 0.0. Raises ItemsError for one that takes too long:
    some take exponentially long, and a candidate does not wait for them."""
    for pattern in item.answer:
        try:
            if patterns.search(pattern, found.text, timeout=_PATTERN_SECONDS, concurrent=True) is not None:
                return 1.0
        except TimeoutError:
            much = f"more than {_PATTERN_SECONDS} s on {len(found.text)} characters"
            message = f"its pattern {pattern!r} takes {much}"
            raise ItemsError(place(item), message, "one without nested repetition") from None
    return 0.0


METRICS = {"exact": exact, "number": number, "regex": regex}


def _number(text: str, where: str) -> str:
    """A number as `float` takes it: digits in groups of three lose their commas."""
    plain = text.strip().replace(",", "") if _THOUSANDS.fullmatch(text.strip()) else text
    try:
        if math.isfinite(float(plain)):
            return plain
    except ValueError:
        pass
    raise ItemsError(where, f"answer is {shown(text)}", "a number, as metric is `number`")
