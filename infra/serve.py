"""`make serve`: the serving process on the demo's stores, with a page for people; `make demo` asks it once and stops it.

The demo's histories are pushed to Feast first, as an SRS would push them; no training code runs in the process itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
USERS = 50
"""Users that the page offers."""


def push_histories(lake: Path) -> list[str]:
    """Pushes the newest histories of the lake to Feast's `user_history`; gives the ids of some users."""
    sys.path.insert(0, str(ROOT))
    import pandas as pd

    from feature_repo.reader import open_store
    from jobs.lake import partitions
    from jobs.lake.tables import SEQUENCES

    columns = ("user_id", "item_ids", "timestamps")
    newest = partitions.latest(lake, SEQUENCES.name, "9999-12-31")
    rows = pd.concat(batch.to_pandas() for batch in partitions.scan(lake, SEQUENCES, newest, columns))
    rows["event_timestamp"] = pd.Timestamp.now("UTC")
    open_store(lake).push("user_history_push", rows)
    return [str(user) for user in rows["user_id"].head(USERS)]


@contextlib.contextmanager
def serving(lake: Path, port: int = 0, **variables: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The process, ready, and its address; it is told to end after the block. Raises RuntimeError where it does not get ready."""
    port = port or free_port()
    told = {"ARTIFACTS": str(lake), "PORT": str(port), **variables}
    environment = os.environ | {f"LLMEMB_SERVING_{name}": value for name, value in told.items()}
    with subprocess.Popen([sys.executable, "-m", "feature_repo.serving"], cwd=ROOT, env=environment) as process:
        url = f"http://127.0.0.1:{port}"
        try:
            wait_ready(url, process)
            yield url, process
        finally:
            process.send_signal(signal.SIGTERM)


def free_port() -> int:
    """A port that nobody has now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_ready(url: str, process: subprocess.Popen[bytes], seconds: float = 60.0) -> None:
    """Waits until a generation is loaded. Raises RuntimeError."""
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{url}/readyz", timeout=2)
            return
        time.sleep(0.1)
    raise RuntimeError("the serving process did not get ready: its lines above say why")


def ask(url: str, path: str, **body: Any) -> dict[str, Any]:
    """One request. Raises RuntimeError with the service's own words."""
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            answer: dict[str, Any] = json.load(response)
            return answer
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{path}: {error.read().decode()}") from error


def ask_once(lake: Path, user: str, k: int = 5) -> dict[str, Any]:
    """Starts the process, asks for one user over HTTP, stops it: the end of the demo. `seconds` is of a second, warm one."""
    push_histories(lake)
    with serving(lake) as (url, _):
        ask(url, "/recommend", user_id=user, k=k)
        started = time.monotonic()
        answer = ask(url, "/recommend", user_id=user, k=k, explain=True, attributes=["title"])
        return answer | {"seconds": time.monotonic() - started}


def tell(answer: dict[str, Any]) -> None:
    """The answer, for a person."""
    print(f"  space {answer['space_id']} of {answer['ds']}, {answer['history_items']} events of the history, "
          f"{1000 * answer['seconds']:.1f} ms over HTTP")  # fmt: skip
    for number, item in enumerate(answer["items"], start=1):
        title = item.get("attributes", {}).get("title", item["item_id"])
        parts = ", ".join(f"{name} {share:.2f}" for name, share in item.get("parts", {}).items())
        print(f"  {number:>2}. {title}  ({item['score']:.3f}{': ' + parts if parts else ''})")


def main() -> int:
    """Serves the demo's lake until Ctrl-C."""
    lake = Path(os.environ.get("LLMEMB_DEMO") or ROOT / ".demo").absolute() / "lake"
    if not (lake / "indexes").is_dir():
        print(f"{lake} has nothing to serve yet: run `make demo` first", file=sys.stderr)
        return 2
    users = push_histories(lake)
    with serving(lake, int(os.environ.get("LLMEMB_SERVING_PORT", "8100")), PAGE="1", PAGE_USERS=",".join(users)) as (
        url,
        process,
    ):
        print(f"page: {url}/   API: {url}/docs   end: Ctrl-C", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            process.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
