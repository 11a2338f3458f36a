"""lm-eval tasks of every output type, as YAML folders over files, and models with a tokenizer that merges pieces."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import torch
import yaml

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}"
    "{% if not loop.last or add_generation_prompt %}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TEXT = "the red cat saw one small bird near an old green house and nine white dogs ran over two long hills"
WORDS = TEXT.split()
COUNT = 12  # documents of every task

PYTHON = '''
import random
from difflib import SequenceMatcher


def likeness(doc, results):
    """How much of the text is right: a value of its own for every document."""
    return {"likeness": SequenceMatcher(None, results[0], doc["last"]).ratio()}


def shuffled(documents):
    """Choices in an order that is drawn when they are first loaded, as some tasks of lm-eval have them."""

    def change(doc):
        order = random.sample(range(3), 3)
        return {"options": [doc["options"][i] for i in order], "label": order.index(doc["label"])}

    return documents.map(change)
'''


def make_models(folder: Path) -> None:
    """base and e0, e1: Llamas of 128 positions that have seen nothing, with a byte-pair tokenizer and a template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    rng = random.Random(0)
    text = [" ".join(rng.choices(WORDS, k=20)) + ".\nQuestion: what? Answer: it" for _ in range(200)]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    sizes = dict(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    raw.train_from_iterator(text, trainers.BpeTrainer(**sizes, show_progress=False))
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=TEMPLATE
    )
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=96,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=1,
        bos_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for number, name in enumerate(("base", "e0", "e1")):
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for key, p in model.named_parameters():
                p.copy_(start[key] + torch.randn(p.shape, generator=generator) * 0.1 * bool(number))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def make_tasks(folder: Path) -> None:
    """A folder for --task-path: h_choice, h_plural, h_inputs, h_words, h_pages, h_texts, h_like, h_shuffled; group
    h_both."""
    rng = random.Random(1)
    for split, count in (("train", 8), ("test", COUNT)):
        lines = []
        for number in range(count):
            words = rng.choices(WORDS, k=8)
            choices = rng.sample(WORDS, 4)
            options = [choices[0], choices[1] + " " + choices[2], choices[3] + "s"]
            doc = {"id": number, "text": " ".join(words[:-1]), "last": words[-1]}
            doc |= {"options": options, "label": number % 3}
            doc["pages"] = " ".join(rng.choices(WORDS, k=30 if number % 4 else 400)) + "."
            doc["start"] = [f"{' '.join(words[:4])} {option}" for option in options]
            lines.append(json.dumps(doc))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "code.py").write_text(PYTHON)
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {split: str(folder / f"{split}.jsonl") for split in ("train", "test")},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "training_split": "train",
        "fewshot_split": "train",
    }
    mean = lambda *names: [{"metric": n, "aggregation": "mean", "higher_is_better": True} for n in names]
    choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{text}} what?\nAnswer:",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "{{label}}",
        "metric_list": mean("acc", "acc_norm", "acc_mutual_info"),
        "tag": "h_tag",
    }
    texts = {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{last}}",
        "generation_kwargs": {"until": ["\n", " the"], "max_gen_toks": 12, "do_sample": False},
    }
    first = [{"function": "regex", "regex_pattern": "(\\w+)"}, {"function": "take_first"}]
    tasks = {
        "h_choice": choice,
        "h_plural": choice
        | {"doc_to_text": "{{text}} ", "metric_list": mean("acc", "acc_norm"), "description": "Say.\n"},
        "h_inputs": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{label}}",
            "doc_to_choice": "{{start}}",
            "doc_to_target": "near {{last}}",
            "metric_list": mean("acc"),
        },
        "h_words": {
            "output_type": "loglikelihood",
            "doc_to_text": "{{text}}",
            "doc_to_target": " {{last}}",
            "metric_list": [
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                *mean("acc"),
            ],
        },
        "h_pages": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{pages}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
        "h_texts": texts
        | {
            "metric_list": mean("exact_match"),
            "filter_list": [
                {"name": "first-word", "filter": first},
                {"name": "whole", "filter": [{"function": "take_first"}]},
            ],
        },
        "h_like": texts | {"metric_list": mean("likeness"), "process_results": "!function code.likeness"},
    }
    tasks["h_shuffled"] = choice | {"process_docs": "!function code.shuffled", "tag": "h_drawn"}
    for name, task in tasks.items():
        text = yaml.safe_dump({"task": name} | data | task, sort_keys=False)
        (folder / f"{name}.yaml").write_text(re.sub(r"'(!function code.\w+)'", r"\1", text))
    both = {"group": "h_both", "task": ["h_choice", "h_plural"]}
    both["aggregate_metric_list"] = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
    (folder / "h_both.yaml").write_text(yaml.safe_dump(both))
