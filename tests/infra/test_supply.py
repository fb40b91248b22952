"""Supply: what images install is named by its bytes, and what its licences are was read."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
DOCKERFILE = (INFRA / "Dockerfile").read_text()
PINNED = {
    canonicalize_name(line.split("==")[0]): line.split("==")[1]
    for line in (INFRA / "constraints.txt").read_text().splitlines()
    if "==" in line
}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMAGES = {
    name: extras.split(",")
    for name, extras in re.findall(
        r"(\w+)=([\w,-]+)",
        re.search(r"IMAGES := (.*?)\nPINS", (ROOT / "Makefile").read_text(), re.DOTALL)[1],  # type: ignore[index]
    )
}
FILES = [*IMAGES, "base-model"]
"""Of infra/requirements: one for each image, and one for the demo's LLM."""


def requirements(name: str) -> dict[str, list[tuple[str, list[str]]]]:
    """Package -> (version, hashes) of each line of an image's file; one may stand twice, for different machines."""
    text = (INFRA / "requirements" / f"{name}.txt").read_text().replace("\\\n", " ")
    found: dict[str, list[tuple[str, list[str]]]] = {}
    for line in text.splitlines():
        wanted, *hashes = re.split(r"\s+--hash=", line.strip())
        requirement = Requirement(wanted)
        (version,) = [one.version for one in requirement.specifier if one.operator == "=="]
        found.setdefault(canonicalize_name(requirement.name), []).append((version, hashes))
    return found


@pytest.mark.parametrize("image", FILES)
def test_every_package_of_an_image_is_pinned_with_its_hashes(image: str) -> None:
    found = requirements(image)
    assert found
    for name, lines in found.items():
        for version, hashes in lines:
            assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", one) for one in hashes), name
            assert version == PINNED.get(name, version), f"{name}: run `make requirements`"


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_s_file_has_all_that_its_extras_ask_for(image: str) -> None:
    wanted = [*EXTRAS["dependencies"], *(one for extra in IMAGES[image] for one in EXTRAS["optional-dependencies"][extra])]
    found = requirements(image)
    for requirement in map(Requirement, [*wanted, "setuptools>=80"]):
        versions = [version for version, _ in found.get(canonicalize_name(requirement.name), [])]
        assert versions, f"{requirement.name} is not in infra/requirements/{image}.txt: run `make requirements`"
        assert all(requirement.specifier.contains(version) for version in versions), f"{requirement.name}: `make requirements`"


def test_images_install_nothing_that_is_not_named_by_its_hash() -> None:
    calls = re.findall(r"(PIP_REQUIRE_HASHES=0 )?pip (install|wheel) ([^\n\\]*)", DOCKERFILE)
    assert len(calls) == 3 * len(IMAGES) + 1
    assert "ENV PIP_REQUIRE_HASHES=1" in DOCKERFILE
    for before, call, rest in calls:
        if before:  # the project's own wheel, from the folder, by what is installed already
            assert (call, rest) == ("wheel", "--no-deps --no-build-isolation --no-index --wheel-dir /dist .")
        elif "--no-index" in rest:
            assert (call, rest) == ("install", "--no-cache-dir --no-deps --no-index /dist/*.whl")
        else:
            assert call == "install" and re.fullmatch(r"(--no-deps )?-r [\w-]+\.txt", rest.rstrip()), rest


def test_what_is_installed_for_an_image_does_not_hang_on_the_project_s_code() -> None:
    """Else each change of a line would install gigabytes anew."""
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)
    for image in IMAGES:
        (installing,) = [stage for stage in stages if stage.startswith(f"builder AS build-{image}\n")]
        before = installing[: installing.index("pip install")]
        copied = re.findall(r"^COPY (.*) \./$", before, re.MULTILINE)
        assert len(copied) == before.count("COPY") == 1 and re.fullmatch(r"(infra/requirements/[\w-]+\.txt ?)+", copied[0]), image
        (made,) = [stage for stage in stages if re.match(rf"\w+ AS {image}\n", stage)]
        assert made.index("/opt/venv /opt/venv") < made.index("COPY jobs/recipes") < made.index("ARG REVISION")
    (java,) = [stage for stage in stages if stage.startswith("runtime AS java\n")]
    assert not re.search(r"^(COPY|ARG)", java + next(stage for stage in stages if "AS runtime\n" in stage), re.MULTILINE)


def test_base_images_are_named_by_their_digests() -> None:
    digest = r"@sha256:[0-9a-f]{64}$"
    (base,) = re.findall(r"^ARG PYTHON=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert re.search(digest, base)
    services = yaml.safe_load((INFRA / "compose.yaml").read_text())["services"]
    others = {service["image"] for service in services.values() if not service["image"].startswith("llmemb-")}
    assert len(others) == 4 and all(re.search(digest, image) for image in others), others


def test_no_image_is_taken_by_a_name_that_moves() -> None:
    stages = set(re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.MULTILINE))
    bases = set(re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)) - stages
    assert bases == {"python:${PYTHON}"}, "another one needs a digest of its own"
    copied = re.findall(r"--from=(\S+)", DOCKERFILE) + re.findall(r"--mount=\S*from=([^,\s]+)", DOCKERFILE)
    assert copied and set(copied) <= stages
    texts = [*INFRA.rglob("*"), *(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "Makefile", ROOT / ".ci" / "run"]
    for path in texts:
        if path.is_file() and path.suffix != ".pyc":
            assert not re.search(r"[a-z0-9]:latest\b|[nN]ewTag: *latest|^ARG \w+=\S*latest", path.read_text(), re.MULTILINE), path


def wheel(folder: Path, content: str) -> Path:
    """A package of one line."""
    path = folder / "shop_tool-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("shop_tool.py", content)
        file.writestr("shop_tool-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: shop-tool\nVersion: 1.0\n")
        file.writestr("shop_tool-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("shop_tool-1.0.dist-info/RECORD", "")
    return path


def test_a_package_whose_bytes_are_others_than_those_that_were_tested_is_not_installed(tmp_path: Path) -> None:
    named = hashlib.sha256(wheel(tmp_path, "GOOD = True\n").read_bytes()).hexdigest()
    wheel(tmp_path, "GOOD = False\n")  # the same name and version, from an index that was broken into
    (tmp_path / "image.txt").write_text(f"shop-tool==1.0 --hash=sha256:{named}\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--isolated",
        "--no-index",
        "--require-hashes",
        "--find-links",
        str(tmp_path),
    ]
    command += ["--target", str(tmp_path / "installed"), "-r", str(tmp_path / "image.txt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode and "DO NOT MATCH THE HASHES" in done.stderr and not (tmp_path / "installed").exists()


def licences() -> tuple[list[str], dict[str, str]]:
    """infra/licences.txt: what may be installed, and what was read by hand of single packages."""
    lines = [line for line in (INFRA / "licences.txt").read_text().splitlines() if not line.startswith("#")]
    read = [line.partition(":") for line in lines if ":" in line]
    return [line for line in lines if ":" not in line], {name: words.strip() for name, _, words in read}


def test_no_licence_is_installed_that_nobody_has_read() -> None:
    allowed, read = licences()
    command = [str(Path(sys.executable).parent / "pip-licenses"), "--python", sys.executable, "--from=mixed", "--partial-match"]
    command += ["--allow-only", ";".join(allowed), "--ignore-packages", *read]
    wanted = {*PINNED, *(name for image in FILES for name in requirements(image))} - set(read)
    done = subprocess.run([*command, "--packages", *sorted(wanted)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("image", FILES)
def test_what_only_an_image_installs_has_a_licence_that_somebody_has_read(image: str) -> None:
    """Of what is installed here, pip-licenses reads it (above)."""
    installed = {canonicalize_name(one.metadata["Name"]) for one in importlib.metadata.distributions()}
    _, read = licences()
    assert all(canonicalize_name(name) == name and words for name, words in read.items())
    unread = set(requirements(image)) - installed - set(read)
    assert not unread, f"put them into infra/licences.txt, each with the licence that it has: {sorted(unread)}"


def test_of_nvidia_s_terms_it_is_said_which_were_read() -> None:
    _, read = licences()
    own = {name: words for name, words in read.items() if name.startswith("nvidia-") and "Apache" not in words}
    assert {name for image in FILES for name in requirements(image) if name.startswith("nvidia-")} - {"nvidia-nvtx"} == set(own)
    unread = {name for name, words in own.items() if re.search(r"; not read( in this package|$)", words)}
    assert unread | {"nvidia-cuda-runtime", "nvidia-cuda-cupti", "nvidia-cufile"} == set(own)
    assert all("the text in it was read" in own[name] for name in set(own) - unread)
    assert "the texts of three were read" in (ROOT / "docs" / "security.md").read_text()


def test_the_bill_of_materials_is_made_in_every_run_of_the_checks() -> None:
    assert "make sbom" in (ROOT / ".ci" / "run").read_text().splitlines()
    assert "cyclonedx-py environment" in (ROOT / "Makefile").read_text()


def test_every_file_that_an_image_installs_from_has_its_own_bill_of_materials(tmp_path: Path) -> None:
    named = re.findall(r"-r ([\w-]+)\.txt", DOCKERFILE)
    assert set(named) == set(FILES)
    done = subprocess.run(["make", "--dry-run", "sbom"], cwd=ROOT, capture_output=True, text=True, check=True)
    (loop,) = re.findall(r"^for image in .*?^done$", done.stdout, re.DOTALL | re.MULTILINE)
    assert set(re.findall(r"^for image in (.*);", loop)[0].split()) == set(FILES)
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert "--output-file sbom-$image.json" in loop and "sbom-*.json" in ignored
    words = shlex.split(re.search(r"cyclonedx-py (requirements .*?) --output-file", loop.replace("\\\n", " "))[1])  # type: ignore[index]
    tool = str(Path(sys.executable).parent / "cyclonedx-py")
    command = [tool, *(word.replace("$image", "gpu") for word in words), "--output-file", str(tmp_path / "gpu.json")]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    bill = json.loads((tmp_path / "gpu.json").read_text())
    assert bill["bomFormat"] == "CycloneDX"
    found = {(canonicalize_name(one["name"]), one["version"]) for one in bill["components"]}
    assert found == {(name, version) for name, lines in requirements("gpu").items() for version, _ in lines}
    assert any(name.startswith("nvidia-") for name, _ in found)
