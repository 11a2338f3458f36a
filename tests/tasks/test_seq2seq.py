"""Encoder-decoder models answer as a plain loop over transformers has them answer, one item at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from merge3.errors import ItemsError
from merge3.tasks import Item, LogitsError, Scorer
from merge3.tasks.fit import fit_items
from merge3.tasks.kinds import KINDS
from merge3.tasks.lm import LM
from merge3.tasks.prompts import Reader
from merge3.tasks.seq2seq import PairedRows

SIZES = {
    "t5": dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0),
    "bart": dict(
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
        bos_token_id=2,
        decoder_start_token_id=1,
        forced_eos_token_id=None,
    ),
}


@pytest.fixture(scope="module", params=SIZES)
def pair(request):
    """A random model with an encoder and a decoder, sharp enough to write more than one word."""
    import transformers

    torch.manual_seed(3)
    common = dict(vocab_size=62, eos_token_id=1, pad_token_id=0)
    config = transformers.AutoConfig.for_model(request.param, **SIZES[request.param], **common)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    for p in model.parameters():
        p.data.add_(torch.randn(p.shape) * 0.3)
    return model


def words(rng, count):
    return " ".join(f"w{rng.integers(60)}" for _ in range(count))


def choice_items(longest=3):
    rng = np.random.default_rng(longest)
    items = []
    for i in range(11):
        choices = tuple(words(rng, 1 + (i + j) % longest) for j in range(3 + i % 2))
        items.append(Item(f"c{i}", "c", "choice", words(rng, 1 + i % 7), i % 3, choices, ("acc", "acc_norm")[i % 2]))
    return items


def generate_items():
    rng = np.random.default_rng(5)
    prefix = words(rng, 12)  # a beginning that all share is read with each of them: an encoder looks both ways
    return [
        Item(f"g{i}", "g", "generate", f"{prefix} {words(rng, 1 + i % 6)}", ("x",), "", "exact", None, 3 + i % 5)
        for i in range(9)
    ]


def requests(items, tokenizer):
    return [KINDS[item.kind].request(item, Reader(tokenizer, apart=True)) for item in items]


@torch.no_grad()
def plainly(model, tokenizer, prompt, choice):
    """The log-likelihood of a choice: its tokens as labels."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    labels = torch.tensor([tokenizer(choice, add_special_tokens=False)["input_ids"]])
    log_p = model(input_ids=ids, labels=labels).logits.double().log_softmax(-1)
    return float(log_p.gather(-1, labels[..., None]).sum())


@pytest.mark.parametrize("longest", [1, 3])
@pytest.mark.parametrize("batch_tokens", [30, 4096])
def test_choices_match_a_plain_loop(world, pair, longest, batch_tokens):
    folder, tokenizer, _ = world
    items = choice_items(longest)
    question = LM(pair, tokenizer, batch_tokens).loglikelihoods(requests(items, tokenizer))
    assert type(question) is PairedRows and (len(question.batches) > 1) == (batch_tokens == 30)
    found, right = dict(question(pair)), []
    assert sorted(found) == list(range(len(items)))
    for i, item in enumerate(items):
        expected = torch.tensor([plainly(pair, tokenizer, item.prompt, choice) for choice in item.choices])
        assert torch.allclose(found[i].sums, expected, atol=2e-4)
        assert found[i].lengths.tolist() == [len(choice.split()) for choice in item.choices]
        values = expected / found[i].lengths if item.metric == "acc_norm" else expected
        right.append(float(int(values.argmax()) == item.answer))
    assert Scorer(items, pair, folder).score(pair).tolist() == right and 0 < sum(right) < len(right)


@pytest.mark.parametrize("batch_tokens", [60, 4096])
def test_generation_matches_transformers(world, pair, batch_tokens):
    _, tokenizer, _ = world
    items = generate_items()
    found = dict(LM(pair, tokenizer, batch_tokens).generate(requests(items, tokenizer))(pair))
    assert sorted(found) == list(range(len(items)))
    lengths = set()
    for i, item in enumerate(items):
        ids = torch.tensor([tokenizer(item.prompt)["input_ids"]])
        out = pair.generate(ids, max_new_tokens=item.max_tokens, do_sample=False, num_beams=1)
        new = [token for token in out[0, 1:].tolist() if token != tokenizer.eos_token_id]
        assert list(found[i].tokens) == new
        assert found[i].text == tokenizer.decode(new, skip_special_tokens=True)
        lengths.add(len(new))
    assert len(lengths) > 1  # rows have left the batch


def test_a_language_that_has_to_come_first_does(world, pair):
    _, tokenizer, _ = world
    item = generate_items()[3]
    ids = torch.tensor([tokenizer(item.prompt)["input_ids"]])
    before = pair.generation_config.forced_bos_token_id
    pair.generation_config.forced_bos_token_id = 7
    try:
        ((_, found),) = LM(pair, tokenizer).generate(requests([item], tokenizer))(pair)
        out = pair.generate(ids, max_new_tokens=item.max_tokens, do_sample=False, num_beams=1)
    finally:
        pair.generation_config.forced_bos_token_id = before
    assert found.tokens[0] == 7 and list(found.tokens) == [t for t in out[0, 1:].tolist() if t != 1]


@pytest.mark.parametrize("items", [choice_items(1), choice_items(3), generate_items()], ids=["one", "long", "written"])
def test_no_number_is_no_answer(world, pair, items):
    import copy

    folder, _, _ = world
    broken = copy.deepcopy(pair)
    scorer = Scorer(items, broken, folder)
    broken.get_input_embeddings().weight.data.fill_(torch.nan)
    with pytest.raises(LogitsError, match="NaN or infinite here"):
        scorer.score(broken)


def test_prompts_and_answers_have_positions_of_their_own(world, pair):
    folder, tokenizer, _ = world
    rng = np.random.default_rng(0)
    long, limit = words(rng, 60), 64 if pair.config.model_type == "bart" else None
    asked = [Item("g", "g", "generate", long, ("x",), "", "exact", None, 60)]
    Scorer(asked, pair, folder).score(pair)  # 120 in all
    asked = [replace(asked[0], prompt=words(rng, 70))]
    if limit is None:
        Scorer(asked, pair, folder).score(pair)
        return
    with pytest.raises(ItemsError, match="prompt of 70 tokens; expected at most 64"):
        Scorer(asked, pair, folder)
    (item,) = fit_items(asked, tokenizer, limit, "truncate_left", apart=True).items
    assert item.prompt.split() == asked[0].prompt.split()[-64:]
    Scorer([item], pair, folder).score(pair)


def test_what_writes_nothing_is_not_asked_to(world):
    import transformers

    folder, _, _ = world
    sizes = dict(vocab_size=62, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    for name in ("BertModel", "BertForMaskedLM", "BertForTokenClassification"):
        model = getattr(transformers, name)(transformers.BertConfig(**sizes))
        for item in (choice_items()[0], generate_items()[0]):
            with pytest.raises(ItemsError, match=rf"kind '{item.kind}' for a {name}; expected .* for language models"):
                Scorer([item], model, folder)
        item = Item("k", "k", "classify", "w1", 0)
        with pytest.raises(ItemsError, match=rf"kind 'classify' for a {name}"):
            Scorer([item], model, folder)
