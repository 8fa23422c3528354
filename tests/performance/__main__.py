"""`python -m tests.performance [NAME …]` (or `make bench NAME=…`): run some, write bench.json.

A benchmark is a module here with `run() -> list of rows`. Rows of the others stay in the file.
"""

import importlib
import json
import sys
from pathlib import Path

BENCHMARKS = (
    "views",
    "loading",
    "training",
    "muse",
    "slides",
    "store",
    "scale",
    "probes",
    "preemption",
    "embed",
    "recipes",
)
OUT = Path("bench.json")


def main(names: list[str]) -> int:
    unknown = [n for n in names if n not in BENCHMARKS]
    if unknown:
        print(f"no benchmark '{unknown[0]}'; there are: {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    rows = json.loads(OUT.read_text(encoding="utf-8")) if OUT.is_file() else []
    for name in names or BENCHMARKS:
        print(f"== {name}", flush=True)
        found = importlib.import_module(f"tests.performance.{name}").run()
        rows = [r for r in rows if r["name"] != name] + found
        for row in found:
            print(line(row), flush=True)
        OUT.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {OUT.resolve()}")
    return 0


def line(row: dict) -> str:
    ratio = f"{row['ratio']:.2f}x" if row["ratio"] is not None else "-"
    return f"{row['what']:<58} {row['ours']:>12,.4g} {row['unit']:<16} {ratio:>9} of {row['peer']}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
