"""What the serving process is told by its environment, and nothing else tells it.

Every variable begins with LLMEMB_SERVING_; where the stores are say LLMEMB_ONLINE_STORE and LLMEMB_REGISTRY, as everywhere.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import os
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

PREFIX = "LLMEMB_SERVING_"
MAY_BE_ZERO = ("remembered", "remembered_s", "window_ms", "exact_numbers")
LOCAL = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Field `poll_s` is the variable LLMEMB_SERVING_POLL_S, and so on."""

    artifacts: str = ""
    """Folder or address (`s3://bucket/lake`) that holds `indexes/` and `models/recommender/`: the lake, or a copy of both."""
    cache: str = ""
    """Local folder into which artifacts are copied and there mapped; empty maps them where they lie."""
    host: str = "127.0.0.1"
    port: int = 8100
    workers: int = 1
    """Processes; they share the mapped vectors."""
    token: str = field(default="", repr=False)
    """What callers must send as `Authorization: Bearer …`. Needed where the host is not this machine alone."""
    certificate: str = ""
    """TLS: file of the server's certificate chain."""
    key: str = ""
    """TLS: file of its private key."""
    client_ca: str = ""
    """mTLS: file of the authorities that sign callers' certificates; callers without one are turned away."""
    page: bool = False
    """Serves the page for people at `/`; it needs the token too, where one is set."""
    page_users: str = field(default="", repr=False)
    """Users that the page offers, with commas between; for a demo."""
    poll_s: float = 0.5
    """Seconds between two looks at the pointer."""
    store_ms: float = 50.0
    """Time limit of one read of a user's history; one more try is made."""
    breaker_failures: int = 5
    """Failed reads in a row after which the store is left alone."""
    breaker_s: float = 1.0
    """Seconds for which it is left alone; then one read tries it again."""
    remembered: int = 50_000
    """Users whose last history stays in memory, for when the store is down; fewer with over 100 items each, 0 keeps none."""
    remembered_s: float = 3600.0
    """Seconds that a history stays there."""
    window_ms: float = 0.0
    """Time for which a request waits for others, to be encoded with them; what comes while a batch is in work makes the next."""
    batch: int = 32
    """Histories encoded at once, at most."""
    waiting: int = 128
    """Requests in work at once; more are told 503 with Retry-After."""
    request_s: float = 2.0
    """Seconds a request may take before it is given up with 503."""
    body_bytes: int = 1_000_000
    """Largest body of a request."""
    body_s: float = 5.0
    """Seconds a caller may take to send its request."""
    most: int = 1_000
    """Largest k, and most ids of one request."""
    exact_numbers: int = 4_000_000
    """Up to so many numbers (items x width) a search is exact, by matrix product; above, by codes or the graph."""
    breadth: int = 250
    """Candidates of a search by the graph; half as many of codes. More is slower and finds more."""

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            value, least = getattr(self, one.name), 0 if one.name in MAY_BE_ZERO else 1 if one.type == "int" else 1e-9
            if one.type in ("int", "float") and not least <= value < math.inf:
                raise ValueError(f"{PREFIX}{one.name.upper()} is {value}: give {'0 or more' if least == 0 else 'more than 0'}")
        if self.port > 65_535:
            raise ValueError(f"{PREFIX}PORT is {self.port}: ports end at 65535")
        if self.token != self.token.strip():
            raise ValueError(f"{PREFIX}TOKEN begins or ends with a space or a line's end, which no header can send")
        if bool(self.certificate) != bool(self.key) or (self.client_ca and not self.certificate):
            raise ValueError(f"{PREFIX}CERTIFICATE and {PREFIX}KEY come together, and {PREFIX}CLIENT_CA needs both")
        for name in ("certificate", "key", "client_ca"):
            if getattr(self, name) and not Path(getattr(self, name)).is_file():
                raise ValueError(f"{PREFIX}{name.upper()} names no file")
        if self.host not in LOCAL and not self.token and not self.client_ca:
            raise ValueError(f"{PREFIX}HOST is {self.host}, which others reach: set {PREFIX}TOKEN, or {PREFIX}CLIENT_CA for mTLS")


def from_environment(environment: Mapping[str, str] = os.environ) -> Settings:
    """Settings from variables. Raises ValueError for an unknown one and for a value of another kind, which it does not repeat."""
    kinds = {field.name: field.type for field in dataclasses.fields(Settings)}
    given = {name.removeprefix(PREFIX).lower(): text for name, text in environment.items() if name.startswith(PREFIX)}
    if unknown := sorted(given.keys() - kinds.keys()):
        raise ValueError(f"{PREFIX}{unknown[0].upper()} is no setting of the serving process: see docs/serving.md")
    return Settings(**{name: parsed(name, text, str(kinds[name])) for name, text in given.items()})  # type: ignore[arg-type]


def parsed(name: str, text: str, kind: str) -> str | int | float | bool:
    """A variable's text as its field's type. Raises ValueError."""
    try:
        if kind == "bool":
            return {"1": True, "true": True, "0": False, "false": False, "": False}[text.lower()]
        made: str | int | float = {"str": str, "int": int, "float": float}[kind](text)
        return made
    except (KeyError, ValueError):
        raise ValueError(f"{PREFIX}{name.upper()} is no {kind}: see docs/serving.md") from None


def told() -> str:
    """Every variable with its default, and the text under its field."""
    (kind,) = ast.parse(inspect.getsource(Settings)).body
    assert isinstance(kind, ast.ClassDef)
    defaults, lines = {one.name: one.default for one in dataclasses.fields(Settings)}, []
    for one, text in zip(kind.body, [*kind.body[1:], None], strict=True):
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name):
            lines.append(f"  {PREFIX}{one.target.id.upper()}={defaults[one.target.id]}")
            if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                lines += textwrap.wrap(str(text.value.value), 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)
