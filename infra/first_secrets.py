"""Writes the secrets that compose.yaml asks for, each random, into a file that only its owner reads; those that are there stay.

python infra/first_secrets.py infra/.env
"""

from __future__ import annotations

import base64
import os
import re
import secrets
import sys
from pathlib import Path


def main(target: Path) -> None:
    """Adds what is missing."""
    text = target.read_text() if target.exists() else ""
    known = set(re.findall(r"^([A-Z0-9_]+)=", text, re.MULTILINE))
    wanted = re.findall(r"\$\{([A-Z0-9_]+):\?", Path(__file__).with_name("compose.yaml").read_text())
    made = [f"{name}={secret(name)}\n" for name in dict.fromkeys(wanted) if name not in known]
    with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w") as file:
        file.write(("" if text.endswith("\n") or not text else "\n") + "".join(made))
    if made:
        print(f"{target}: {len(made)} secrets made; keep the file, the data that is behind them needs it", file=sys.stderr)


def secret(name: str) -> str:
    """Letters and digits, as passwords are part of addresses; Airflow's key has a form of its own."""
    return base64.urlsafe_b64encode(secrets.token_bytes(32)).decode() if name == "FERNET_KEY" else secrets.token_hex(24)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
