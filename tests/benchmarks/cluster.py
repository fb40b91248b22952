"""A cluster's services on this machine: an object store, PostgreSQL, and for each lake Redis and MLflow of its own."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench_publish import redis_server  # beside this file
from object_server import Server, object_server

from tests.feature_repo.postgresql import ACCOUNT, PASSWORD, postgresql
from tests.infra import mlflow_server as mlflow

INI = Path(__file__).parents[2] / "infra" / "mlflow-auth.ini"


@contextlib.contextmanager
def cluster(home: Path, names: Sequence[str]) -> Iterator[tuple[Server, dict[str, dict[str, str]]]]:
    """The object store, and by name the variables of jobs whose lake is `s3://NAME/lake`; both registries are on PostgreSQL."""
    with contextlib.ExitStack() as running:
        store, database = running.enter_context(object_server()), running.enter_context(postgresql())
        found = {}
        for name in names:
            store.make(name)
            for of in ("feast", "mlflow"):
                with database.administrator() as connection:
                    connection.execute(f"CREATE DATABASE {of}_{name}")
            (folder := home / f"{name} services").mkdir()
            libpq = {"PGHOST": "127.0.0.1", "PGPORT": str(database.port), "PGUSER": ACCOUNT, "PGPASSWORD": PASSWORD}
            told = (
                libpq | store.environment | {"PGDATABASE": f"mlflow_{name}", "MLFLOW_BACKEND_STORE_URI": "postgresql+psycopg://"}
            )
            told["MLFLOW_S3_ENDPOINT_URL"] = store.url
            uri = running.enter_context(mlflow.mlflow_server(folder, INI, told, f"s3://{name}/mlflow"))
            redis = {"type": "redis", "connection_string": f"127.0.0.1:{running.enter_context(redis_server(folder))}"}
            found[name] = store.environment | {
                "MLFLOW_TRACKING_URI": uri,
                "MLFLOW_TRACKING_USERNAME": mlflow.ADMIN,
                "MLFLOW_TRACKING_PASSWORD": mlflow.PASSWORD,
                "LLMEMB_ONLINE_STORE": json.dumps(redis),
                "LLMEMB_REGISTRY": f"postgresql+psycopg://{ACCOUNT}:{PASSWORD}@127.0.0.1:{database.port}/feast_{name}",
            }
        yield store, found
