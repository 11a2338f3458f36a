"""The demo over several seeds: does the evolved merge beat every baseline on held-out items?

python benchmarks/demo.py [--seeds 0 1 2] [--runs DIR ...] [--save]    --runs: finished demos, instead of new ones
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import report, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, nargs="*", default=[])
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    results = [json.loads((run / "run" / "result.json").read_text()) for run in options.runs]
    if not results:
        client = Path(sys.executable).parent / "merge3-client"
        for seed in options.seeds:
            with tempfile.TemporaryDirectory() as folder:
                command = [client, "demo", "--seed", str(seed), "--run-dir", Path(folder) / "demo", "--json", "--quiet"]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                results.append(json.loads(done.stdout))
    names = ["evolved", *sorted(results[0]["baselines"], key=lambda n: -results[0]["baselines"][n])]
    columns = ["merge", *(f"seed {r['seed']}" for r in results)]
    rows = []
    for name in names:
        values = [r["heldout"] if name == "evolved" else r["baselines"][name] for r in results]
        rows.append(
            [
                f"**{name}**" if name == "evolved" else name,
                *(f"**{v:.3f}**" if name == "evolved" else f"{v:.3f}" for v in values),
            ]
        )
    gains = [r["heldout"] - max(r["baselines"].values()) for r in results]
    rows.append(["gain over the best", *(f"{g:+.3f}" for g in gains)])
    rows.append(["of which merging", *(f"{100 * r['swap_share']:.1f} %" for r in results)])
    text = table("Held-out accuracy, mean over four tasks", columns, rows)
    data = {"gains": gains, "heldout": [r["heldout"] for r in results], "baselines": [r["baselines"] for r in results]}
    report("demo", text, data, options.save)


if __name__ == "__main__":
    main()
