"""Texts that a model is shown instead of writing them: what it would have written is known, and how surely."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from merge3.errors import ItemsError
from merge3.learn.losses import LOSSES
from merge3.learn.zip_items import shown
from merge3.rpc import convert
from merge3.tasks import Item, Scorer, read_items
from merge3.tasks.fit import fit_items
from merge3.tasks.kinds import KINDS
from merge3.tasks.likelihoods import PlainRows, SharedRows
from merge3.tasks.lm import LM
from merge3.tasks.prompts import Reader
from merge3.tasks.requests import Likelihoods, Start
from tests.tasks.test_seq2seq import pair  # noqa: F401  a fixture


def words(rng, count):
    return " ".join(f"w{rng.integers(60)}" for _ in range(count))


def prompts_of(count, shared=0):
    """Random ones; shared: words that all begin with."""
    rng = np.random.default_rng(count)
    return [" ".join([*(f"w{i}" for i in range(shared)), words(rng, 1 + i % 9)]) for i in range(count)]


def asked(model, tokenizer, prompts, longest=3):
    """Of each prompt the text that the model writes, of one to `longest` tokens, and one that differs in its last word,
    as items; and whether it is the model's own."""
    starts = [Start(tuple(tokenizer(prompt)["input_ids"]), 1 + i % longest) for i, prompt in enumerate(prompts)]
    items, own = [], []
    for i, text in sorted(LM(model, tokenizer).generate(starts)(model)):
        written = tokenizer.convert_ids_to_tokens(text.tokens)
        if not written or not all(word.startswith("w") for word in written):
            continue  # end-of-text, or a token that no text shows
        other = [*written[:-1], "w7" if written[-1] != "w7" else "w8"]
        for answer, right in ((written, 1.0), (other, 0.0)):
            items.append(Item(f"{i} {right}", "t", "forced", prompts[i], (" " + " ".join(answer),), metric="exact"))
            own.append(right)
    return items, own


def plain_margin(model, tokenizer, prompt, answer):
    """Of one continuation, by a forward of its own."""
    start, tokens = tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]
    with torch.inference_mode():
        logits = model(torch.tensor([[*start, *tokens]])).logits[0, len(start) - 1 : -1].float()
    margins = []
    for row, token in zip(logits, tokens):
        others = torch.cat([row[:token], row[token + 1 :]])
        margins.append(float(row[token] - others.max()))
    return min(margins)


def sure(items):
    return [replace(item, metric="margin") for item in items]


@pytest.mark.parametrize("name,shared", [("llama", 0), ("llama", 12), ("gpt2", 0), ("gpt2", 12)])
def test_what_a_model_would_write(world, name, shared):
    """Greedy decoding says which; a plain forward says how surely."""
    folder, tokenizer, models = world
    model = models[name]
    items, own = asked(model, tokenizer, prompts_of(30, shared))
    assert len(items) > 30
    assert Scorer(items, model, folder).score(model).tolist() == own
    found = Scorer(sure(items), model, folder).score(model)
    assert ((found > 0.5) == (np.array(own) == 1)).all()
    margins = np.array([plain_margin(model, tokenizer, item.prompt, item.answer[0]) for item in items])
    assert np.allclose(found, 1 / (1 + np.exp(-margins)), atol=1e-4)


def test_of_a_decoder_with_an_encoder(world, pair):  # noqa: F811
    folder, tokenizer, _ = world
    items, own = asked(pair, tokenizer, prompts_of(30))
    assert len(items) > 20 and len({len(item.answer[0].split()) for item in items}) == 3
    assert Scorer(items, pair, folder).score(pair).tolist() == own
    found = Scorer(sure(items), pair, folder).score(pair)
    assert ((found > 0.5) == (np.array(own) == 1)).all() and len(set(found)) > len(items) // 2
    one_by_one = [Scorer([item], pair, folder).score(pair)[0] for item in sure(items)]
    assert np.allclose(found, one_by_one, atol=1e-5)


def test_of_a_decoder_that_begins_by_itself(world, pair, monkeypatch):  # noqa: F811
    monkeypatch.setattr(pair.generation_config, "forced_bos_token_id", 5)
    item = Item("i", "t", "forced", "w1 w2", (" w3",), metric="margin")
    with pytest.raises(ItemsError, match="answers shown to a .*, whose texts all begin with token 5; expected items"):
        Scorer([item], pair, world[0])


def test_the_surest_of_accepted_texts_counts(world):
    folder, tokenizer, models = world
    model = models["llama"]
    items, own = asked(model, tokenizer, prompts_of(12))
    right, wrong = items[0::2], items[1::2]
    both = [replace(a, answer=(*b.answer, *a.answer)) for a, b in zip(right, wrong)]
    assert Scorer(both, model, folder).score(model).tolist() == [1.0] * len(both)
    found = [Scorer(sure(some), model, folder).score(model) for some in (both, right, wrong)]
    assert np.allclose(found[0], np.maximum(found[1], found[2]), atol=1e-6) and (found[1] > found[2]).all()


def test_an_end_is_asked_for_where_the_text_says_it(world):
    """`w3</s>` is `w3` and then nothing more."""
    folder, tokenizer, models = world
    prompts = prompts_of(400)
    starts = [Start(tuple(tokenizer(prompt)["input_ids"]), 3) for prompt in prompts]
    ended = going_on = 0
    items, expected = [], []
    for i, text in LM(models["llama"], tokenizer).generate(starts)(models["llama"]):
        written = tokenizer.convert_ids_to_tokens(text.tokens)
        if written and all(word.startswith("w") for word in written):
            shown = (" " + " ".join(written[:2]) + "</s>",)
            items.append(Item(str(i), "t", "forced", prompts[i], shown, metric="exact"))
            expected.append(float(len(written) < 3))
            ended, going_on = ended + (len(written) < 3), going_on + (len(written) == 3)
    assert ended and going_on
    assert Scorer(items, models["llama"], folder).score(models["llama"]).tolist() == expected


def test_rows_of_every_make_agree(world):
    """Whether choices stand side by side, read a prefix where it lies, or have rows of their own."""
    _, tokenizer, models = world
    model, reader, rng = models["llama"], Reader(tokenizer), np.random.default_rng(5)
    answers = lambda: tuple(f" {words(rng, 1 + i)}" for i in range(3))
    items = [Item(str(i), "t", "forced", p, answers()) for i, p in enumerate(prompts_of(8, 10))]
    requests = [KINDS["forced"].request(item, reader) for item in items]
    prefix = requests[0].tokens[:10]
    rest = [replace(one, tokens=one.tokens[10:]) for one in requests]
    how = (prefix, rest, "cpu", torch.float32, 64)
    plain = dict(PlainRows(*how)(model))
    for rows in (SharedRows(*how), SharedRows(*how, once=True)):
        for index, found in rows(model):
            assert torch.allclose(found.margins, plain[index].margins, atol=1e-4)
            assert found.greedy.tolist() == plain[index].greedy.tolist()
    silent = [replace(one, margins=False, greedy=False) for one in rest]
    assert all(f.margins is None and f.greedy is None for _, f in SharedRows(prefix, silent, *how[2:])(model))


def test_half_precision_has_ties(world):
    """Where two tokens are as likely, greedy decoding writes one of them, and neither is ahead."""
    folder, tokenizer, models = world
    model = type(models["llama"])(models["llama"].config)
    model.load_state_dict(models["llama"].state_dict())
    model = model.to(torch.bfloat16).eval()
    with torch.no_grad():
        model.lm_head.weight[32:62] = model.lm_head.weight[2:32].clone()
    items, own = asked(model, tokenizer, prompts_of(40))
    found = Scorer(sure(items), model, folder).score(model)
    exact = Scorer(items, model, folder).score(model)
    assert (found[exact == 1] >= 0.5).all() and (found[exact == 0] <= 0.5).all() and (found == 0.5).any()


@pytest.mark.parametrize(
    "margins,expected",
    [([0.0], 0.5), ([-1e4, 2.0], 1 / (1 + np.exp(-2.0))), ([-np.inf], 0.0), ([np.inf], 1.0), ([-1e4], 0.0)],
)
def test_odds(margins, expected):
    found = Likelihoods(torch.zeros(len(margins)), torch.ones(len(margins)), margins=torch.tensor(margins))
    assert KINDS["forced"].metrics["margin"](Item("i", "t", "forced", "p", ("a",)), found) == pytest.approx(expected)


def test_files_and_messages(world, tmp_path):
    folder, tokenizer, models = world
    good = {"kind": "forced", "prompt": "w1 w2", "answer": " w3"}
    write = lambda *rows: (tmp_path / "t.jsonl").write_text("".join(json.dumps(good | row) + "\n" for row in rows))
    write({}, {"answer": [" w3", " w4"], "metric": "margin"}, {"prompt": " ".join(["w1"] * 128)})
    items = read_items(tmp_path / "t.jsonl")
    assert [item.metric for item in items] == ["exact", "margin", "exact"] and items[1].answer == (" w3", " w4")
    assert all(convert.item_from(convert.item_to(item), "item 0") == item for item in items)
    fitted = fit_items(items, tokenizer, 128, "skip")
    assert fitted.items == items[:2] and fitted.skipped == {"t": 1}
    with pytest.raises(ItemsError, match="line 3: .*prompt of 128 tokens.*expected at most 128"):
        Scorer(items, models["llama"], folder)
    for row, message in (
        ({"answer": ""}, "line 1: answer is ''; expected a text, as it follows the prompt, or a list of them"),
        ({"answer": 42}, "line 1: answer is 42; expected a text"),
        ({"answer": [" w3", ""]}, "line 1: answer is .*; expected a text"),
        ({"metric": "number"}, "line 1: metric is 'number'; expected exact, margin"),
    ):
        write(row)
        with pytest.raises(ItemsError, match=message):
            read_items(tmp_path / "t.jsonl")
    write({"answer": "  "})
    with pytest.raises(ItemsError, match="line 1: item 't-1' of task 't': answer '  ' without tokens"):
        Scorer(read_items(tmp_path / "t.jsonl"), models["llama"], folder)
    write({"image": "x.npy"})
    with pytest.raises(ItemsError, match="an image, and kind 'forced'; expected a kind that reads images"):
        Scorer(read_items(tmp_path / "t.jsonl"), models["llama"], folder)


def test_answers_are_not_taken_for_rivals_or_read_as_prompts(world):
    """By what learns from items: accepted texts are no distribution, and a question is shown without its answer."""
    folder, tokenizer, models = world
    item = Item("i", "t", "forced", "w1 w2", (" w3", " w4 w5"))
    reader = Reader(tokenizer)
    request = KINDS["forced"].request(item, reader)
    kinds = "an item of kind choice or generate or classify$"
    with pytest.raises(ItemsError, match=f"kind 'forced', which gives no distribution to learn from; expected {kinds}"):
        LOSSES["entropy"].ask(item, request, reader, None)
    with pytest.raises(ItemsError, match=f"kind 'forced', which has no label to learn; expected {kinds}"):
        LOSSES["cross_entropy"].ask(item, request, reader, None)
    (batch,) = shown([item], [models["llama"]] * 2, [folder, folder])
    assert batch.inputs["input_ids"].tolist() == [tokenizer("w1 w2")["input_ids"]]
