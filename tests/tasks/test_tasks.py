"""Items, prompts and scoring, each against a plain transformers loop on real models."""

import json

import numpy as np
import pytest
import torch

from merge3.errors import ItemsError
from merge3.tasks import Item, Scorer, read_items, split_heldout
from merge3.tasks.choice import ChoiceScorer, PlainChoiceScorer
from merge3.tasks.generate import GenerateScorer, correct, cut
from merge3.tasks.prompts import encode


def words(rng, count):
    return " ".join(f"w{rng.integers(60)}" for _ in range(count))


def choice_items(prefix_words, count=17):
    rng = np.random.default_rng(prefix_words)
    prefix = words(rng, prefix_words)
    return [
        Item(f"c{i}", "c", "choice", f"{prefix} {words(rng, 1 + i % 5)}".strip(), int(rng.integers(3)),
             tuple(words(rng, 1 + (i + j) % 3) for j in range(3)), "acc_norm" if i % 2 else "acc")
        for i in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("prefix_words", [0, 20])
def test_choices_match_a_plain_loop(world, name, prefix_words):
    folder, tokenizer, models = world
    items = choice_items(prefix_words)
    (group,) = encode(items, tokenizer, "choice")
    assert bool(group.prefix) == (prefix_words > 0)
    for batch_tokens in (64, 4096):
        shared = ChoiceScorer(group, "cpu", torch.float32, batch_tokens)
        plain = PlainChoiceScorer(group, "cpu", torch.float32, batch_tokens)
        expected = {i: v for i, _, v in plain.loglikelihoods(models[name])}
        for index, _, values in shared.loglikelihoods(models[name]):
            assert torch.allclose(values, expected[index], atol=2e-4)
    scorer = Scorer(items, models[name], folder)
    assert type(scorer.scorers[0]) is ChoiceScorer
    assert scorer.score(models[name]).tolist() == [float(expected[i].argmax() == item.answer) for i, item in enumerate(items)]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("prefix_words", [0, 15])
def test_generation_matches_transformers(world, name, prefix_words):
    folder, tokenizer, models = world
    rng = np.random.default_rng(prefix_words)
    prefix = words(rng, prefix_words)
    items = [
        Item(f"g{i}", "g", "generate", f"{prefix} {words(rng, 1 + i % 6)}".strip(), ("x",), metric="exact", max_tokens=3 + i % 8)
        for i in range(13)
    ]
    (group,) = encode(items, tokenizer, "generate")
    scorer = GenerateScorer(group, "cpu", tokenizer, 200, (1,))
    for prompt, text in scorer.answers(models[name]):
        ids = torch.tensor([tokenizer(prompt.item.prompt)["input_ids"]])
        out = models[name].generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=prompt.item.max_tokens, do_sample=False)
        assert text == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_generation_stops_at_a_stop_string(world):
    folder, tokenizer, models = world
    item = Item("g", "g", "generate", "w1 w2", ("x",), metric="exact", max_tokens=12)
    (group,) = encode([item], tokenizer, "generate")
    ((_, text),) = GenerateScorer(group, "cpu", tokenizer, 200, ()).answers(models["llama"])
    third = text.split()[2]
    stopped = Item("g", "g", "generate", "w1 w2", ("x",), metric="exact", max_tokens=12, stop=(third,))
    (group,) = encode([stopped], tokenizer, "generate")
    ((_, short),) = GenerateScorer(group, "cpu", tokenizer, 200, ()).answers(models["llama"])
    assert short == cut(text, (third,))


def test_metrics():
    def item(metric, *answers):
        return Item("i", "t", "generate", "p", answers, metric=metric)

    assert correct(item("exact", "a b"), " a b\n") and not correct(item("exact", "a"), "a b")
    assert correct(item("number", "1234.5"), "so it is 1,234.50.") and not correct(item("number", "4"), "4 or 5")
    assert correct(item("number", "-3"), "= -3") and not correct(item("number", "3"), "none")
    assert correct(item("regex", r"^yes\b"), "yes!") and not correct(item("regex", r"^yes\b"), "yesterday")
    with pytest.raises(ItemsError, match="its pattern .* takes more than 1.0 s on 200 characters"):
        correct(item("regex", r"(.*a){25}b"), "a" * 200)


def test_text_classification(world, tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    folder, tokenizer, _ = world
    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=62, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                         pad_token_id=0, num_labels=3, id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2})  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()
    rng = np.random.default_rng(0)
    items = [Item(f"k{i}", "k", "classify", words(rng, 1 + i % 7), ("a", 1, "c")[i % 3]) for i in range(20)]
    expected = []
    for item in items:
        ids = torch.tensor([tokenizer(item.prompt)["input_ids"]])
        label = item.answer if isinstance(item.answer, int) else config.label2id[item.answer]
        expected.append(float(model(input_ids=ids).logits.argmax() == label))
    assert Scorer(items, model, folder).score(model).tolist() == expected
    with pytest.raises(ItemsError, match="expected one of a, b, c"):
        Scorer([Item("x", "k", "classify", "w1", "d")], model, folder)
    with pytest.raises(ItemsError, match="kind 'choice' for a LlamaForSequenceClassification"):
        Scorer(choice_items(0, 1), model, folder)


def test_image_classification(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    model = ViTForImageClassification(
        ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4, num_labels=4)
    ).eval()
    lines, pixels = [], []
    for i in range(6):
        array = np.random.default_rng(i).standard_normal((3, 8, 8)).astype(np.float32)
        np.save(tmp_path / f"{i}.npy", array)
        pixels.append(torch.from_numpy(array))
        lines.append(json.dumps({"kind": "classify", "image": f"{i}.npy", "answer": i % 4}))
    (tmp_path / "items.jsonl").write_text("\n".join(lines))
    expected = model(pixel_values=torch.stack(pixels)).logits.argmax(-1) == torch.arange(6) % 4
    assert Scorer(read_items(tmp_path / "items.jsonl"), model, tmp_path).score(model).tolist() == expected.double().tolist()


def test_heldout_split_is_disjoint_stable_and_by_task():
    items = [Item(f"{t}{i}", t, "generate", "p", ("a",)) for t in "ab" for i in range(50)]
    search, heldout = split_heldout(items, 0.3, seed=1)
    assert len(heldout) == 30 and not {i.id for i in search} & {i.id for i in heldout}
    assert split_heldout(list(reversed(items)), 0.3, seed=1)[1] == list(reversed(heldout))
    assert split_heldout(items, 0.3, seed=2)[1] != heldout
    assert split_heldout(items, 0.0, seed=1) == (items, [])
    with pytest.raises(ItemsError, match="task 'a': 1 items, of which a held-out fraction of 0.7 takes 1"):
        split_heldout(items[:1], 0.7, seed=0)
