"""A net for what others wrote: `user:password@` of an address, and the value of what is called password, secret, token or a key.

The same file is `feature_repo/serving/redaction.py` and `dags/job_redaction.py`: neither may import the jobs, whose net
(`jobs/redaction.py`) is finer. This one rather hides too much.
"""

from __future__ import annotations

import re

HIDDEN = "***"
USER = re.compile(r"""(?<=//)(?:[^\s/@'"<>:]{0,300}:[^\s'"<>]{0,300}|[^\s/'"<>]{0,300})@""")
"""What stands before the last @ of an address; after a `:` it may hold a slash."""
VALUE = re.compile(
    r"""(?P<name>(?:passw(?:or)?ds?|passphrase|pwd|secret|token|credentials?|signature|\bsig|_auth|_pass|authorization
        |(?:api|access|secret|account|private)[._-]?key)
        (?:\\{0,9}["'])?(?:\s{0,9}[=:]\s{0,9}|%3D)(?:(?:bearer|basic)\s{1,9})?)
    (?:"(?:\\.|[^"\\])*+"?|'(?:\\.|[^'\\])*+'?|(?P<quote>\\{1,9}["']).*?(?:(?P=quote)|$)|(?!\*\*\*)[^\s,;&"'\\]+)""",
    re.IGNORECASE | re.VERBOSE,
)
"""`name=`, `name: `, `"name": ` and what follows: a text in quotes, or a word."""


def redacted(text: str) -> str:
    """A text without the secrets that it shows by their form."""
    return VALUE.sub(rf"\g<name>{HIDDEN}", USER.sub(f"{HIDDEN}@", text))
