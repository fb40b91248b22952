"""PostgreSQL, a real server, as the database of Airflow, MLflow and Feast: what SQLite does on a laptop, it does on a cluster."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest

from feature_repo.reader import Reader
from jobs import lookup, publish, rollback
from jobs.engines import recommender_pyfunc, registry
from jobs.run import Run
from tests.dags.conftest import Stub, Worker, airflow_environment, migrate
from tests.feature_repo import postgresql
from tests.infra.mlflow_server import ADMIN, mlflow_server
from tests.jobs.conftest import catalogue  # noqa: F401 — a fixture
from tests.jobs.small_registry import kept

ROOT = Path(__file__).parent.parent.parent
A, B = "a" * 16, "b" * 16
ACCOUNTS = ("airflow", "mlflow", "feast")


class Server(postgresql.Server):
    """A server with a database and an account for each of Airflow, MLflow and Feast."""

    def prepare(self) -> None:
        """Makes databases and accounts as at the first start of compose.yaml's."""
        administrator = {"POSTGRES_USER": "postgres", "PGHOST": str(self.folder), "PGPORT": str(self.port)}
        passwords = {f"{name.upper()}_PASSWORD": self.password(name) for name in ACCOUNTS}
        environment = {"PATH": f"{self.bin}:{os.environ['PATH']}", **administrator, **passwords}
        subprocess.run(["sh", str(ROOT / "infra" / "databases.sh")], env=environment, check=True, capture_output=True)

    @staticmethod
    def password(name: str) -> str:
        """An account's password."""
        return f"secret0of0{name}"

    def url(self, name: str) -> str:
        """The address of an account's database, for SQLAlchemy."""
        return f"postgresql+psycopg://{name}:{self.password(name)}@127.0.0.1:{self.port}/{name}"

    def airflow(self, home: Path) -> dict[str, str]:
        """The variables of an Airflow on this server: one driver, for the scheduler's queries and the API server's."""
        address = {f"AIRFLOW__DATABASE__SQL_ALCHEMY_CONN{kind}": self.url("airflow") for kind in ("", "_ASYNC")}
        return airflow_environment(home) | address

    def rows(self, name: str, query: str, of: str = "") -> list[tuple[Any, ...]]:
        """What a query of an account finds, in its own database or that of another."""
        where = {"host": "127.0.0.1", "port": self.port, "dbname": of or name}
        with psycopg.connect(user=name, password=self.password(name), **where) as connection:
            return connection.execute(query).fetchall()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A running server, prepared."""
    with postgresql.postgresql(Server) as running:
        assert isinstance(running, Server)
        running.prepare()
        yield running


def test_each_account_opens_its_own_database_and_no_other(server: Server) -> None:
    for name in ACCOUNTS:
        assert server.rows(name, "SELECT current_user::text") == [(name,)]
        for other in {*ACCOUNTS} - {name}:
            with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
                server.rows(name, "SELECT 1", of=other)


def test_mlflow_finds_its_database_and_its_accounts_without_a_password_in_an_address(server: Server, tmp_path: Path) -> None:
    """As compose.yaml and mlflow.env say it: the address is empty, libpq's own variables tell the rest."""
    told = {"PGHOST": "127.0.0.1", "PGPORT": str(server.port), "PGUSER": "mlflow", "PGDATABASE": "mlflow"}
    told |= {"PGPASSWORD": server.password("mlflow"), "MLFLOW_BACKEND_STORE_URI": "postgresql+psycopg://"}
    with mlflow_server(tmp_path, ROOT / "infra" / "mlflow-auth.ini", told):
        assert server.rows("mlflow", "SELECT username FROM users WHERE is_admin") == [(ADMIN,)]
        assert server.rows("mlflow", "SELECT count(*) > 0 FROM experiments") == [(True,)]


# ---------------------------------------------------------------------------------------------------------------- airflow


@pytest.fixture(scope="module")
def worker(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """Airflow on this database, the jobs a stub. The tables are made twice at once, as by two schedulers that start together."""
    home = tmp_path_factory.mktemp("airflow")
    environment = server.airflow(home)
    with ThreadPoolExecutor(2) as both:
        list(both.map(migrate, [environment, server.airflow(tmp_path_factory.mktemp("another"))]))
    running = Worker(environment, Stub(home / "stub"))
    yield running
    assert running.process.stdin
    running.process.stdin.close()
    running.process.wait(10)


def test_airflow_keeps_runs_retries_and_results_in_it(server: Server, worker: Worker) -> None:
    worker.stub.plan(acts={"embed#1": [1]})
    done = worker.run("nightly_embeddings", SHARDS="2")
    assert done["state"] == "success", done
    assert done["tasks"]["embed#0"] == ["success", 1] and done["tasks"]["embed#1"] == ["success", 2]
    run = server.rows("airflow", "SELECT dag_id, state FROM dag_run")
    assert run == [("nightly_embeddings", "success")]
    assert server.rows("airflow", "SELECT count(*) FROM serialized_dag WHERE dag_id = 'nightly_embeddings'") == [(1,)]
    told = server.rows("airflow", "SELECT value #>> '{}' FROM xcom WHERE task_id = 'project' AND key = 'return_value'")
    assert "s1" in told[0][0]
    assert server.rows("airflow", "SELECT slots FROM slot_pool WHERE pool = 'gpu'") == [(1,)]


def test_airflow_s_api_server_reads_it_with_the_same_driver(worker: Worker, server: Server, tmp_path: Path) -> None:
    code = (
        "import asyncio\nfrom sqlalchemy import text\nfrom airflow.utils.session import create_session_async\n"
        "async def read():\n"
        "    async with create_session_async() as session:\n"
        "        return (await session.execute(text('SELECT count(*) FROM slot_pool'))).scalar()\n"
        "print('pools:', asyncio.run(read()))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=server.airflow(tmp_path), capture_output=True, text=True, check=False)
    assert "pools: 3" in done.stdout.splitlines(), done.stderr[-2000:]


# ----------------------------------------------------------------------------------------------------------------- mlflow


def test_mlflow_registers_versions_and_moves_aliases_in_it(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a database has no folder for artifacts: without MLflow's server they lie where one works
    run = Run(ds="2026-01-01", lake=tmp_path / "lake", tracking_uri=server.url("mlflow"), device="cpu")
    assert registry.champion(run) is None
    made = [kept(run, seed) for seed in (0, 1)]
    code = Path(recommender_pyfunc.__file__)
    log = [registry.log_run(run, "rat", {"seed": seed}, {"ndcg": 0.2}, made[seed], registry.RECOMMENDER, code) for seed in (0, 1)]
    assert log == ["1", "2"]
    assert registry.log_run(run, "rat", {"seed": 0}, {}, made[0], registry.RECOMMENDER, code) == "1", "registered once, ever"
    registry.set_aliases(run, [("champion", "1")])
    registry.set_aliases(run, [("previous", "1"), ("champion", "2")])
    expected = {"encoder_id": "e" * 16, "recommender_id": made[1].name, "version": "2", "ds": run.ds}
    assert registry.champion(run) == registry.resolve(run, "champion") == expected
    assert (registry.by_alias(run, "previous") or {})["recommender_id"] == made[0].name
    stored = server.rows("mlflow", "SELECT alias, version::text FROM registered_model_aliases ORDER BY alias")
    assert stored == [("champion", "2"), ("previous", "1")]
    shutil.rmtree(made[1])
    assert registry.fetch(run, "recommender", made[1].name) == made[1] and made[1].is_dir(), "the lake's loss is made good"


# ------------------------------------------------------------------------------------------------------------------ feast


@pytest.fixture
def lake_of(
    server: Server,
    catalogue: Callable[..., Path],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Path]:
    """Writes a small lake whose stores have Feast's registry in PostgreSQL and vectors in SQLite."""
    monkeypatch.setenv("LLMEMB_REGISTRY", server.url("feast"))
    return catalogue


def config(lake: Path, space: str) -> publish.Config:
    """A publish of a space."""
    return publish.Config(run=Run(ds="2026-01-01", lake=lake), space=space, lease_wait_s=0)


def test_feast_s_registry_in_it_serves_what_was_published_and_turns_back(server: Server, lake_of: Callable[..., Path]) -> None:
    lake = lake_of()
    assert publish.run(config(lake, A)).verified == 40
    assert lookup.run(lookup.Config(run=Run(ds="2026-01-01", lake=lake))).compared == 40
    lake_of(space=B)
    publish.run(config(lake, B))
    assert Reader.open(lake).pointer().space_id == B
    rollback.run(rollback.Config(run=Run(ds="2026-01-01", lake=lake)))
    assert Reader.open(lake).pointer().space_id == A
    views = server.rows("feast", "SELECT feature_view_name FROM feature_views WHERE project_id = 'llmemb'")
    assert {"item_embedding"} <= {name for (name,) in views}
    assert not (lake / "feast" / "registry.db").exists()


def test_a_registry_that_is_down_is_told_without_its_password_and_may_be_tried_again(
    server: Server, lake_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMEMB_REGISTRY", server.url("feast").replace(str(server.port), "9"))
    with pytest.raises(ConnectionError, match="registry can't be written") as caught:
        publish.run(config(lake_of(), A))
    assert server.password("feast") not in str(caught.value)
    monkeypatch.setenv("LLMEMB_REGISTRY", server.url("feast"))
    assert publish.run(config(lake_of(), A)).verified == 40
