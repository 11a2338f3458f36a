"""Two experts that are worth more one after the other: one reads Italian numbers, the other counts on in English. The
questions ask, in Italian, for the English number after next, which nobody was taught.

What makes layers of such models work in another place was found by trying. All three models are the same small Llama
whose head is its embedding; the base learns to say the last word again, so that what its layers hand on lies where
words do. The experts are tuned from it on one map each. The state behind a stack is longer than a word's embedding, and
a second stack that adds to it as to a word changes too little: how the state is scaled in between decides. Where the
answer takes no more steps than a model has layers, a merge of weights that takes each layer from another expert does it
too; so the models have two, and the answer takes three.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import torch

from merge3.world.numbers import ENGLISH, ITALIAN
from merge3.world.tokenizer import make_tokenizer

LAYERS, WIDTH = 2, 64
BASE_STEPS, EXPERT_STEPS = 250, 150
ITEMS = 400
Map = Callable[[str], str]


def _again(word: str) -> str:
    return word


def _read(word: str) -> str:
    """Italian in English; English stays."""
    return ENGLISH[ITALIAN.index(word)] if word in ITALIAN else word


def _next(word: str) -> str:
    """The next English number; Italian stays."""
    return ENGLISH[(ENGLISH.index(word) + 1) % len(ENGLISH)] if word in ENGLISH else word


MAPS: dict[str, Map] = {"base": _again, "reader": _read, "counter": _next}


def make_stacked(
    folder: Path, seed: int = 0, base_steps: int = BASE_STEPS, expert_steps: int = EXPERT_STEPS, items: int = ITEMS
) -> None:
    """Train base, reader and counter; save checkpoints of these names, and `items` questions, folder/count.jsonl."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    start = None
    for name, says in MAPS.items():
        if start is not None:
            model.load_state_dict(start)
        steps, rate = (base_steps, 3e-3) if start is None else (expert_steps, 1e-3)
        _train(model, tokenizer, rng, says, steps, rate)
        start = start or {k: v.clone() for k, v in model.state_dict().items()}
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    lines = [json.dumps(item, ensure_ascii=False) for item in make_questions(seed, items)]
    (folder / "count.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_questions(seed: int, count: int = ITEMS) -> list[dict]:
    """Distinct questions as JSONL items of kind generate: `seven trentuno` -> `thirtythree`."""
    rng, items, seen = random.Random(f"{seed} count"), [], set()
    while len(items) < count:
        word = rng.choice(ITALIAN)
        prompt = f"{rng.choice(ENGLISH + ITALIAN)} {word}"
        if prompt in seen:
            continue
        seen.add(prompt)
        answer = _next(_next(_read(word)))
        row = {"id": f"count-{len(items)}", "task": "count", "kind": "generate", "prompt": prompt}
        items.append(row | {"answer": answer, "max_tokens": 1})
    return items


def _train(model, tokenizer, rng: random.Random, says: Map, steps: int, rate: float) -> None:
    """AdamW with a linear warm-up; loss on the last word alone, batches of 128 pairs of words."""
    vocabulary, words = tokenizer.get_vocab(), ENGLISH + ITALIAN
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20) * min(1.0, 2 * (1 - step / steps))
        pairs = [(rng.choice(words), rng.choice(words)) for _ in range(128)]
        ids = torch.tensor([[1, *(vocabulary[word] for word in pair)] for pair in pairs])
        right = torch.tensor([vocabulary[says(last)] for _, last in pairs])
        loss = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[:, -1], right)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
