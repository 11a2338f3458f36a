"""The demo's world: small Llamas trained here from scratch, and four kinds of questions about numbers.

What makes it behave like real fine-tunes, and what does not, was found by trying. Experts tuned hard from
a base that knows little do not merge at all; experts tuned gently and alike from a base that knows most
merge well at any weights, and a search has nothing to find. Here the base is half-trained on everything,
three experts are tuned gently on one task each and forget some of the others, and the fourth is tuned five
times as hard: merges that treat all alike suffer, and which weights help, layer by layer, must be found.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import torch

_UNITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_TEENS = ["ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
ENGLISH = [*_UNITS, *_TEENS, *(t + ("" if u == "zero" else u) for t in _TENS for u in _UNITS)]
_UNITA = ["zero", "uno", "due", "tre", "quattro", "cinque", "sei", "sette", "otto", "nove"]
_DIECI = ["dieci", "undici", "dodici", "tredici", "quattordici", "quindici", "sedici", "diciassette", "diciotto", "diciannove"]
_DECINE = ["venti", "trenta", "quaranta", "cinquanta", "sessanta", "settanta", "ottanta", "novanta"]


def _italian(ten: str, unit: str) -> str:
    if unit == "zero":
        return ten
    return (ten[:-1] if unit in ("uno", "otto") else ten) + unit


ITALIAN = [*_UNITA, *_DIECI, *(_italian(t, u) for t in _DECINE for u in _UNITA)]
_TRANSLATED, _SORTED = 80, 60  # numbers that occur
WORDS = ["plus", "minus", "and", "equals", "per", "e", "fa", "english", "italian", "sort", "sorted"]
SPECIAL = ["<pad>", "<s>", "</s>"]


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
# Shares of the base's training mixture: products are learned soonest, sums and sorting last.
MIXTURE = {"english": 0.32, "italian": 0.12, "translation": 0.26, "sorting": 0.3}
# Learning rates of the experts: found on a hub, not all are tuned with equal care.
RATES = {"english": 2e-4, "italian": 3e-4, "translation": 3e-4, "sorting": 1.5e-3}
ITEMS_PER_TASK = 2000
MAX_LENGTH = 12  # tokens of the longest line, start and end included


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


def make_tokenizer():
    """A word-level tokenizer: one token per number word."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *WORDS, *dict.fromkeys([*ENGLISH, *ITALIAN])]
    raw = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    raw.pre_tokenizer = WhitespaceSplit()
    raw.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )


def make_models(
    folder: Path, seed: int = 0, base_steps: int = 150, expert_steps: int = 100,
    progress: Callable[[str, int, int], None] = lambda what, step, steps: None,
) -> None:
    """Train a base and one expert per task; save ordinary checkpoints folder/base, folder/<task>, and
    folder/<task>.jsonl. progress(what, step, steps)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=32, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    mix = lambda: rng.choices(list(MIXTURE), MIXTURE.values())[0]
    _train(model, tokenizer, rng, mix, base_steps, 2e-3, lambda s: progress("base", s, base_steps))
    _save(model, tokenizer, folder / "base")
    start = {k: v.clone() for k, v in model.state_dict().items()}
    for task in TASKS:
        model.load_state_dict(start)
        report = lambda step, task=task: progress(task, step, expert_steps)
        _train(model, tokenizer, rng, lambda task=task: task, expert_steps, RATES[task], report)
        _save(model, tokenizer, folder / task)
    for task in TASKS:
        lines = [json.dumps(item, ensure_ascii=False) for item in make_items(task, seed)]
        (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _train(model, tokenizer, rng, pick: Callable[[], str], steps: int, rate: float, progress) -> None:
    """AdamW with a linear warm-up; loss on the answer alone, batches of 128 lines."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20)
        ids, labels = _batch(tokenizer, rng, pick, 128)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress(step + 1)
    model.eval()


def _batch(tokenizer, rng, pick, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.zeros(size, MAX_LENGTH, dtype=torch.long)
    labels = torch.full((size, MAX_LENGTH), -100)
    vocabulary = tokenizer.get_vocab()
    for row in range(size):
        prompt, answer = TASKS[pick()](rng)
        before = [1, *(vocabulary[w] for w in prompt.split())]
        after = [*(vocabulary[w] for w in answer), 2]
        line = torch.tensor(before + after)
        ids[row, : len(line)] = line
        labels[row, len(before) : len(line)] = line[len(before) :]
    return ids, labels


def _save(model, tokenizer, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
