"""Stands for `python -m jobs`: notes each call, and does what the test's plan says of it: a status, a kill, a long sleep.

STUB names a folder with `plan.json`: {"results": {JOB: RESULT or [RESULT, …]},
"acts": {JOB, JOB#SHARD or JOB@DATE: [ACT of the first try, …]}}.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path


def main(arguments: list[str]) -> int:
    """The call's exit status."""
    folder = Path(os.environ["STUB"])
    job, rest = arguments[2], arguments[3:]
    settings = dict(rest[place + 1].split("=", 1) for place, word in enumerate(rest) if word == "--set")
    key = f"{job}#{settings[f'{job}.shard']}" if f"{job}.shard" in settings else job
    call = {"job": job, "key": key, "ds": rest[rest.index("--ds") + 1], "set": settings, "pid": os.getpid(), "words": arguments}
    call["environment"] = sorted(os.environ)
    calls = folder / "calls.jsonl"
    with calls.open("a") as stream:
        stream.write(json.dumps(call) + "\n")
    seen = [json.loads(line) for line in calls.read_text().splitlines()]
    tries = sum(other["key"] == key and other["ds"] == call["ds"] for other in seen)
    plan = json.loads((folder / "plan.json").read_text())
    acts = plan.get("acts", {}).get(f"{job}@{call['ds']}") or plan.get("acts", {}).get(key, [])
    act = acts[tries - 1] if tries <= len(acts) else 0
    print(f"{job}: try {tries}", file=sys.stderr, flush=True)
    if act == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if act == "sleep":
        time.sleep(600)
    if act == "pause":
        time.sleep(8)
    elif act:
        print(f"{job}: error: planned, with a remedy", file=sys.stderr)
        return int(act)
    usual = {"ds": call["ds"], "recommender_id": "r1", "encoder_id": "e1", "space_id": "s1"} if job == "pin" else {"job": job}
    result = plan.get("results", {}).get(job, usual)
    result = result[min(tries, len(result)) - 1] if isinstance(result, list) else result
    print("a line of no interest\n" + json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
