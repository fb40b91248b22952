"""Supply: what images install is named by its bytes, and what its licences are was read."""

from __future__ import annotations

import hashlib
import re
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


@pytest.mark.parametrize("image", [*IMAGES, "base-model"])
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
    installs = re.findall(r"(PIP_REQUIRE_HASHES=0 )?pip install ([^\n\\]*)", DOCKERFILE)
    assert len(installs) == 11
    assert "ENV PIP_REQUIRE_HASHES=1" in DOCKERFILE
    for before, rest in installs:
        if before == "PIP_REQUIRE_HASHES=0 ":  # the project's own wheel, from the folder, by what is installed already
            assert rest.rstrip() == "--no-deps --no-build-isolation --no-index ."
        else:
            assert re.fullmatch(r"(--no-deps )?-r infra/requirements/[\w-]+\.txt", rest.rstrip()), rest


def test_base_images_are_named_by_their_digests() -> None:
    digest = r"@sha256:[0-9a-f]{64}$"
    (base,) = re.findall(r"^ARG PYTHON=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert re.search(digest, base)
    services = yaml.safe_load((INFRA / "compose.yaml").read_text())["services"]
    others = {service["image"] for service in services.values() if not service["image"].startswith("llmemb-")}
    assert len(others) == 4 and all(re.search(digest, image) for image in others), others


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


def test_no_licence_is_installed_that_nobody_has_read() -> None:
    lines = [line for line in (INFRA / "licences.txt").read_text().splitlines() if not line.startswith("#")]
    allowed = [line for line in lines if ":" not in line]
    command = [str(Path(sys.executable).parent / "pip-licenses"), "--python", sys.executable, "--from=mixed", "--partial-match"]
    command += ["--allow-only", ";".join(allowed), "--ignore-packages", *(line.split(":")[0] for line in lines if ":" in line)]
    pinned = [name for name in PINNED if name not in {line.split(":")[0] for line in lines if ":" in line}]
    done = subprocess.run([*command, "--packages", *pinned], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_bill_of_materials_is_made_in_every_run_of_the_checks() -> None:
    assert "make sbom" in (ROOT / ".ci" / "run").read_text().splitlines()
    assert "cyclonedx-py environment" in (ROOT / "Makefile").read_text()
