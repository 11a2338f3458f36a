"""Opening a pool: is each byte read once, and how fast are the statistics?

python benchmarks/open_pool.py [--save]
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import torch
from measure import median, report, seconds, table
from merge_command import make_models

from merge3 import kernels
from merge3.checkpoint import open_checkpoint
from merge3.checkpoint.layout import Ref
from merge3.pool import Pool


def evict(root: Path) -> None:
    """Drop the checkpoints from the page cache, so that reads are reads."""
    import os

    for file in root.rglob("*.safetensors"):
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_bytes() -> int:
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(dir="."))
    try:
        make_models(root)
        models = [str(root / n) for n in ("base", "e0", "e1", "e2")]
        stored = sum(i.nbytes for m in models for i in open_checkpoint(m).tensors.values())
        evict(root)
        before = disk_bytes()
        pool = Pool.open(models[0], models[1:])
        pool.read_all()
        read = (disk_bytes() - before) / stored
        names = list(pool.base_checkpoint.tensors)
        bases = [pool.get(Ref(models[0], n)) for n in names]
        experts = [pool.get(Ref(m, n)) for n in names for m in models[1:]]
        numel = [b.numel() for b in bases]
        one = torch.tensor([[max(1, n // 2)] for n in numel])
        grid = torch.tensor([[max(1, n * j // 256) for j in range(1, 256)] for n in numel])
        threads, rows, data = torch.get_num_threads(), [], {"bytes": stored, "read_share": read}
        for name, act in (
            ("Gram matrix, norms, NaN check (when a pool opens)", lambda: kernels.gram(bases, experts, len(names))),
            ("histogram and one exact threshold each (ties)", lambda: kernels.order_statistics(bases, experts, one)),
            ("all 255 thresholds of a search's densities", lambda: kernels.order_statistics(bases, experts, grid)),
        ):
            rate = stored / median(seconds(act, 3)) / threads
            data[name] = rate
            rows.append([name, f"{stored / rate / threads:.2f}", f"**{rate / 1e9:.2f}**"])
    finally:
        shutil.rmtree(root, ignore_errors=True)
    opened = f"a pool of {stored / 1e9:.2f} GB (bfloat16, 3 experts)"
    title = f"Statistics of {opened}; opening read {read:.2f} of its bytes from disk"
    report("open_pool", table(title, ["", "s", "GB/s per core"], rows), data, options.save)


if __name__ == "__main__":
    main()
