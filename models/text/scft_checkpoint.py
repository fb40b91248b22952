"""The state of an interrupted SCFT as one safetensors file: tensors by name, and the record of the training as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load, save_file
from torch import Tensor


def write_checkpoint(path: Path, groups: Mapping[str, Mapping[Any, Tensor]], known: Mapping[str, Any]) -> None:
    """Replaces the file at once. A tensor's name in it is `group.key`, or `group` where the key is empty."""
    tensors = {f"{group}.{key}".rstrip("."): value for group, values in groups.items() for key, value in values.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".aside")
    save_file({name: value.cpu().clone() for name, value in tensors.items()}, aside, metadata={"known": json.dumps(known)})
    aside.replace(path)


def read_checkpoint(content: bytes) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The file's bytes -> its tensors by group and key, and the record."""
    size = int.from_bytes(content[:8], "little")  # of the header, which is JSON: so safetensors files begin
    known: dict[str, Any] = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["known"])
    tensors = load(content)
    groups: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        group, _, key = name.partition(".")
        groups.setdefault(group, {})[key] = value
    return groups, known
