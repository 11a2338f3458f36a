"""Reading checkpoints that are whole, sharded, tied, mixed or broken; writing them atomically."""

import errno
import json
import os
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge3.checkpoint import CheckpointWriter, open_checkpoint
from merge3.checkpoint.layout import layout
from merge3.errors import BadInput, CheckpointError, ResourceError
from merge3.export import merge_to_disk
from merge3.pool import Pool
from merge3.recipe import Recipe


@pytest.fixture
def copy(family, tmp_path):
    """A copy of the base that a test may damage."""
    shutil.copytree(family / "base", tmp_path / "copy")
    return tmp_path / "copy"


def test_reads_what_safetensors_wrote_without_copying(family):
    checkpoint = open_checkpoint(family / "base")
    expected = load_file(family / "base" / "model.safetensors")
    assert checkpoint.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.get(name), tensor)
    first = next(iter(expected))
    assert checkpoint.get(first).data_ptr() == checkpoint.get(first).data_ptr()  # the map itself


def test_sharded_checkpoints_with_an_index(family, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(family / "base")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    whole, sharded = open_checkpoint(family / "base"), open_checkpoint(tmp_path / "sharded")
    assert whole.content_hash() == sharded.content_hash()  # content, not files


def test_content_hash_sees_every_byte(copy, family):
    before = open_checkpoint(copy).content_hash()
    assert before == open_checkpoint(family / "base").content_hash()
    file = copy / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert open_checkpoint(copy).content_hash() != before


def test_misaligned_tensors_are_read_correctly(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header += b" " * (3 - len(header) % 4 + 4)  # leaves the data off any 4-byte boundary
    assert (8 + len(header)) % 4
    (tmp_path / "model.safetensors").write_bytes(
        struct.pack("<Q", len(header)) + header + struct.pack("<2f", 1.5, -2.0)
    )
    assert open_checkpoint(tmp_path).get("a").tolist() == [1.5, -2.0]


def test_layout_finds_the_stack():
    names = [f"model.layers.{i}.{n}" for i in range(3) for n in ("mlp.w", "experts.7.w")]
    found = layout([*names, "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
    assert (found.prefix, found.layers) == ("model.layers", 3)
    assert found.pre == ("model.embed_tokens.weight",)
    assert found.post == ("lm_head.weight", "model.norm.weight")
    assert found.layer_of("model.layers.2.experts.7.w") == 2 and found.layer_of("lm_head.weight") is None


DAMAGE = {
    "truncated": (lambda f: f.write_bytes(f.read_bytes()[:-100]), r"truncated: tensor '.*' ends at byte"),
    "no header": (lambda f: f.write_bytes(b"\x01\x02"), "not a safetensors file"),
    "huge header": (lambda f: f.write_bytes(struct.pack("<Q", 2**60) + b"{}"), "not a safetensors file"),
    "not json": (lambda f: f.write_bytes(struct.pack("<Q", 4) + b"nope"), "corrupt header"),
    "trailing": (lambda f: f.write_bytes(f.read_bytes() + b"xx"), "2 bytes after the last tensor"),
    "empty": (lambda f: f.write_bytes(b""), "not a safetensors file"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_named(copy, damage):
    act, message = DAMAGE[damage]
    act(copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(copy)
    assert "model.safetensors" in str(error.value)


def test_header_entries_that_lie(tmp_path):
    def write(entries):
        header = json.dumps(entries).encode()
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))

    write({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 16]}})
    with pytest.raises(CheckpointError, match=r"'a' of shape \[3\] in 16 bytes; expected 12"):
        open_checkpoint(tmp_path)
    write({"a": {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}})
    with pytest.raises(CheckpointError, match="'a' has a bad header entry"):
        open_checkpoint(tmp_path)
    write({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}})
    with pytest.raises(CheckpointError, match="hole or overlap"):
        open_checkpoint(tmp_path)


def test_pickles_are_refused_unread(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04would run code")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: a pickle checkpoint"):
        open_checkpoint(tmp_path)


def test_missing_checkpoints_and_shards(tmp_path, copy):
    with pytest.raises(CheckpointError, match="no such directory"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no such directory, and no hub download"):
        open_checkpoint("someone/something-not-cached")
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        open_checkpoint(copy)
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors: missing"):
        open_checkpoint(copy)
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model-1.safetensors"}}')
    with pytest.raises(CheckpointError, match="outside its directory"):
        open_checkpoint(copy)


# -- writing


def put_all(directory, tensors, **options):
    specs = {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    with CheckpointWriter(directory, specs, **options) as writer:
        for name, tensor in tensors.items():
            writer.put(name, tensor)


TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.tensor(7)}


def test_written_checkpoints_read_back(tmp_path):
    put_all(tmp_path / "out", TENSORS)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[n], t) for n, t in TENSORS.items())


def test_text_beside_the_weights_is_utf_8_in_any_locale(tmp_path):
    code = f"""
from merge3.checkpoint import CheckpointWriter
with CheckpointWriter({str(tmp_path / "out")!r}, {{}}) as writer:
    writer.write_text("chat_template.jinja", "\\u00e9 \\u2581")
"""
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code], env=os.environ | plain, check=True)
    assert (tmp_path / "out" / "chat_template.jinja").read_bytes() == "\u00e9 \u2581".encode()


def test_shards_are_cut_at_the_limit(tmp_path):
    put_all(tmp_path / "out", TENSORS, shard_size=24)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert len({i.file for i in checkpoint.tensors.values()}) == 2
    assert all(torch.equal(checkpoint.get(n), t) for n, t in TENSORS.items())


def test_an_occupied_directory_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("the only copy")
    with pytest.raises(BadInput, match="exists and is not empty"):
        put_all(tmp_path / "out", TENSORS)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "the only copy"


@pytest.mark.parametrize("there", [True, False], ids=["an empty folder", "nothing yet"])
def test_an_output_that_is_a_link_is_written_where_it_leads(tmp_path, there):
    (tmp_path / "disk").mkdir()
    if there:
        (tmp_path / "disk" / "models").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "models")
    put_all(tmp_path / "out", TENSORS)
    assert (tmp_path / "out").is_symlink() and open_checkpoint(tmp_path / "disk" / "models").tensors.keys() == {*"abc"}
    assert {p.name for p in (*tmp_path.iterdir(), *(tmp_path / "disk").iterdir())} == {"out", "disk", "models"}


def test_a_mount_point_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "out")
    for name in ("out", "link"):
        with pytest.raises(BadInput, match=rf"{name}: a mount point, .* \(such as .*{name}/model\)"):
            put_all(tmp_path / name, TENSORS)
    assert not list((tmp_path / "out").iterdir()) and {p.name for p in tmp_path.iterdir()} == {"out", "link"}
    put_all(tmp_path / "out" / "model", TENSORS)


def test_nothing_stays_after_a_failure(tmp_path):
    with pytest.raises(ValueError, match="in the middle"):
        with CheckpointWriter(tmp_path / "out", {"a": (torch.float32, (2, 3))}) as writer:
            writer.put("a", TENSORS["a"])
            raise ValueError("in the middle")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_leaves_no_partial_model(tmp_path, monkeypatch, family):
    """The kernel's own ENOSPC, from a tiny tmpfs where one can be mounted, else raised at the write."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = os.system(f"mount -t tmpfs -o size=128k tmpfs {small} 2>/dev/null") == 0
    try:
        if mounted:  # pass the check beforehand: the disk fills while writing
            monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10**12, 0, 10**12))
        else:

            def full(handle):
                raise OSError(errno.ENOSPC, "No space left on device")

            monkeypatch.setattr(os, "fsync", full)
        recipe = {
            "merge_method": "linear",
            "models": [{"model": str(family / f"e{i}"), "parameters": {"weight": 1}} for i in range(2)],
        }
        with pytest.raises(ResourceError, match="disk is full"):
            merge_to_disk(Recipe.parse(recipe), small / "out")
        assert list(small.iterdir()) == []
    finally:
        if mounted:
            os.system(f"umount {small}")


def test_too_little_space_is_said_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(ResourceError, match=r"10 bytes free; expected 40 for the model"):
        put_all(tmp_path / "out", TENSORS)
    assert list(tmp_path.iterdir()) == []


# -- pools


def test_pool_keeps_what_cannot_be_merged(family, tmp_path):
    shutil.copytree(family / "e0", tmp_path / "wide")
    tensors = load_file(family / "e0" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.zeros(3, 32)])
    save_file(tensors, tmp_path / "wide" / "model.safetensors", metadata={"format": "pt"})
    pool = Pool.open(str(family / "base"), [str(tmp_path / "wide")])
    assert set(pool.kept) == {"model.embed_tokens.weight", "lm_head.weight"}
    recipe = Recipe.parse(
        {
            "merge_method": "task_arithmetic",
            "base_model": str(family / "base"),
            "models": [{"model": str(tmp_path / "wide"), "parameters": {"weight": 1.0}}],
        }
    )
    result = merge_to_disk(recipe, tmp_path / "out")
    assert set(result["kept"]) == set(pool.kept)
    merged, base = load_file(tmp_path / "out" / "model.safetensors"), load_file(family / "base" / "model.safetensors")
    assert torch.equal(merged["lm_head.weight"], base["lm_head.weight"])
    assert torch.allclose(merged["model.norm.weight"], tensors["model.norm.weight"])


def damaged_expert(family, tmp_path, change):
    shutil.copytree(family / "e0", tmp_path / "bad")
    tensors = load_file(family / "e0" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "bad" / "model.safetensors", metadata={"format": "pt"})
    return str(tmp_path / "bad")


LAYER = "model.layers.1.mlp.up_proj.weight"


def test_pool_names_a_missing_tensor(family, tmp_path):
    bad = damaged_expert(family, tmp_path, lambda t: t.pop(LAYER))
    with pytest.raises(CheckpointError, match=rf"bad: no tensor '{LAYER}'"):
        Pool.open(str(family / "base"), [bad])


def test_pool_names_another_shape(family, tmp_path):
    bad = damaged_expert(family, tmp_path, lambda t: t.update({LAYER: torch.zeros(8, 32)}))
    with pytest.raises(CheckpointError, match=rf"'{LAYER}' of shape \[8, 32\]; expected \[64, 32\]"):
        Pool.open(str(family / "base"), [bad])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pool_and_merge_name_a_tensor_that_is_not_finite(family, tmp_path, value):
    bad = damaged_expert(family, tmp_path, lambda t: t[LAYER].__setitem__((3, 5), value))
    with pytest.raises(CheckpointError, match=rf"bad: NaN or infinity in tensor '{LAYER}'"):
        Pool.open(str(family / "base"), [str(family / "e1"), bad]).read_all()
    recipe = {
        "merge_method": "linear",
        "models": [{"model": m, "parameters": {"weight": 1}} for m in (str(family / "e1"), bad)],
    }
    with pytest.raises(CheckpointError, match=rf"bad: NaN or infinity in tensor '{LAYER}'"):
        merge_to_disk(Recipe.parse(recipe), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pool_reads_mixed_dtypes(family, bf16_family):
    pool = Pool.open(str(family / "base"), [str(bf16_family / "e0")])
    from merge3.checkpoint.layout import Ref

    assert {pool.get(Ref(m, LAYER)).dtype for m in pool.endpoints} == {torch.float32}


def test_tied_heads_are_written_once(tied_family, tmp_path):
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(tied_family / f"e{i}"), "parameters": {"weight": 1}} for i in range(2)],
    }
    merge_to_disk(Recipe.parse(recipe), tmp_path / "out")
    assert "lm_head.weight" not in open_checkpoint(tmp_path / "out").tensors
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
