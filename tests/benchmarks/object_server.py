"""An object store in a process of its own: moto's S3 server behind the tests' front, which counts what it is asked.

python tests/benchmarks/object_server.py PORT
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import logging
import os
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import psutil
from werkzeug.serving import make_server

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.feature_repo.sentinels import free_port
from tests.object_store import Front

COUNTS = "/_counts"
SERVICES = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}


class Counting(Front):
    """The front, with counts of requests by what they were for."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __call__(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        """One request; that for the counts begins them anew."""
        if environ["PATH_INFO"] == COUNTS:
            told, self.counts = self.counts, Counter()
            start("200 OK", [("Content-Type", "application/json")])
            return [json.dumps(told).encode()]
        method = str(environ["REQUEST_METHOD"])
        self.counts["LIST" if method == "GET" and "list-type" in environ.get("QUERY_STRING", "") else method] += 1
        return super().__call__(environ, start)


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    url: str
    process: psutil.Process

    @property
    def environment(self) -> dict[str, str]:
        """What a job needs to get at it."""
        return {"AWS_ENDPOINT_URL": self.url, **SERVICES}

    def client(self) -> Any:
        """boto3's client."""
        return boto3.client(
            "s3", endpoint_url=self.url, region_name="us-east-1", aws_access_key_id="test", aws_secret_access_key="test"
        )

    def make(self, bucket: str) -> str:
        """A bucket's address."""
        self.client().create_bucket(Bucket=bucket)
        return f"s3://{bucket}"

    def repeat(self, bucket: str, ds: str, count: int) -> None:
        """Copies all that bears a date to so many dates before it."""
        client, first = self.client(), dt.date.fromisoformat(ds)
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        keys = [one["Key"] for page in pages for one in page.get("Contents", ()) if f"ds={ds}" in one["Key"]]
        for key in keys:
            data = client.get_object(Bucket=bucket, Key=key)["Body"].read()
            for back in range(1, count + 1):
                day = f"{first - dt.timedelta(days=back)}"
                told = data.replace(ds.encode(), day.encode()) if key.endswith(".json") else data
                client.put_object(Bucket=bucket, Key=key.replace(f"ds={ds}", f"ds={day}"), Body=told)

    def committed(self, bucket: str, prefix: str) -> dict[str, Any]:
        """A lake's `objects`: commits, and the parts that they name, by digest; and how many parts no commit names (`left`)."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        tags = {one["Key"].removeprefix(prefix): one["ETag"] for page in pages for one in page.get("Contents", ())}
        named = {key for key in tags if key.endswith("/_commit.json")}
        for key in sorted(named):
            told = json.loads(self.client().get_object(Bucket=bucket, Key=prefix + key)["Body"].read())
            named |= {f"{key.rpartition('/')[0]}/{part['name']}" for part in told["files"]}
        parts = {key for key in tags if key.endswith(".parquet")}
        return {"objects": {key: tags[key] for key in named}, "left": len(parts - named)}

    def counts(self) -> dict[str, int]:
        """Requests since the last asking, by what they were for."""
        with urllib.request.urlopen(self.url + COUNTS) as answer:
            found: dict[str, int] = json.loads(answer.read())
        return found

    def cpu_seconds(self) -> float:
        """Processor seconds so far."""
        spent = self.process.cpu_times()
        return float(spent.user + spent.system)


@contextlib.contextmanager
def object_server() -> Iterator[Server]:
    """A server for the time of a `with` block."""
    port = free_port()
    process = subprocess.Popen([sys.executable, __file__, str(port)], env=os.environ | SERVICES, start_new_session=True)
    server = Server(f"http://127.0.0.1:{port}", psutil.Process(process.pid))
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                server.counts()
                break
            time.sleep(0.1)
        yield server
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    make_server("127.0.0.1", int(sys.argv[1]), Counting(), threaded=True).serve_forever()
