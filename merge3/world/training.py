"""Small Llamas trained here from scratch: a base that knows a little of everything, and an expert per task.

What makes it behave like real fine-tunes, and what does not, was found by trying. Experts tuned hard from
a base that knows little do not merge at all; experts tuned gently and alike from a base that knows most
merge well at any weights, and a search has nothing to find. Here the base is half-trained on everything
(seeds learn at different speeds, so it stops at a loss, not after a number of steps), three experts are
tuned gently on one task each and forget some of the others, and the fourth is tuned five times as hard:
merges that treat all alike suffer, and which weights help, layer by layer, must be found.
"""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch

from merge3.world.numbers import ITEMS_PER_TASK, MAX_LENGTH, TASKS, make_items
from merge3.world.tokenizer import make_tokenizer

EXPERT_STEPS = 100
HALF_TRAINED, AT_MOST = 0.6, 400  # the loss at which a base stops, and the steps after which it stops anyway
SMOOTHED = 20  # steps whose mean loss counts
# Shares of the base's training mixture: products are learned soonest, sums and sorting last.
MIXTURE = {"english": 0.32, "italian": 0.12, "translation": 0.26, "sorting": 0.3}
# Learning rates of the experts: found on a hub, not all are tuned with equal care.
RATES = {"english": 2e-4, "italian": 3e-4, "translation": 3e-4, "sorting": 1.5e-3}


def make_models(
    folder: Path,
    seed: int = 0,
    base_steps: int | None = None,
    expert_steps: int = EXPERT_STEPS,
    items: int = ITEMS_PER_TASK,
    progress: Callable[[str, int, int], None] = lambda what, step, steps: None,
) -> None:
    """Train a base and one expert per task; save ordinary checkpoints folder/base and folder/<task>, and `items`
    questions of every task, folder/<task>.jsonl. base_steps: None: until it is half trained. progress(what, step,
    steps)."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = make_tokenizer()
    model = new_model(tokenizer)
    mix = lambda: TASKS[rng.choices(list(MIXTURE), MIXTURE.values())[0]](rng)
    most, until = (AT_MOST, HALF_TRAINED) if base_steps is None else (base_steps, None)
    done = train(model, tokenizer, mix, most, 2e-3, lambda s: progress("base", s, most), until=until)
    progress("base", done, done)
    save(model, tokenizer, folder / "base")
    start = {k: v.clone() for k, v in model.state_dict().items()}
    for task in TASKS:
        model.load_state_dict(start)
        report = lambda step, task=task: progress(task, step, expert_steps)
        train(model, tokenizer, lambda task=task: TASKS[task](rng), expert_steps, RATES[task], report)
        save(model, tokenizer, folder / task)
    for task in TASKS:
        write_items(make_items(task, seed, items), folder / f"{task}.jsonl")


def new_model(tokenizer):
    """A Llama of four layers that has learned nothing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def train(
    model,
    tokenizer,
    line: Callable[[], tuple[str, list[str]]],
    steps: int,
    rate: float,
    progress: Callable[[int], None] = lambda step: None,
    length: int = MAX_LENGTH,
    until: float | None = None,
) -> int:
    """AdamW with a linear warm-up; loss on the answer alone, batches of 128 lines. line: the next (prompt, words of the
    answer); length: tokens of the longest, start and end included; until: a mean loss of the last steps that ends it.
    Returns the steps it took."""
    model.train()
    losses: deque[float] = deque(maxlen=SMOOTHED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20)
        ids, labels = _batch(tokenizer, line, 128, length)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress(step + 1)
        losses.append(loss.item())
        if until is not None and len(losses) == SMOOTHED and sum(losses) / SMOOTHED <= until:
            steps = step + 1
            break
    model.eval()
    return steps


def write_items(items: list[dict], file: Path) -> None:
    """As JSON lines."""
    lines = [json.dumps(item, ensure_ascii=False) for item in items]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def save(model, tokenizer, folder: Path) -> None:
    """An ordinary checkpoint."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _batch(tokenizer, line, size: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.zeros(size, length, dtype=torch.long)
    labels = torch.full((size, length), -100)
    vocabulary = tokenizer.get_vocab()
    for row in range(size):
        prompt, answer = line()
        before = [1, *(vocabulary[w] for w in prompt.split())]
        after = [*(vocabulary[w] for w in answer), 2]
        whole = torch.tensor(before + after)
        ids[row, : len(whole)] = whole
        labels[row, len(before) : len(whole)] = whole[len(before) :]
    return ids, labels
