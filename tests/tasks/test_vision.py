"""Items with a picture in the prompt: what is asked, item by item, is transformers' own forward and generate."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from merge3.errors import ItemsError
from merge3.tasks import Scorer, fit_to_model, read_items
from merge3.tasks.eyes import Eyes, Said, eyes_of
from merge3.tasks.lm import LM
from merge3.tasks.requests import Choices, Start
from merge3.tasks.vision import SeenChoices, SeenContinuations
from tests.vlms import WORDS, make_sights, noisy, qwen
from tests.worlds import shared

AS_IT_IS = dict(do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False, do_convert_rgb=False)


@pytest.fixture(scope="module")
def sights():
    yield from shared(make_sights)


@pytest.fixture
def items(sights):
    return read_items(sights / "items.jsonl")


@pytest.fixture
def model(sights):
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(sights / "base").eval().requires_grad_(False)


@pytest.fixture(scope="module")
def processor(sights):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(sights / "base")


def prepared(item, processor, text):
    """A prompt and its picture as somebody would prepare them by hand."""
    from PIL import Image

    if item.image.endswith(".npy"):
        image, more = torch.from_numpy(np.load(item.image)), {"images_kwargs": AS_IT_IS}
    else:
        image, more = Image.open(item.image).convert("RGB"), {}
    return processor(images=[image], text=[text], return_tensors="pt", **more)


def likelihood(model, inputs, more, **image):
    """Of the tokens `more` after a prompt, in a row of their own."""
    ids = torch.cat([inputs["input_ids"], torch.tensor([more])], 1)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **image).logits[0]
    start = inputs["input_ids"].shape[1] - 1
    return sum(float(logits[start + i].log_softmax(-1)[token]) for i, token in enumerate(more))


def check(scorer, model, processor, text_of):
    seen = set()
    for asked in scorer.asked:
        for at, found in asked.question(model):
            item = asked.items[at]
            seen.add(item.id)
            inputs = prepared(item, processor, text_of(item))
            if item.kind == "generate":
                written = model.generate(**inputs, do_sample=False, max_new_tokens=item.max_tokens)
                tokens = written[0, inputs["input_ids"].shape[1] :].tolist()
                assert found.tokens == tuple(t for t in tokens if t != 2), item.id
            else:
                ids = [[WORDS.index(word) for word in choice.split()] for choice in item.choices]
                expected = [likelihood(model, inputs, more, pixel_values=inputs["pixel_values"]) for more in ids]
                assert found.sums.tolist() == pytest.approx(expected, abs=1e-5), item.id
    assert len(seen) == len(scorer.items)


@pytest.mark.parametrize("batch_tokens", [4096, 1])
def test_it_is_what_transformers_says_item_by_item(sights, items, model, processor, batch_tokens):
    scorer = Scorer(items, model, sights / "base", batch_tokens=batch_tokens)
    text = lambda item: item.prompt if "<image>" in item.prompt else f"<image>\n{item.prompt}"
    check(scorer, model, processor, text)
    before = scorer.score(model)
    noisy(model.model.language_model, seed=5)
    check(scorer, model, processor, text)
    noisy(model.model.vision_tower, seed=6)  # what the eyes said before does not hold any more
    check(scorer, model, processor, text)
    assert before.shape == (12,) and set(before) <= {0.0, 1.0}


def test_a_chat_template_writes_the_image_itself(sights, items, model, processor):
    text = lambda item: (
        "how "
        + item.prompt.replace("<image>", "<image>\n").join(["" if "<image>" in item.prompt else "<image>\n", " which "])
    )
    by_hand = lambda item: text(item).removeprefix("<s>")
    scorer = Scorer(items, model, sights / "base", chat=True)
    for asked in scorer.asked:
        assert all(0 <= asked.kind.response(asked.items[at], found) <= 1 for at, found in asked.question(model))
    plain = [replace(item, prompt=by_hand(item)) for item in items]
    from merge3.tasks.images import seen
    from merge3.tasks.prompts import Reader

    chat = Reader(processor.tokenizer, True, sights / "base")
    for item, other in zip(items, plain):
        assert seen(item, chat)[1] == tuple(processor.tokenizer(  # the template has no start of text, so neither has it
            other.prompt.replace("<image>", "<image> " * 4), add_special_tokens=False)["input_ids"])  # fmt: skip


def test_the_eyes_are_asked_once_as_long_as_they_do_not_change(sights, items, model):
    scorer = Scorer(items, model, sights / "base")
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    scorer.score(model)
    first = len(calls)
    noisy(model.model.language_model, seed=3)
    noisy(model.lm_head, seed=3)
    scorer.score(model)
    assert first > 0 and len(calls) == first
    assert not any("language" in name or "lm_head" in name for name in eyes_of(model)._copies)
    noisy(model.model.multi_modal_projector, seed=4)
    scorer.score(model)
    assert len(calls) > first


def test_choices_with_the_same_inputs_are_asked_once(sights, items, model):
    own = [replace(item, choices=(" red", " blue", " red two"), answer=0) for item in items if item.choices][:2]
    scorer = Scorer(own, model, sights / "base")
    calls = []
    hook = model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    scorer.score(model)
    hook.remove()
    assert len(calls) == 2, "one forward for the choices of a token, one for the longer"


def test_what_is_kept_is_bounded_and_what_others_asked_goes_first(monkeypatch):
    monkeypatch.setattr("merge3.tasks.eyes.KEPT", 100)
    eyes, mine, other = Eyes(), object(), object()
    said = [Said() for _ in range(4)]
    for one, question in zip(said, (other, mine, mine, mine)):
        one.pixels = torch.zeros(10)
        eyes.hold(one, question)
    assert [one.nbytes for one in said] == [0, 40, 40, 0]


@pytest.mark.parametrize("newer", [False, True])
def test_positions_in_three_dimensions(newer):
    """Qwen-VL: rows of several lengths, pictures of several sizes, patches of all pictures in one tensor."""
    torch.manual_seed(0)
    model = qwen(newer).eval().requires_grad_(False)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    g, requests = torch.Generator().manual_seed(0), []
    for before, after, (rows, columns) in [(1, 2, (4, 4)), (3, 1, (4, 4)), (2, 5, (2, 4)), (1, 1, (4, 4))]:
        places = rows * columns // 4
        words = lambda n: torch.randint(7, 32, (n,), generator=g).tolist()
        tokens = (*words(before), 4, *[3] * places, 5, *words(after))
        pixels = torch.randn(rows * columns, 3 * 2 * 4 * 4, generator=g)
        kinds = torch.tensor([[int(t == 3) for t in tokens]])
        image = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, rows, columns]]),
                 "mm_token_type_ids": kinds}  # fmt: skip
        requests.append((tokens, image))
    choices = ((7, 8, 9), (10,))
    asked = SeenChoices([Choices(t, choices, image=image) for t, image in requests], "cpu", torch.float32, 4096)
    found = dict(asked(model))
    writing = SeenContinuations(
        [Start(t, 4, image=image) for t, image in requests], "cpu", torch.float32, _Silent(), frozenset([2]), 4096
    )
    written = dict(writing(model))
    for index, (tokens, image) in enumerate(requests):
        inputs = {"input_ids": torch.tensor([tokens]), "attention_mask": torch.ones(1, len(tokens), dtype=torch.long)}
        expected = [likelihood(model, inputs, list(more), **longer(image, len(more))) for more in choices]
        assert found[index].sums.tolist() == pytest.approx(expected, abs=1e-5)
        out = model.generate(**inputs, **image, do_sample=False, max_new_tokens=4)[0, len(tokens) :].tolist()
        assert written[index].tokens == tuple(t for t in out if t != 2)


def longer(image, tokens):
    """The same with so many text tokens more."""
    more = torch.zeros(1, tokens, dtype=torch.long)
    return image | {"mm_token_type_ids": torch.cat([image["mm_token_type_ids"], more], 1)}


class _Silent:
    """A tokenizer of which only the decoded text is asked, which nobody reads."""

    def decode(self, tokens, skip_special_tokens=True):
        return " ".join(map(str, tokens))


def test_logits_that_are_no_numbers_are_no_answer(sights, items, model):
    from merge3.tasks import LogitsError

    for kind in ("choice", "generate"):
        own = [item for item in items if item.kind == kind]
        scorer = Scorer(own, model, sights / "base")
        with torch.no_grad():
            model.lm_head.weight[4] = float("nan")
        with pytest.raises(LogitsError, match="NaN or infinite"):
            scorer.score(model)
        with torch.no_grad():
            model.lm_head.weight[4] = 0.0


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(image="nowhere.png"), "'g0npy' of task 'items': unreadable image nowhere.png"),
        (dict(image="broken.npy"), "'g0npy' of task 'items': unreadable image .*broken.npy"),
        (dict(image="large.npy"), "'g0npy' of task 'items': image .*large.npy .*the model cannot take"),
        (dict(image="flat.npy"), "'g0npy' of task 'items': image .*flat.npy "),
        (dict(prompt="<image> and <image>"), "'g0npy' of task 'items': prompt .* has several marks of an image"),
    ],
)
def test_what_cannot_be_asked_is_one_line_with_item_and_file(sights, items, model, tmp_path, change, message):
    (tmp_path / "broken.npy").write_bytes(b"no array")
    np.save(tmp_path / "large.npy", np.zeros((3, 32, 32), np.float32))
    np.save(tmp_path / "flat.npy", np.zeros(7, np.float32))
    if (tmp_path / change.get("image", "")).is_file():
        change = {"image": str(tmp_path / change["image"])}
    with pytest.raises(ItemsError, match=message) as error:
        Scorer([replace(items[0], **change), *items[1:]], model, sights / "base")
    assert "\n" not in str(error.value)


def test_a_model_without_eyes_is_told_so(sights, items):
    from transformers import AutoModelForCausalLM

    words = AutoModelForCausalLM.from_pretrained(sights / "words")
    with pytest.raises(ItemsError, match="an image for a LlamaForCausalLM; expected a vision-language model"):
        Scorer(items, words, sights / "words")


def test_without_a_processor_there_is_nothing_to_prepare_images_with(sights, items, model, tmp_path):
    folder = shutil.copytree(sights / "base", tmp_path / "base")
    (folder / "processor_config.json").unlink()
    with pytest.raises(ItemsError, match="processor"):
        Scorer(items, model, folder)


def test_texts_and_images_are_asked_in_one_run(sights, items, model):
    both = [*items, replace(items[0], id="text", image=None), replace(items[1], id="words", image=None, prompt="how")]
    together = Scorer(both, model, sights / "base").score(model)
    assert together[:12].tolist() == Scorer(items, model, sights / "base").score(model).tolist()
    alone = Scorer(both[12:], model, sights / "base").score(model)
    assert together[12:].tolist() == alone.tolist()


def test_images_count_where_items_may_be_too_long(sights, items):
    long = [replace(item, prompt=item.prompt + " how" * 70) if item.id == "g0npy" else item for item in items]
    fitted = fit_to_model(long, sights / "base", "skip")
    assert len(fitted.items) == 11 and "g0npy" in fitted.notes[0]
    cut = fit_to_model(long, sights / "base", "truncate_left").items[0]
    assert 40 < len(cut.prompt.split()) < 74
    marked = [replace(long[0], prompt="<image> " + long[0].prompt), *items[1:]]
    with pytest.raises(ItemsError, match="`<image>` stands in its prompt"):
        fit_to_model(marked, sights / "base", "truncate_left")


@pytest.mark.parametrize("newer", [False, True])
def test_texts_before_a_model_with_positions_in_three_dimensions(newer):
    torch.manual_seed(0)
    model = qwen(newer).eval().requires_grad_(False)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    lm = LM(model)
    lm.tokenizer, lm.end = _Silent(), frozenset([2])
    prompts = [(7, 8, 9), (10,), (11, 12, 13, 14, 15)]
    choices = ((7, 8, 9), (10,))
    found = dict(lm.loglikelihoods([Choices(tokens, choices) for tokens in prompts])(model))
    written = dict(lm.generate([Start(tokens, 4) for tokens in prompts])(model))
    for index, tokens in enumerate(prompts):
        inputs = {"input_ids": torch.tensor([tokens]), "attention_mask": torch.ones(1, len(tokens), dtype=torch.long)}
        expected = [likelihood(model, inputs, list(more)) for more in choices]
        assert found[index].sums.tolist() == pytest.approx(expected, abs=1e-4)
        out = model.generate(**inputs, do_sample=False, max_new_tokens=4)[0, len(tokens) :].tolist()
        assert written[index].tokens == tuple(t for t in out if t != 2)
