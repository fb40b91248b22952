"""A training's state as one safetensors file that is replaced at once: tensors by group and key, and a few texts beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load, save_file
from torch import Tensor

Groups = dict[str, dict[str, Tensor]]


def write_checkpoint(path: Path, groups: Mapping[str, Mapping[Any, Tensor]], texts: Mapping[str, str]) -> None:
    """Replaces the file at once. A tensor's name in it is `group.key`, or `group` where the key is empty."""
    tensors = {f"{group}.{key}".rstrip("."): value for group, values in groups.items() for key, value in values.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".aside")
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, aside, metadata=dict(texts))
    aside.replace(path)


def read_checkpoint(source: Path | bytes) -> tuple[Groups, dict[str, str]]:
    """A checkpoint's file, or its content as another process sent it -> its tensors by group and key, and the texts."""
    if isinstance(source, bytes):
        size = int.from_bytes(source[:8], "little")  # of the header, which is JSON: so safetensors files begin
        texts: dict[str, str] = json.loads(source[8 : 8 + size])["__metadata__"]
        tensors = load(source)
    else:
        with safe_open(source, framework="pt") as file:
            texts = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    groups: Groups = {}
    for name, value in tensors.items():
        group, _, key = name.partition(".")
        groups.setdefault(group, {})[key] = value
    return groups, texts


def adam_state(given: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The `state` of an optimiser's state_dict -> the group that a checkpoint keeps, by `parameter.key`."""
    return {f"{number}.{key}": value for number, values in given.items() for key, value in values.items()}


def adam_from(group: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """The other way round."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in group.items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = value
    return state
