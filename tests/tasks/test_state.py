"""Batches and shared beginnings give what every item gives alone, unpadded: of every family that writes, and of models
that keep something else than keys and values of all tokens (states, windows)."""

import warnings

import numpy as np
import pytest
import torch

from merge3.tasks import Item
from merge3.tasks.kinds import KINDS
from merge3.tasks.likelihoods import PlainRows, SharedRows
from merge3.tasks.lm import LM
from merge3.tasks.prompts import Reader
from merge3.tasks.state import State, state
from tests.families import FAMILIES, walked

COMMON = dict(
    vocab_size=62,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    head_dim=8,
    eos_token_id=1,
    pad_token_id=0,
    bos_token_id=2,
)
STATES = {
    "mamba2": dict(state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=8),
    "lfm2": dict(layer_types=["conv", "full_attention"], block_multiple_of=8),
    "qwen3_next": dict(
        layer_types=["linear_attention", "full_attention"], linear_num_value_heads=4, linear_num_key_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, shared_expert_intermediate_size=16,
    ),
}  # fmt: skip
WINDOWS = {"Mistral", "Gemma 2", "Gemma 3"}
RECURRENT = {*STATES, "Mamba", "Jamba", "Falcon-H1", "Bamba"}
CAUSAL = [name for name, f in FAMILIES.items() if f.auto in ("AutoModelForCausalLM", "AutoModelForImageTextToText")]


def words(rng, count):
    return " ".join(f"w{rng.integers(60)}" for _ in range(count))


def made(name):
    """A random model that is not shy: its answers differ from item to item."""
    import transformers

    torch.manual_seed(4)
    if name in FAMILIES:
        family = FAMILIES[name]
        kind, auto, settings = family.kind, family.auto, family.settings
    else:
        kind, auto, settings = name, "AutoModelForCausalLM", COMMON | STATES[name]
    config = transformers.AutoConfig.for_model(kind, **settings)
    model = getattr(transformers, auto).from_config(config).eval()
    for name, p in model.named_parameters():
        if p.dim() > 1 and "A_log" not in name:
            p.data.mul_(4.0)
    return model


def requests(tokenizer, kind, prefix):
    rng = np.random.default_rng(prefix)
    before, items = words(rng, prefix), []
    for i in range(7):
        prompt = f"{before} {words(rng, 1 + i % 3)}".strip()
        if kind == "choice":
            items.append(Item(f"{i}", "t", kind, prompt, 0, (words(rng, 1 + i % 3), words(rng, 2))))
        else:
            items.append(Item(f"{i}", "t", kind, prompt, ("x",), metric="exact", max_tokens=2 + i % 4))
    return [KINDS[kind].request(item, Reader(tokenizer)) for item in items]


@torch.no_grad()
def plainly(model, request):
    """Log-likelihoods, each choice in a forward of its own."""
    sums = []
    for choice in request.choices:
        ids = torch.tensor([[*request.tokens, *choice]])
        log_p = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
        at = range(len(request.tokens) - 1, ids.shape[1] - 1)
        sums.append(sum(float(log_p[i, token]) for i, token in zip(at, choice)))
    return torch.tensor(sums, dtype=torch.float64)


@pytest.mark.parametrize("prefix", [0, 12])
@pytest.mark.parametrize("kind", walked([*CAUSAL, *STATES]))
def test_batches_give_what_items_give_alone(world, kind, prefix):
    _, tokenizer, _ = world
    model = made(kind)
    assert state(model) == State(kind not in RECURRENT, window=6 if kind in WINDOWS else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that choices get rows of their own, which is slower
        asked = requests(tokenizer, "choice", prefix)
        question = LM(model, tokenizer).loglikelihoods(asked)
    # Within its window a layer sees all, so that a mask can say what each token sees.
    plain = kind in RECURRENT or (kind in WINDOWS and prefix)
    assert type(question) is (PlainRows if plain else SharedRows)
    for index, found in question(model):
        assert torch.allclose(found.sums.double(), plainly(model, asked[index]), atol=1e-3)
    starts = requests(tokenizer, "generate", prefix)
    lm = LM(model, tokenizer, batch_tokens=64)
    written = dict(lm.generate(starts)(model))
    lengths = set()
    for index, start in enumerate(starts):
        ids = torch.tensor([start.tokens])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=start.max_tokens, do_sample=False)
        new = [token for token in out[0, len(start.tokens) :].tolist() if token not in lm.end]
        assert list(written[index].tokens) == new, index
        lengths.add(len(new))
    assert len(lengths) > 1
