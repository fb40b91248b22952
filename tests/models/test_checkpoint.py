"""The file of a training's state: what was kept comes back by name, from disk as from another process, or the old file stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from models import checkpoint
from models.checkpoint import adam_from, adam_state, read_checkpoint, write_checkpoint

STATE = {
    0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, 3).T},
    11: {"step": torch.tensor(4.0), "exp_avg": torch.zeros(2)},
}
GROUPS = {
    "model": {"items.weight": torch.arange(4.0), "sequence.layers.0.weight": torch.arange(6).reshape(2, 3)},
    "scale": {"": torch.tensor(2.5)},
    "adam": adam_state(STATE),
}
TEXTS = {"history": "[1, 2]", "best_epoch": "1"}


@pytest.mark.parametrize("sent", [False, True])
def test_tensors_come_back_by_group_and_key_and_texts_as_they_were(tmp_path: Path, sent: bool) -> None:
    file = tmp_path / "deep" / "state.safetensors"
    write_checkpoint(file, GROUPS, TEXTS)
    groups, texts = read_checkpoint(file.read_bytes() if sent else file)
    assert texts == TEXTS
    assert {group: set(values) for group, values in groups.items()} == {group: set(values) for group, values in GROUPS.items()}
    assert all(torch.equal(value, groups[group][key]) for group, values in GROUPS.items() for key, value in values.items())
    state = adam_from(groups["adam"])
    assert sorted(state) == [0, 11]
    assert all(torch.equal(value, state[number][key]) for number, values in STATE.items() for key, value in values.items())


def test_the_names_in_the_file_are_those_that_older_checkpoints_have(tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    write_checkpoint(file, GROUPS, TEXTS)
    with safe_open(file, framework="pt") as found:
        assert set(found.keys()) == {
            "model.items.weight", "model.sequence.layers.0.weight", "scale",
            "adam.0.step", "adam.0.exp_avg", "adam.11.step", "adam.11.exp_avg",
        }  # fmt: skip


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "state.safetensors"
    write_checkpoint(file, GROUPS, TEXTS)
    before = file.read_bytes()

    def dies(tensors: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", dies)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(file, {"model": {"items.weight": torch.zeros(4)}}, TEXTS)
    assert file.read_bytes() == before


def test_who_reads_the_old_checkpoint_while_a_new_one_comes_reads_it_whole(tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    write_checkpoint(file, GROUPS, TEXTS)
    before = file.read_bytes()
    with file.open("rb") as old:
        write_checkpoint(file, {"model": {"items.weight": torch.zeros(99)}}, TEXTS)
        assert old.read() == before
    assert file.read_bytes() != before
