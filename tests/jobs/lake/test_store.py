"""Where a lake is: a folder; an address of another kind is refused by name, and no folder of that name is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.__main__ import main
from jobs.run import Run


@pytest.mark.parametrize("address", ["hdfs://name:8020/lake", "ftp://host/lake", "file:///lake", "dbfs:/lake"])
def test_an_unknown_scheme_is_refused_by_name_and_no_folder_is_made(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text(f'[run]\nlake = "{address}"\n')
    assert main(["extract", "--recipe", "recipe.toml", "--ds", "2026-01-01"]) == 2
    assert f"run.lake {address.split(':')[0]}://" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.toml"]


def test_an_address_given_as_a_path_is_refused_too() -> None:
    with pytest.raises(ValueError, match="hdfs://name/lake"):
        Run(ds="2026-01-01", lake=Path("hdfs://name/lake"))


def test_a_folder_stays_as_it_is_written(tmp_path: Path) -> None:
    assert Run(ds="2026-01-01", lake=Path("some/lake")).lake == Path("some/lake")
