"""How near is a swap to a plain copy of the same bytes, and how far from eager torch?

python benchmarks/swap.py [--parameters 100000000] [--save]
"""

import argparse

import torch
from measure import alternating, median, report, table
from stream import streaming_copy

from merge3 import kernels
from merge3.kernels import HI, LO, LO_SHARE, WEIGHT, Modes
from merge3.reference import merge_ref

MODES = {
    "plain sum": Modes("all", "none"),
    "magnitude + elect": Modes("magnitude", "sum"),
    "magnitude + elect + normalize": Modes("magnitude", "sum", True),
    "band + elect": Modes("band", "sum"),
    "random + elect": Modes("random", "sum"),
}
MEASURED = ("plain sum", "magnitude + elect")  # the others are shown for completeness


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, default=100_000_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    rows, data = [], []
    for dtype in (torch.bfloat16, torch.float32):
        for count in (1, 3, 8):
            for row in measure(options.parameters, count, dtype, options.repeats):
                data.append(row)
                rows.append(
                    [
                        row["dtype"],
                        count,
                        row["mode"],
                        f"{1e3 * row['swap']:.1f}",
                        f"{row['bandwidth'] / 1e9:.1f}",
                        f"{row['copy_bandwidth'] / 1e9:.1f}",
                        f"**{row['of_copy']:.2f}**",
                        f"{row['of_stream']:.2f}",
                        f"{row['of_eager']:.0f}x" if row["of_eager"] else "",
                    ]
                )
                print(rows[-1], flush=True)
    columns = [
        "dtype",
        "experts",
        "mode",
        "swap ms",
        "GB/s",
        "copy GB/s",
        "of copy",
        "of streaming copy",
        "faster than eager",
    ]
    title = f"Swap of {options.parameters / 1e6:.0f} M parameters against a copy in the same run"
    report("swap", table(title, columns, rows), {"rows": data}, options.save)


def measure(parameters: int, count: int, dtype: torch.dtype, repeats: int) -> list[dict]:
    torch.manual_seed(0)
    base = (torch.randn(parameters) * 0.02).to(dtype)
    experts = [(base.float() + torch.randn(parameters) * 0.002).to(dtype) for _ in range(count)]
    out, source = torch.empty_like(base), base.clone()
    c = kernels.coefficients(1, count)
    c[..., WEIGHT] = 0.3
    c[..., LO], c[..., LO_SHARE], c[..., HI] = 0.0013, 0.5, 0.005
    c[..., kernels.DENSITY] = 0.5
    copy_ = streaming_copy()
    acts = {"copy": lambda: out.copy_(source), "stream": lambda: copy_(out, source)}
    for name, modes in MODES.items():
        acts[name] = lambda modes=modes: kernels.merge_([out], [base], experts, c, torch.ones(1), modes)
    times = alternating(acts, repeats)
    size = parameters * dtype.itemsize
    copy, stream = (2 * size / median(times[name]) for name in ("copy", "stream"))
    rows = []
    for name, modes in MODES.items():
        swap = median(times[name])
        bandwidth = (count + 2) * size / swap
        eager = eager_seconds(base, experts, c, modes, parameters) if name in MEASURED else None
        rows.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "experts": count,
                "mode": name,
                "swap": swap,
                "bandwidth": bandwidth,
                "copy_bandwidth": copy,
                "of_copy": bandwidth / copy,
                "of_stream": bandwidth / stream,
                "of_eager": eager / swap if eager else None,
            }
        )
    return rows


def eager_seconds(base, experts, c, modes, parameters: int) -> float:
    """The reference in float32, on a tenth of the parameters (it needs a dozen temporaries), scaled up."""
    part = max(1, parameters // 10)
    slices = [e[:part] for e in experts]
    times = alternating(
        {"eager": lambda: merge_ref([base[:part]], slices, c, torch.ones(1), modes, dtype=torch.float32)}, 3
    )
    return median(times["eager"]) * parameters / part


if __name__ == "__main__":
    main()
