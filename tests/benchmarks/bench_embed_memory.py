"""Measures the memory of the `embed` job over catalogues of several sizes, and what a night with 1 % changed items costs.

python tests/benchmarks/bench_embed_memory.py prints one JSON line. The model is tiny and made on the spot: what may grow with the
catalogue is what is around it. Peak memory is that of the job's process, its resident set.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jobs.lake import artifacts, partitions
from jobs.lake.items import content_hash
from jobs.lake.tables import ITEMS
from models.text.encoder import save_encoder
from tests.models import tiny

FIRST, SECOND = "2026-01-01", "2026-01-02"
CHANGED = 100
"""One item in so many reads otherwise on the second night."""


def rows(items: int, ds: str) -> Iterator[pa.Table]:
    """A catalogue in chunks; on the second night every hundredth title is another."""
    for start in range(0, items, 50_000):
        numbers = range(start, min(start + 50_000, items))
        titles = [f"Film {n}{', restored' if ds == SECOND and n % CHANGED == 0 else ''}" for n in numbers]
        columns = {
            "item_id": [f"i{n}" for n in numbers],
            "attributes": [[{"name": "title", "value": title}] for title in titles],
            "content_hash": [content_hash([("title", title)]) for title in titles],
            "first_seen_ds": [FIRST] * len(titles),
        }
        yield pa.table(columns, ITEMS.schema)


def night(folder: Path, ds: str, encoder_id: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the job in a process of its own; its Result, seconds and peak memory."""
    recipe = folder / "recipe.toml"
    recipe.write_text(f'[run]\nlake = "{folder}/lake"\ndevice = "{arguments.device}"\n[embed]\nencoder = "{encoder_id}"\n'
                      f"part_items = {arguments.part_items}\n")  # fmt: skip
    watched = (
        "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, text=True, check=True); "
        "print(done.stdout.splitlines()[-1]); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-c", watched, sys.executable, "-m", "jobs", "embed", "--recipe", str(recipe), "--ds", ds]
    started = time.perf_counter()
    result, peak = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    found = json.loads(result)
    return {
        "embedded": found["embedded"],
        "tokens": found["tokens"],
        "seconds": round(time.perf_counter() - started, 1),
        "peak_mib": round(int(peak) / 1024),
    }


def main() -> None:
    """Prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--items", type=lambda text: [int(part) for part in text.split(",")], default=[10_000, 100_000, 1_000_000]
    )
    parser.add_argument("--part-items", type=int, default=50_000)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"part_items": arguments.part_items}
    for items in arguments.items:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            staged = artifacts.stage(folder / "lake", "encoder")
            save_encoder(staged, tiny.encoder(tiny.llama(folder / "base")).spec, None)
            encoder_id = artifacts.keep(folder / "lake", "encoder", staged)
            nights = {}
            for ds in (FIRST, SECOND):
                partitions.write(folder / "lake", ITEMS, f"ds={ds}", rows(items, ds))
                nights["first" if ds == FIRST else "second"] = night(folder, ds, encoder_id, arguments)
            result[str(items)] = nights
            print(f"{items:,}: {nights}", file=sys.stderr, flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
