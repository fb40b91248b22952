"""What only a container engine could run is held by a linter and rules: the Dockerfile."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib

import pytest

from tests.infra.documents import BIN, DOCKERFILE, INFRA, ROOT, SECRET, STAGES, last, pinned


def test_hadolint_finds_nothing_and_little_is_excused() -> None:
    command = [str(BIN / "hadolint"), "--no-color", "--failure-threshold", "style", "--format", "json", str(INFRA / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and json.loads(done.stdout) == [], done.stdout + done.stderr
    # versions of Debian's packages go with the base image, which is pinned
    assert set(re.findall(r"hadolint ignore=(\S+)", DOCKERFILE)) == {"DL3008"}


@pytest.mark.parametrize("target", ["scheduler", "spark", "gpu", "serving", "laptop"])
def test_an_image_runs_as_nobody_in_particular(target: str) -> None:
    assert last(target, "USER") == "10001:10001"
    assert last(target, "HEALTHCHECK")
    # what comes after the last USER of a stage would be made by root and read by nobody
    assert STAGES[target][-1][0] == "CMD"


def test_base_images_are_pinned_and_stages_are_named() -> None:
    defaults = dict(rest.split("=", 1) for word, rest in STAGES[""] if word == "ARG")
    for name in filter(None, STAGES):
        base = STAGES[name][0][1].split(" AS ")[0]
        base = re.sub(r"\$\{(\w+)\}", lambda variable: defaults[variable[1]], base)
        assert base in STAGES or pinned(base), base


def test_an_image_holds_one_environment_and_pulls_nothing_to_be_read() -> None:
    assert not DOCKERFILE.startswith("# syntax"), "it would be pulled before anything is built"
    for target in ("scheduler", "spark", "gpu", "serving", "laptop"):
        stage, copied = target, 0
        while stage in STAGES:
            copied += sum(word == "COPY" and rest.split()[-1] == "/opt/venv" for word, rest in STAGES[stage])
            stage = STAGES[stage][0][1].split(" AS ")[0]
        assert copied == 1, target


def test_no_secret_goes_into_an_image() -> None:
    for instructions in STAGES.values():
        for word, rest in instructions:
            if word in ("ARG", "ENV"):
                assert not any(SECRET.search(name) for name in re.findall(r"(\w+)=", rest + "=")), rest
            assert not (word == "ADD" or re.search(r"COPY .*\.env\b", f"{word} {rest}")), "nothing comes from afar, nor settings"


def test_what_the_images_install_and_copy_is_there() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for named in re.findall(r'"\.\[([a-z,]+)\]"', DOCKERFILE):
        assert set(named.split(",")) <= extras.keys(), named
    let_in = {line[1:] for line in (INFRA / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    for instructions in STAGES.values():
        for word, rest in instructions:
            if word == "COPY" and "--from" not in rest:
                for source in rest.split()[:-1]:
                    assert (ROOT / source).exists() and source.split("/")[0] in let_in, source
