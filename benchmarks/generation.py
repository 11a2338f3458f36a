"""How much faster does a real checkpoint write than by transformers' batched `generate`, and what is the floor?

16 prompts of 60 tokens, 16 tokens written to each, float32. The floor: products with the weights at the rate of a large
matrix product, or, where that takes longer, all weights read once a step.

python benchmarks/generation.py build/real/smollm2 [--save]       the checkpoint is what `make real` converts
"""

import argparse
import json
from pathlib import Path

import torch
from measure import alternating, matrix_rate, median, report, seconds, table
from transformers import AutoModelForCausalLM, AutoTokenizer

from merge3.tasks import Item, Scorer

PROMPTS, LENGTH, WRITTEN = 16, 60, 16
TEXTS = Path(__file__).parents[1] / "examples" / "real" / "general.jsonl"


def prompts_of(tokenizer) -> list[str]:
    """Of LENGTH tokens each, cut from hand-written texts one after the other."""
    rows = map(json.loads, TEXTS.read_text(encoding="utf-8").splitlines())
    texts = [text for row in rows for text in row["choices"]]
    tokens = tokenizer(" ".join(dict.fromkeys(texts)))["input_ids"]
    found = []
    for start in range(0, len(tokens) - LENGTH, LENGTH):
        prompt = tokenizer.decode(tokens[start : start + LENGTH])
        if len(tokenizer(prompt)["input_ids"]) == LENGTH:
            found.append(prompt)
    assert len(found) >= PROMPTS, f"{len(found)} prompts of {LENGTH} tokens"
    return found[:PROMPTS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype=torch.float32).eval()
    prompts = prompts_of(tokenizer)
    items = [
        Item(str(i), "g", "generate", prompt, ("",), metric="exact", max_tokens=WRITTEN)
        for i, prompt in enumerate(prompts)
    ]
    (asked,) = Scorer(items, model, options.checkpoint).asked
    inputs = tokenizer(prompts, return_tensors="pt")
    how = dict(max_new_tokens=WRITTEN, do_sample=False, pad_token_id=tokenizer.pad_token_id or 0)

    @torch.inference_mode()
    def plain() -> list[list[int]]:
        return model.generate(**inputs, **how)[:, LENGTH:].tolist()

    ours = lambda: [written.tokens for _, written in sorted(asked.question(model))]
    cut = lambda row: [token for at, token in enumerate(row) if not asked.question.end & set(row[: at + 1])]
    same = sum(tuple(cut(row)) == found for row, found in zip(plain(), ours())) / len(prompts)
    times = alternating({"generate": plain, "merge3": ours}, options.repeats)
    t = {name: median(taken) for name, taken in times.items()}
    parameters = sum(p.numel() for p in model.parameters())
    ends = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    head = ends[1].numel()
    body = parameters - sum(weight.numel() for weight in set(ends))  # one, where they are tied
    rate, weight = matrix_rate(), torch.ones(64 * 2**20)
    read = weight.nbytes / median(seconds(weight.sum, 9, 2))
    prefill = PROMPTS * 2 * (body * LENGTH + head) / rate
    step = max(PROMPTS * 2 * (body + head) / rate, (body + head) * 4 / read)
    floor = prefill + (WRITTEN - 1) * step
    rows = [
        ["transformers' `generate`", f"{t['generate']:.2f}", "", f"{t['generate'] / floor:.2f}"],
        ["merge3", f"{t['merge3']:.2f}", f"**{t['generate'] / t['merge3']:.2f}x**", f"{t['merge3'] / floor:.2f}"],
        [f"floor: prompts {prefill:.2f}, {WRITTEN - 1} steps of {step:.3f}", f"{floor:.2f}", "", ""],
    ]
    title = f"{PROMPTS} prompts of {LENGTH} tokens, {WRITTEN} written to each, {parameters / 1e6:.0f} M parameters"
    text = table(f"{title}, float32", ["", "s", "faster", "of the floor"], rows)
    text += (
        f"\n\n{100 * same:.0f} % of the texts are the same. A step reads {(body + head) * 4 / 1e9:.2f} GB of weights "
        f"({read / 1e9:.0f} GB/s), and takes {2 * (body + head) / 1e6:.0f} million operations a token "
        f"({rate / 1e9:.0f} GFLOP/s)."
    )
    report("generation", text, {"seconds": t, "times": times, "floor": floor, "same": same}, options.save)


if __name__ == "__main__":
    main()
