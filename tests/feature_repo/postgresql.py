"""A PostgreSQL server of real processes, for the tests that need one."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest

from tests.feature_repo.sentinels import free_port

ACCOUNT = "postgres"
PASSWORD = "secret0of0postgres"


def programs() -> Path | None:
    """The folder of PostgreSQL's programs, the newest there is; Debian keeps it off the path."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: float(folder.parent.name))
    found = shutil.which("initdb", path=os.pathsep.join([*map(str, reversed(folders)), os.environ.get("PATH", "")]))
    return Path(found).resolve().parent if found else None


def account() -> dict[str, Any]:
    """Who runs the server: it refuses to be root's."""
    if os.geteuid():
        return {}
    known = {user.pw_name for user in pwd.getpwall()}
    user = pwd.getpwnam("postgres" if "postgres" in known else "nobody")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def give(folder: Path, runs_as: dict[str, Any]) -> None:
    """Makes a folder that of the account."""
    if runs_as:
        os.chown(folder, runs_as["user"], runs_as["group"])


def called(command: list[str], folder: Path, runs_as: dict[str, Any]) -> None:
    """Runs a program in a folder. Its output is a file: a server that it starts would hold a pipe open."""
    with tempfile.TemporaryFile("w+") as out:
        code = subprocess.run(command, cwd=folder, stdout=out, stderr=out, check=False, **runs_as).returncode
        out.seek(0)
        assert code == 0, out.read()[-2000:]


@cache
def template(bin_: Path) -> Path:
    """The folder of an empty database, which each server copies: making one takes ten times as long."""
    folder = Path(tempfile.mkdtemp(prefix="postgresql-template-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    give(folder, account())
    # passwords over the network as on a cluster; the socket is for a test's own set-up
    auth = ["--auth-local=trust", "--auth-host=scram-sha-256", f"--username={ACCOUNT}"]
    called([str(bin_ / "initdb"), "--pgdata", "data", "--encoding=UTF8", "--locale=C", "--no-sync", *auth], folder, account())
    return folder


class Server:
    """A server in a folder of its own; the folder's owner becomes the account that it runs as."""

    def __init__(self, folder: Path, bin_: Path, follows: Server | None = None, durable: bool = False) -> None:
        self.folder, self.bin, self.runs_as, self.durable = folder, bin_, account(), durable
        give(folder, self.runs_as)
        self.port = free_port()
        if follows is None:
            called(["cp", "-a", str(template(bin_) / "data"), "data"], folder, self.runs_as)
        else:
            where = f"host={follows.folder} port={follows.port} user={ACCOUNT}"
            self.call(
                "pg_basebackup", "--pgdata", "data", "--no-sync", "--checkpoint=fast", "--write-recovery-conf", "--dbname", where
            )
        self.start()
        if follows is None:
            with self.administrator() as connection:
                connection.execute(f"ALTER ROLE {ACCOUNT} PASSWORD '{PASSWORD}'")

    def start(self) -> None:
        """Starts it. Nothing here outlives a test, so nothing needs to reach the disk, unless it is `durable`."""
        settings: dict[str, Any] = {"port": self.port, "unix_socket_directories": self.folder}
        if not self.durable:
            settings |= {"fsync": "off", "full_page_writes": "off"}
        options = " ".join(f"-c {name}={value}" for name, value in settings.items())
        self.call("pg_ctl", "start", "--wait", "--pgdata", "data", "--log", "log", "--options", options)

    def stop(self, mode: str = "immediate") -> None:
        """Ends it: `immediate` as a kill does, without a word to anybody."""
        with contextlib.suppress(FileNotFoundError, psutil.NoSuchProcess):
            self.send_signal(signal.SIGCONT)
        self.call("pg_ctl", "stop", "--pgdata", "data", "--mode", mode)

    def send_signal(self, how: signal.Signals) -> None:
        """Signals all its processes: each connection has one."""
        if how == signal.SIGKILL:
            self.stop("immediate")
            return
        first = psutil.Process(int((self.folder / "data" / "postmaster.pid").read_text().splitlines()[0]))
        for process in [first, *first.children()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(how)

    def call(self, program: str, *arguments: str) -> None:
        """Runs one of PostgreSQL's programs."""
        called([str(self.bin / program), *arguments], self.folder, self.runs_as)

    def administrator(self) -> psycopg.Connection[Any]:
        """A connection of who may do everything."""
        return psycopg.connect(host=str(self.folder), port=self.port, user=ACCOUNT, dbname=ACCOUNT, autocommit=True)

    def online(self, schema: str, **more: Any) -> str:
        """LLMEMB_ONLINE_STORE for a schema of one's own."""
        where = {"host": "127.0.0.1", "port": self.port, "database": ACCOUNT, "sslmode": "disable", "db_schema": schema}
        return json.dumps({"type": "postgres", **where, "user": ACCOUNT, "password": PASSWORD, **more})


@contextlib.contextmanager
def postgresql(kind: type[Server] | None = None, *, durable: bool = False) -> Iterator[Server]:
    """A running server; pytest's own folders are closed to the account that it runs as. Skips where none is installed."""
    bin_ = programs()
    if bin_ is None:
        pytest.skip("PostgreSQL's programs are not installed: `apt-get install postgresql`")
    with tempfile.TemporaryDirectory(prefix="postgresql-", ignore_cleanup_errors=True) as folder:
        running = (kind or Server)(Path(folder), bin_, durable=durable)
        try:
            yield running
        finally:
            running.stop()
