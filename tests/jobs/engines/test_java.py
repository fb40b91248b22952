"""Java's options on a laptop: never two collectors, and an archive of classes that is whole, of this Java, and nobody's else."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from jobs.engines import java


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Java's folder beside Spark's jars, and no variable with options."""
    for name in java.OPTIONS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LLMEMB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(java, "shown_version", lambda program: "17.0.1")
    (tmp_path / "jars").mkdir()
    return tmp_path


def archived(options: list[str]) -> tuple[str, Path]:
    """(What is done with the archive, the archive)."""
    use, _, path = options[0].strip('"').partition("=")
    return use, Path(path)


def test_a_run_keeps_its_classes_and_the_next_one_starts_from_them(place: Path) -> None:
    use, file = archived(java.archive(place / "jars", keep=True))
    assert use == "-XX:ArchiveClassesAtExit"
    for unfinished in (b"", bytes(8)):  # Java writes the head last: it was killed
        file.write_bytes(unfinished)
        assert archived(java.archive(place / "jars", keep=True)) == (use, file)
        assert java.archive(place / "jars", keep=False) == []
    file.write_bytes(b"\xa8\xab\x0b\xf0 and more")
    assert archived(java.archive(place / "jars", keep=True)) == ("-XX:SharedArchiveFile", file)
    assert java.archive(place / "jars", keep=False) == java.archive(place / "jars", keep=True)
    assert "-XX:+VerifySharedSpaces" in java.archive(place / "jars", keep=False)
    assert f'"-XX:ErrorFile={file.parent}/hs_err_pid%p.log"' in java.archive(place / "jars", keep=False)


def test_an_archive_of_another_java_or_of_other_jars_goes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [archived(java.archive(place / "jars", keep=True))[1]]
    files[0].write_bytes(b"whole")
    (place / "jars" / "spark.jar").touch()
    files.append(archived(java.archive(place / "jars", keep=True))[1])
    assert not files[0].exists()
    files[1].write_bytes(b"whole")
    monkeypatch.setattr(java, "shown_version", lambda program: "17.0.2")
    files.append(archived(java.archive(place / "jars", keep=True))[1])
    assert not files[1].exists()
    assert len(set(files)) == 3


def test_who_gives_java_options_has_no_archive_nor_has_a_closed_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "file").touch()
    monkeypatch.setenv("LLMEMB_CACHE", str(place / "file"))
    assert java.archive(place / "jars", keep=True) == []
    monkeypatch.setenv("LLMEMB_CACHE", str(place / "cache"))
    assert java.archive(place / "jars", keep=True)
    monkeypatch.setenv("JDK_JAVA_OPTIONS", "-Xss8m")
    assert java.archive(place / "jars", keep=True) == []


def test_a_collector_that_somebody_named_stays_the_only_one(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def collectors(given: str = "") -> list[str]:
        return [option for option in java.compiling(given) if option.endswith("GC")]

    for cores, own in {1: "-XX:+UseSerialGC", 2: "-XX:+UseSerialGC", 3: "-XX:+UseParallelGC", None: "-XX:+UseSerialGC"}.items():
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert collectors("-Xss8m") == [own]
    assert collectors("-XX:+UseZGC") == []
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-XX:+UseG1GC")
    assert collectors() == []


@pytest.mark.parametrize("cores", [2, 3])
def test_java_knows_its_options_by_these_names(place: Path, monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    words = [java.java_program(), *java.compiling(""), "-XX:+PrintFlagsFinal", "-version"]
    shown = subprocess.run(words, capture_output=True, text=True, check=True)
    found = {words[1]: words[3] for words in map(str.split, shown.stdout.splitlines()) if len(words) > 3}
    wanted = {"Invocation": "200000", "MinInvocation": "24000", "Compile": "600000", "BackEdge": "1600000"}
    assert {name: found[f"Tier4{name}Threshold"] for name in wanted} == wanted
    assert found["UseSerialGC" if cores == 2 else "UseParallelGC"] == "true"


def test_a_java_without_the_vector_module_gets_a_launcher_that_drops_the_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMEMB_CACHE", str(tmp_path))
    echo = tmp_path / "echo"
    echo.write_text('#!/bin/sh\nprintf \'openjdk version "%s"\' "25" >&2; printf \'%s|\' "$@"\n')
    echo.chmod(0o755)
    home = java.launcher(echo)
    shown = subprocess.run(
        [home / "bin" / "java", "--add-modules=jdk.incubator.vector", "-a b", "-c"], capture_output=True, text=True, check=True
    )
    assert shown.stdout == "-a b|-c|"
    assert java.java_version(home / "bin" / "java") == 25
    assert java.java_version(tmp_path / "none") == 0
