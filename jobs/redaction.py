"""What a text may not keep: passwords in addresses, and values of parameters that are called password, token, secret or key.

Recipes, errors and results go into manifests, logs, MLflow, lineage and the page; each of them goes through here first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
USER_INFO = re.compile(r"(?<=://)[^/\s'\"<>@]*(?:@[^/\s'\"<>@]*)*@(?=[^\s@])")
"""`user:password@` of an address; a password may hold an @ that nobody escaped."""
NAMED = re.compile(
    r"""((?<![A-Za-z0-9])(?:[A-Z0-9]+_)*(?:password|passwd|passphrase|pwd|secret|token|api[-_]?key|access[-_]?key|secret[-_]?key|
    account[-_]?key|sig|signature|credentials?|authorization)["']?\s*[=:]\s*["']?(?:(?:bearer|basic)\s+)?)
    [^\s,;&"'}\])]+""",
    re.IGNORECASE | re.VERBOSE,
)
"""`password=…` in a connection string, a query, a header or JSON."""
KEYS = re.compile(
    r"(?:.*[-_.])?(?:password|passwd|passphrase|secret|token|(?:api|access|secret)[-_]?key|credentials?)", re.IGNORECASE
)
"""Names of values that are secret as a whole, such as Spark's `fs.s3a.secret.key`."""


def redacted(text: str) -> str:
    """A text without the secrets that it shows by their form."""
    return NAMED.sub(rf"\1{HIDDEN}", USER_INFO.sub(f"{HIDDEN}@", text))


def without_secrets(value: Any) -> Any:
    """A JSON value whose texts are redacted, and whose values under a secret's name are hidden whole."""
    if isinstance(value, Mapping):
        return {key: HIDDEN if hides(str(key), part) else without_secrets(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(part) for part in value]
    return redacted(value) if isinstance(value, str) else value


def hides(name: str, value: Any) -> bool:
    """Whether a value is a secret by its name alone."""
    return isinstance(value, str) and bool(value) and bool(KEYS.fullmatch(name.replace(".key", "_key")))


def has_password(text: str) -> bool:
    """Whether a text has an address with a password in it."""
    return bool(re.search(r"://[^/\s:@]*:[^/\s@]+@", text))
