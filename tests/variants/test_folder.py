"""A packed folder: what others read of it, what it says of itself, and what is refused of one that was changed."""

import errno
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from merge3 import LocalEngine, Pool, Slot, merge_to_disk
from merge3.errors import BadInput, CheckpointError, ResourceError
from merge3.export_task import merge_task, write_task
from merge3.variants import Variants
from tests.variants.making import METHODS, live, recipe_of, same, stored
from tests.worlds import shared


@pytest.fixture(scope="module")
def small():
    from merge3.world.family import make_family

    yield from shared(make_family, experts=2, layers=2)


def recipe(folder, name="emr", **more):
    return recipe_of(folder / "base", [folder / "e0", folder / "e1"], name, **more)


@pytest.fixture(scope="module")
def packed(small, tmp_path_factory):
    """One that no test changes."""
    folder = tmp_path_factory.mktemp("packed") / "packed"
    merge_to_disk(recipe(small), folder)
    return folder


@pytest.fixture
def own(packed, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(packed, tmp_path / "own")


# -- what others read


def test_transformers_loads_the_common_model(packed, small):
    merge_to_disk(recipe(small, "emr_unified", parameters={}), packed.parent / "unified")
    model, said = AutoModelForCausalLM.from_pretrained(packed, output_loading_info=True)
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = stored(packed.parent / "unified")
    assert same({name: value for name, value in model.state_dict().items() if name in expected}, expected) == []


def test_the_parts_are_a_safetensors_file(packed):
    with safe_open(packed / "variants.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        names = set(file.keys())
    assert {name.split("/")[0] for name in names} == {"", "e0", "e1"}
    assert set(load_file(packed / "variants.safetensors")) == names


@pytest.mark.parametrize("name", METHODS)
def test_sizes_are_those_of_the_files(small, tmp_path, name):
    told = merge_to_disk(recipe(small, name), tmp_path / "packed")["variants"]
    files = {file.name: file.stat().st_size for file in (tmp_path / "packed").iterdir()}
    assert told["folder"] == sum(files.values())
    tensors = load_file(tmp_path / "packed" / "variants.safetensors")
    of = lambda start: sum(t.nbytes for key, t in tensors.items() if key.startswith(start))
    assert told["tasks"] == {task: of(f"{task}/") for task in ("e0", "e1")} and told["base"] == of("/base/")
    parts = sum(told["tasks"].values()) + told["base"]
    assert 0 <= files["variants.safetensors"] - parts < 200 * len(tensors) + 100  # but for the header
    assert told["common"] == sum(t.nbytes for t in stored(tmp_path / "packed").values())
    assert told["experts"] == sum(t.nbytes for e in ("e0", "e1") for t in stored(small / e).values())
    assert Variants.open(tmp_path / "packed").sizes() == told


def test_a_task_is_an_ordinary_checkpoint_without_what_is_the_folders(own, tmp_path):
    """Neither parts nor a router, and nothing of what else was put into the folder by a merge."""
    (own / "router.safetensors").write_bytes(b"of the common model")
    (own / "tokenizer.json").write_text("{}")
    (own / "1_Pooling").mkdir()
    (own / "1_Pooling" / "config.json").write_text("{}")
    (own / ".cache").mkdir()
    (own / ".cache" / "x").touch()
    write_task(own, "e1", own / "within")  # beside others' files, which the next has nothing of
    write_task(own, "e0", tmp_path / "e0")
    assert {p.relative_to(tmp_path / "e0").as_posix() for p in (tmp_path / "e0").rglob("*") if p.is_file()} == {
        "1_Pooling/config.json", "README.md", "config.json", "generation_config.json", "mergekit_config.yml",
        "model.safetensors", "tokenizer.json",
    }  # fmt: skip
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "e0").num_parameters() > 0


def test_shards_on_both_sides(small, packed, tmp_path):
    merge_to_disk(recipe(small), tmp_path / "packed", shard_size=20_000)
    assert len(list((tmp_path / "packed").glob("model-*"))) > 2
    write_task(tmp_path / "packed", "e0", tmp_path / "e0", 30_000)
    write_task(packed, "e0", tmp_path / "whole")
    assert len(list((tmp_path / "e0").glob("model-*"))) > 2
    assert same(stored(tmp_path / "e0"), stored(tmp_path / "whole")) == []
    assert not list((tmp_path / "e0").glob("variants*"))


# -- live


def test_only_what_differs_is_written(small, monkeypatch):
    from merge3.live import writing as module

    written = []
    run = module.execute
    monkeypatch.setattr(module, "execute", lambda outputs, *more: (written.extend(outputs), run(outputs, *more)))
    slot = Slot(Pool.open(str(small / "base"), [str(small / "e0"), str(small / "e1")]))
    some = recipe(small, "onebit")
    slot.swap(some, task="e0")
    names = lambda: {name for name, _, _ in written}
    everything = len(stored(small / "base"))
    assert len(names()) == everything
    for task in ("e1", "e0"):
        written.clear()
        slot.swap(some, task=task)
        assert names() == {name for name in stored(small / "base") if "mlp" in name}
    written.clear()
    slot.swap(some, task="e0")  # it is there
    assert not written


def test_the_largest_differences_touch_their_places_alone(small):
    slot = Slot(Pool.open(str(small / "base"), [str(small / "e0"), str(small / "e1")]))
    largest = recipe(small, "byom_fft", parameters={"share": 0.002})
    slot.swap(largest, task="e0")
    variants, before = slot.variants(largest), {name: tensor.data_ptr() for name, tensor in live(slot).items()}
    marked = slot.model.model.embed_tokens.weight
    places = [variants.part(f"{t}/index/model.embed_tokens.weight").long() for t in ("e0", "e1")]
    free = next(i for i in range(marked.numel()) if all(i not in place for place in places))
    marked.view(-1)[free] = 77.0  # what neither task has: nobody writes there
    slot.swap(largest, task="e1")
    assert marked.view(-1)[free] == 77.0 and before.keys() == live(slot).keys()
    slot.swap(largest)
    slot.swap(largest, task="e1")
    assert marked.view(-1)[free] != 77.0


def test_what_is_interrupted_leaves_neither_task(small, monkeypatch):
    slot = Slot(Pool.open(str(small / "base"), [str(small / "e0"), str(small / "e1")]))
    for name in ("emr", "byom_fft"):
        one = recipe(small, name)
        slot.swap(one, task="e1")
        expected = live(slot)
        slot.swap(one, task="e0")
        with monkeypatch.context() as patch:
            patch.setattr("merge3.live.writing.execute", lambda *_: (_ for _ in ()).throw(MemoryError()))
            with pytest.raises(MemoryError):
                slot.swap(one, task="e1")
        for parameter in slot.model.parameters():  # half of it was written, say
            parameter.zero_()
        slot.swap(one, task="e1")
        assert same(live(slot), expected) == []


def test_random_keeps_have_their_seed(small):
    slot = Slot(Pool.open(str(small / "base"), [str(small / "e0"), str(small / "e1")]))
    random = {"share": 0.3, "merger": "dare_ties", "weight": 0.5, "density": 0.5}
    one = recipe(small, "byom_fft", parameters=random)
    found = {}
    for seed in (1, 2, 1):
        slot.swap(one, seed, task="e0")
        found.setdefault(seed, []).append(live(slot))
    assert same(found[1][0], found[1][1]) == [] and same(found[1][0], found[2][0])


def test_what_was_packed_for_live_models_does_not_pile_up(small):
    slot = Slot(Pool.open(str(small / "base"), [str(small / "e0"), str(small / "e1")]))
    folders, expected = set(), {}
    for number in range(8):
        one = recipe(small, "byom_fft", parameters={"share": 0.01 * (number + 1)})
        slot.swap(one, task="e0")
        expected[number] = live(slot)
        folders.add(slot.variants(one).folder)
    there = [folder for folder in folders if folder.exists()]
    assert len(folders) == 8 and 1 <= len(there) <= 4
    assert len(list(there[0].parent.iterdir())) == len(there)
    for number in (0, 7, 3):
        slot.swap(recipe(small, "byom_fft", parameters={"share": 0.01 * (number + 1)}), task="e0")
        assert same(live(slot), expected[number]) == []


def test_a_later_process_finds_what_was_packed(small, tmp_path):
    base, experts = str(small / "base"), [str(small / "e0"), str(small / "e1")]
    times = []
    for _ in range(2):
        slot = Slot(Pool.open(base, experts, derived_folder=tmp_path))
        folder = slot.variants(recipe(small)).folder
        times.append((folder, (folder / "variants.json").stat().st_mtime_ns))
    assert times[0] == times[1] and folder.parent == tmp_path
    narrow = Slot(Pool.open(base, experts, derived_folder=tmp_path), torch.bfloat16)
    assert narrow.variants(recipe(small)).folder != folder


def test_another_process_may_be_quicker(small, tmp_path, monkeypatch):
    """Two that keep what they pack in one folder, and pack the same at once."""
    from merge3.variants import kept

    pools = [
        Pool.open(str(small / "base"), [str(small / "e0"), str(small / "e1")], derived_folder=tmp_path) for _ in "ab"
    ]
    first, second = (Slot(pool) for pool in pools)
    write = kept.write_parts

    def slow(*given):
        monkeypatch.setattr(kept, "write_parts", write)
        second.swap(recipe(small), task="e0")
        write(*given)

    monkeypatch.setattr(kept, "write_parts", slow)
    first.swap(recipe(small), task="e0")
    assert same(live(first), live(second)) == [] and len(list(tmp_path.iterdir())) == 1


def test_a_pack_that_fails_half_way_leaves_nothing(small, tmp_path, monkeypatch):
    from merge3.variants import masks

    slot = Slot(Pool.open(str(small / "base"), [str(small / "e0"), str(small / "e1")], derived_folder=tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(masks.kernels, "pack", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(OSError):
            slot.swap(recipe(small), task="e0")
    assert not list(tmp_path.iterdir())
    slot.swap(recipe(small), task="e0")


# -- what is refused


def changed(file, **changes):
    about = json.loads(file.read_text())
    file.write_text(json.dumps(about | changes))


def replaced(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


DAMAGED = {
    "no variants.json": lambda f: (f / "variants.json").unlink(),
    "variants.json: not what merge3 writes": lambda f: (f / "variants.json").write_text("{"),
    "variants.json: not what merge3 writes; expected": lambda f: (f / "variants.json").write_text("[1]"),
    "variants.json: format 2": lambda f: changed(f / "variants.json", format=2),
    "variants.json: format None": lambda f: (f / "variants.json").write_text("{}"),
    "variants.json: changed since it was written": lambda f: changed(f / "variants.json", content=None),
    "variants.json: changed since": lambda f: changed(f / "variants.json", tasks={}),
    "no variants.safetensors": lambda f: (f / "variants.safetensors").unlink(),
    "variants.safetensors: truncated": lambda f: os.truncate(f / "variants.safetensors", 20_000),
    "variants.safetensors: not a safetensors file": lambda f: os.truncate(f / "variants.safetensors", 3),
    "another model than variants.safetensors was written for": lambda f: replaced(
        f, lambda t: t["model.norm.weight"].mul_(2)
    ),
    "another model than": lambda f: replaced(f, lambda t: t.update({k: v.bfloat16() for k, v in t.items()})),
    "another model": lambda f: replaced(f, lambda t: t.pop("model.norm.weight")),
}


@pytest.mark.parametrize("line", DAMAGED)
def test_a_folder_that_was_changed_is_one_line(own, tmp_path, line):
    DAMAGED[line](own)
    with pytest.raises(CheckpointError, match=line) as found:
        Variants.open(own)
    assert "\n" not in str(found.value)
    with pytest.raises(CheckpointError):
        write_task(own, "e0", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["own"]


@pytest.mark.parametrize("part", ["e1/mask/model.norm.weight", "/base/lm_head.weight"])
def test_parts_of_another_merge_of_the_same_models_shape(own, small, tmp_path, part):
    """As many tensors of the same shapes: told by what is in them, one that differs in one tensor too."""
    merge_to_disk(
        recipe_of(
            small / "base", [small / "e1", small / "e0"], tasks={"e0": f"{small / 'e1'}", "e1": f"{small / 'e0'}"}
        ),
        tmp_path / "other",
    )
    kept = load_file(own / "variants.safetensors")
    shutil.copy(tmp_path / "other" / "variants.safetensors", own)
    with pytest.raises(CheckpointError, match="not the file that was written with variants.json"):
        Variants.open(own)
    kept[part] = kept[part] + 1
    save_file(kept, own / "variants.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="not the file that was written with variants.json"):
        Variants.open(own)


def test_what_does_not_matter_may_change(own):
    (own / "README.md").write_text("ours")
    changed(own / "config.json", use_cache=False)
    model = AutoModelForCausalLM.from_pretrained(own)
    assert Variants.open(own).config("e0")["use_cache"] is False and model is not None


def test_a_task_that_is_not_there(own, small, tmp_path):
    for call in (
        lambda: write_task(own, "e00", tmp_path / "out"),
        lambda: merge_task(recipe(small), "e00", tmp_path / "out"),
        lambda: Slot(Pool.open(str(own), [])).show(Variants.open(own), str(own), "e00"),
    ):
        with pytest.raises(BadInput, match=r"no variant 'e00'; expected e0, e1 \(did you mean 'e0'\?\)"):
            call()
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(small, packed, tmp_path, monkeypatch):
    target = tmp_path / "target"
    target.mkdir()

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for call in (
            lambda: merge_to_disk(recipe(small), target / "out"),
            lambda: merge_task(recipe(small), "e0", target / "out"),
            lambda: write_task(packed, "e0", target / "out"),
        ):
            with pytest.raises(ResourceError, match="the disk is full"):
                call()
            assert list(target.iterdir()) == []
    merge_to_disk(recipe(small), target / "out")


@pytest.mark.parametrize("name", METHODS)
def test_room_for_the_parts_is_asked_before_anything_is_written(small, tmp_path, monkeypatch, name):
    """The model alone would fit; what is asked for is no less than what is then taken, and not twice as much."""
    one = recipe(small, name)
    merge_to_disk(one, tmp_path / "out")
    model = sum(t.nbytes for t in stored(tmp_path / "out").values())
    parts = sum(t.nbytes for t in load_file(tmp_path / "out" / "variants.safetensors").values())
    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10**9, 0, model + 10))
    with pytest.raises(ResourceError, match="bytes free; expected") as found:
        merge_to_disk(one, tmp_path / "again")
    wanted = int(str(found.value).split("expected ")[1].split(" for")[0].replace(",", ""))
    assert model + parts <= wanted <= model + 2 * parts + 200
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_merge_that_is_killed_leaves_nothing_under_the_final_name(small, tmp_path):
    script = f"""
import weakref
from merge3 import Recipe, merge_to_disk
from merge3.variants import packed
write = packed.write_about
packed.write_about = lambda *given: (print("there", flush=True), time.sleep(60))
merge_to_disk(Recipe.parse({recipe(small).to_dict()!r}), {str(tmp_path / "out")!r})
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "there"  # all parts are written
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    assert all(file.name.startswith(".out.partial-") for file in tmp_path.iterdir())
    assert merge_to_disk(recipe(small), tmp_path / "out")["path"] == str(tmp_path / "out")


def test_tasks_may_have_the_names_of_parts(small, tmp_path):
    tasks = {"head": str(small / "e0"), "base": str(small / "e1"), "ma sk é": str(small / "e0")}
    merge_to_disk(recipe(small, tasks=tasks), tmp_path / "packed")
    merge_to_disk(recipe(small), tmp_path / "plain")
    write_task(tmp_path / "plain", "e0", tmp_path / "e0")
    for task in ("head", "ma sk é"):
        write_task(tmp_path / "packed", task, tmp_path / task)
        assert same(stored(tmp_path / task), stored(tmp_path / "e0")) == []


def test_an_engine_goes_with_the_last_who_uses_it(small):
    """Without a collection of cycles: what is packed for it is as large as its models."""
    engine = LocalEngine(Pool.open(str(small / "base"), [str(small / "e0"), str(small / "e1")]))
    engine.slot.swap(recipe(small), task="e0")
    held, folder = weakref.ref(engine.slot), engine.slot.variants(recipe(small)).folder
    gc.collect()  # frames that transformers leaves as it loads
    gc.disable()
    try:
        assert folder.exists()
        del engine
        assert held() is None and not folder.exists()
    finally:
        gc.enable()
