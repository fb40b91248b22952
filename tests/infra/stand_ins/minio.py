#!/opt/moto/bin/python
"""moto's server under the names of MinIO's programs: `minio server /data`, where a folder is a bucket, and `mc ready local`."""

import sys
import threading
import urllib.request
from pathlib import Path

URL = "http://127.0.0.1:9000"


def serve(data: Path) -> None:
    """Answers until it is told to end; objects stay in memory."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="0.0.0.0", port=9000)
    server.start()
    client = boto3.client("s3", endpoint_url=URL, region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b")
    for folder in data.iterdir():
        client.create_bucket(Bucket=folder.name)
    threading.Event().wait()


if Path(sys.argv[0]).name == "mc":
    urllib.request.urlopen(f"{URL}/moto-api/", timeout=5)
else:
    serve(Path(sys.argv[2]))
