"""How much faster is scoring than a plain batched transformers loop, with the same answers?

500 choice items that share a few-shot prefix and 200 generated answers of up to 16 tokens, on a 20 M
parameter Llama. python benchmarks/score.py [--save]
"""

import argparse
import tempfile
import time

import numpy as np
import torch
from measure import matrix_rate, median, report, table
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from merge3.tasks import Item, Scorer
from merge3.tasks.likelihoods import SharedRows

WORDS = 8000


def world():
    """A 20 M parameter Llama, its tokenizer and its folder."""
    raw = Tokenizer(
        WordLevel(
            {w: i for i, w in enumerate(["<pad>", "</s>", *(f"w{i}" for i in range(WORDS - 2))])}, unk_token="<pad>"
        )
    )
    raw.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<pad>")
    folder = tempfile.mkdtemp()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=6,
        max_position_embeddings=1024,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for p in model.parameters():
        p.mul_(2.0)  # answers of an initialised model are near ties; these are not
    return model, tokenizer, folder


def make_items(rng) -> tuple[list[Item], list[Item]]:
    def words(n):
        return " ".join(f"w{rng.integers(WORDS - 2)}" for _ in range(n))

    shots = words(160)  # five worked examples
    choices = [
        Item(
            f"c{i}",
            "choice",
            "choice",
            f"{shots} {words(int(rng.integers(12, 28)))}",
            0,
            tuple(words(int(rng.integers(1, 5))) for _ in range(4)),
            "acc_norm",
        )
        for i in range(500)
    ]
    generated = [
        Item(
            f"g{i}",
            "generate",
            "generate",
            f"{shots} {words(int(rng.integers(12, 28)))}",
            ("x",),
            metric="exact",
            max_tokens=16,
        )
        for i in range(200)
    ]
    return choices, generated


@torch.inference_mode()
def plain_choices(model, tokenizer, items, rows=32) -> np.ndarray:
    """Every prompt + choice as a row of its own, sorted by length, right padded: the usual loop."""
    work = []
    for i, item in enumerate(items):
        prompt = tokenizer(item.prompt)["input_ids"]
        work += [
            (i, j, prompt, tokenizer(item.prompt + " " + choice)["input_ids"]) for j, choice in enumerate(item.choices)
        ]
    work.sort(key=lambda w: len(w[3]))
    scores = np.zeros((len(items), 4))
    for start in range(0, len(work), rows):
        batch = work[start : start + rows]
        padded = tokenizer.pad({"input_ids": [w[3] for w in batch]}, return_tensors="pt")
        log_p = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits.log_softmax(-1)
        for row, (i, j, prompt, whole) in zip(log_p, batch):
            at = torch.arange(len(prompt), len(whole))
            scores[i, j] = row[at - 1, torch.tensor(whole)[at]].mean()
    return scores


@torch.inference_mode()
def plain_generate(model, tokenizer, items, rows=32) -> list[str]:
    """model.generate over length-sorted, left padded batches."""
    tokenizer.padding_side = "left"
    order = sorted(range(len(items)), key=lambda i: len(items[i].prompt))
    texts = [""] * len(items)
    for start in range(0, len(order), rows):
        batch = order[start : start + rows]
        inputs = tokenizer(
            [items[i].prompt for i in batch], return_tensors="pt", padding=True, return_token_type_ids=False
        )
        out = model.generate(**inputs, max_new_tokens=16, do_sample=False, pad_token_id=0)
        for i, row in zip(batch, out[:, inputs["input_ids"].shape[1] :]):
            texts[i] = tokenizer.decode(row, skip_special_tokens=True)
    tokenizer.padding_side = "right"
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    model, tokenizer, folder = world()
    parameters = sum(p.numel() for p in model.parameters())
    choices, generated = make_items(np.random.default_rng(0))
    spaced = [Item(**(vars(i) | {"choices": tuple(" " + c for c in i.choices)})) for i in choices]
    ours = [asked.question for asked in Scorer([*spaced, *generated], model, folder).asked]
    assert type(ours[0]) is SharedRows and len(ours) == 2, ours
    times = {"ours choice": [], "plain choice": [], "ours generate": [], "plain generate": []}
    for _ in range(options.repeats):
        for name, act in (
            ("ours choice", lambda: dict(ours[0](model))),
            ("plain choice", lambda: plain_choices(model, tokenizer, choices)),
            ("ours generate", lambda: dict(ours[1](model))),
            ("plain generate", lambda: plain_generate(model, tokenizer, generated)),
        ):
            start = time.perf_counter()
            result = act()
            times[name].append(time.perf_counter() - start)
            if name == "ours choice":
                found = {i: (likelihoods.sums / likelihoods.lengths).numpy() for i, likelihoods in result.items()}
            elif name == "plain choice":
                worst = max(float(np.abs(found[i] - row).max()) for i, row in enumerate(result))
                same = np.mean([found[i].argmax() == row.argmax() for i, row in enumerate(result)])
            elif name == "ours generate":
                texts = {index: written.text for index, written in result.items()}
            else:
                equal = np.mean([texts[i] == text for i, text in enumerate(result)])
    t = {name: median(values) for name, values in times.items()}
    both = (t["plain choice"] + t["plain generate"]) / (t["ours choice"] + t["ours generate"])
    rate = matrix_rate()
    tokens = sum(b.inputs["input_ids"].numel() for b in ours[0].batches) + len(ours[0].prefix)
    head = sum(len(b.places) for b in ours[0].batches)
    body = parameters - 2 * WORDS * 384
    work = 2 * body * tokens + 2 * WORDS * 384 * head
    rows = [
        [
            "500 choice items",
            f"{t['plain choice']:.2f}",
            f"{t['ours choice']:.2f}",
            f"**{t['plain choice'] / t['ours choice']:.1f}x**",
            f"{100 * same:.1f} % (log-likelihoods within {worst:.0e})",
        ],
        [
            "200 generated answers",
            f"{t['plain generate']:.2f}",
            f"{t['ours generate']:.2f}",
            f"**{t['plain generate'] / t['ours generate']:.1f}x**",
            f"{100 * equal:.1f} %",
        ],
        [
            "all 700",
            f"{t['plain choice'] + t['plain generate']:.2f}",
            f"{t['ours choice'] + t['ours generate']:.2f}",
            f"**{both:.1f}x**",
            "",
        ],
    ]
    share = work / t["ours choice"] / rate
    text = table(
        f"Scoring on a {parameters / 1e6:.0f} M parameter Llama",
        ["", "plain loop s", "merge3 s", "faster", "same answers"],
        rows,
    )
    text += (
        f"\n\nChoice scoring runs at {100 * share:.0f} % of a large matrix product's rate ({rate / 1e9:.0f} GFLOP/s)."
    )
    report(
        "score",
        text,
        {"seconds": t, "ratio": both, "share_of_matrix_rate": share, "same_choice": same, "same_text": equal},
        options.save,
    )


if __name__ == "__main__":
    main()
