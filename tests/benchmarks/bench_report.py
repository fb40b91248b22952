"""The report of a large night and the answer of `explain`: seconds, memory, bytes of the page, and how fast a browser opens it.

    python tests/benchmarks/bench_report.py --items 1000000
    python tests/benchmarks/bench_report.py --explain RECIPE --ds 1998-04-22 --item 50     a lake that was published before

Random vectors; the base LLM is not asked (report.base_items = 0). Prints one JSON line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jobs import report
from jobs.lake import manifests, partitions
from jobs.lake.partitions import write_json
from jobs.lake.tables import INTERACTIONS, ITEM_GROUPS, ITEMS, item_embeddings, llm_embeddings
from jobs.run import Run

DS, SPACE, ENCODER, BLOCK = "2026-03-10", "5" * 16, "e" * 16, 65_536
OPENED = """<script>addEventListener("load", () => { const out = document.createElement("pre"); out.id = "opened";
out.textContent = performance.now(); document.body.append(out); });</script></body>"""


def main() -> None:
    """Measures one or the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--llm-width", type=int, default=256)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--explain", type=Path)
    parser.add_argument("--ds", default=DS)
    parser.add_argument("--item", default="50")
    arguments = parser.parse_args()
    if arguments.explain:
        print(json.dumps(explained(arguments), sort_keys=True))
        return
    with tempfile.TemporaryDirectory(prefix="report-") as name:
        fill(Path(name), arguments)
        print(json.dumps(reported(Path(name), arguments), sort_keys=True))


def fill(lake: Path, arguments: argparse.Namespace) -> None:
    """A night of random vectors."""
    random = np.random.default_rng(0)

    def blocks() -> Iterator[tuple[list[str], list[str]]]:
        for start in range(0, arguments.items, BLOCK):
            ids = [f"i{number}" for number in range(start, min(start + BLOCK, arguments.items))]
            yield ids, [hashlib.sha256(item.encode()).hexdigest()[:32] for item in ids]

    def vectors(count: int, width: int, dtype: type) -> pa.FixedSizeListArray:
        return pa.FixedSizeListArray.from_arrays(
            pa.array(random.standard_normal(count * width, dtype=np.float32).astype(dtype)), width
        )

    def attributes(ids: list[str]) -> list[list[dict[str, str]]]:
        return [[{"name": "title", "value": f"Film {item}"}, {"name": "genre", "value": f"genre {item[-1]}"}] for item in ids]

    partitions.write(lake, ITEMS, f"ds={DS}", (
        pa.table({"item_id": ids, "attributes": attributes(ids), "content_hash": texts, "first_seen_ds": [DS] * len(ids)},
                 ITEMS.schema) for ids, texts in blocks()))  # fmt: skip
    partitions.write(lake, llm_embeddings(arguments.llm_width), f"encoder={ENCODER}/ds={DS}", (
        pa.table({"item_id": ids, "content_hash": texts, "embedding": vectors(len(ids), arguments.llm_width, np.float16)})
        for ids, texts in blocks()))  # fmt: skip
    partitions.write(lake, item_embeddings(arguments.width), f"space={SPACE}/ds={DS}", (
        pa.table({"item_id": ids, "space_id": [SPACE] * len(ids), "content_hash": texts,
                  "embedding": vectors(len(ids), arguments.width, np.float32),
                  "group": [ITEM_GROUPS[number % 3] for number in range(len(ids))]}) for ids, texts in blocks()))  # fmt: skip
    partitions.write(lake, INTERACTIONS, f"ds={DS}", (
        pa.table({"user_id": ["u"] * len(ids), "item_id": ids, "timestamp": pa.array(range(len(ids)), pa.int64())})
        for ids, _ in blocks()))  # fmt: skip
    ids = {"space_id": SPACE, "encoder_id": ENCODER}
    for job, result in (("extract", {"rows": {"items": arguments.items}}), ("embed", ids), ("project", ids), ("publish", ids)):
        manifest = {"job": job, "ds": DS, "status": "done", "seconds": 1.0, "result": {"outputs": {}, "inputs": {}, **result}}
        write_json(manifests.path_of(lake, DS, job), manifest)


def reported(lake: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds and memory of the job, size of its page, and milliseconds until a browser has opened it."""
    started = time.monotonic()
    result = report.run(report.Config(run=Run(ds=DS, lake=lake, device="cpu"), base_items=0))
    return {
        "items": arguments.items,
        "seconds": round(time.monotonic() - started, 2),
        "page_mib": round(result.page_bytes / 2**20, 2),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "opened_ms": opened(Path(result.path)),
    }


def opened(page: Path) -> float | None:
    """Milliseconds until headless Chromium has loaded and run a page; None without Chromium."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        return None
    probed = page.with_name("probed.html")
    probed.write_text(page.read_text().replace("</body>", OPENED))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
               f"--user-data-dir={page.parent / 'profile'}", "--dump-dom", f"file://{probed}"]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r'id="opened">([\d.]+)', dom)
    return round(float(found[1]), 1) if found else None


def explained(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the whole command, Python's start and Feast's import included; median of five."""
    command = [sys.executable, "-m", "jobs", "explain", "--recipe", str(arguments.explain), "--ds", arguments.ds,
               "--set", f"explain.item={arguments.item}"]  # fmt: skip
    seconds = []
    for _ in range(5):
        started = time.monotonic()
        subprocess.run(command, capture_output=True, check=True)
        seconds.append(time.monotonic() - started)
    return {"explain_seconds": round(sorted(seconds)[2], 2), "all": [round(value, 2) for value in seconds]}


if __name__ == "__main__":
    main()
