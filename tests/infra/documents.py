"""Files of infra/ as the tests read them: Kubernetes, the Dockerfile's stages, Compose; and what is asked of every container."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent.parent
INFRA = ROOT / "infra"
KUBERNETES = INFRA / "kubernetes"
BIN = Path(sys.executable).parent
CLIENT_SIDE = {"Kustomization"}
"""Kinds that kubectl reads and no API server ever sees; of custom resources (CRDs) there are none."""
SECRET = re.compile(r"PASSWORD|SECRET|TOKEN|KEY(?!_ID)")
"""Variables that hold a secret; a key's id is a user's name."""
OLDEST = "1.31"
"""Kubernetes before that is out of everybody's support."""
Document = dict[str, Any]


def documents() -> Iterator[tuple[str, Document]]:
    """Every document of infra/kubernetes, with a name to show."""
    for path in sorted(KUBERNETES.glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            yield f"{path.name}:{document['kind']}/{document.get('metadata', {}).get('name', '')}", document


def variables(path: Path) -> dict[str, str]:
    """An environment file."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


DOCUMENTS = dict(documents())
KUSTOMIZATION = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())
RESOURCES = {name: document for name, document in DOCUMENTS.items() if document["kind"] not in CLIENT_SIDE}
PODS = {
    name: document["spec"] if document["kind"] == "Pod" else document["spec"]["template"]["spec"]
    for name, document in RESOURCES.items()
    if document["kind"] == "Pod" or "template" in document.get("spec", {})
}


def image(name: str) -> str:
    """An image as kustomize leaves it."""
    for known in KUSTOMIZATION["images"]:
        if name == known["name"]:
            return f"{known['newName']}:{known['newTag']}"
    return name


def check_hardened(spec: Document, *, resources: bool = True) -> None:
    """What the restricted pod standard asks, and a root that is read-only, memory that is bounded, an image that is pinned."""
    inside = spec["securityContext"]
    assert inside["runAsNonRoot"] is True and inside["runAsUser"] > 0 and inside["seccompProfile"]["type"] == "RuntimeDefault"
    assert not spec.get("hostNetwork") and not spec.get("hostPID") and not any("hostPath" in volume for volume in spec["volumes"])
    assert spec["automountServiceAccountToken"] in (True, False), "said, not left to the cluster"
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        rights = container["securityContext"]
        assert rights["readOnlyRootFilesystem"] is True and rights["allowPrivilegeEscalation"] is False
        assert rights["capabilities"] == {"drop": ["ALL"]} and not rights.get("privileged")
        assert pinned(image(container["image"])), container["image"]
        if resources:
            bounds = container["resources"]
            assert bounds["requests"].keys() >= {"cpu", "memory"}
            # no limit of CPU: it would slow a job on a node that has nothing else to do
            assert bounds["limits"]["memory"] == bounds["requests"]["memory"], "what is promised is what may be used"
        for variable in container.get("env") or []:
            assert "valueFrom" in variable or not SECRET.search(variable["name"]), variable
        assert not any("://" in part and "@" in part for part in container.get("command") or []), "an address with a password"


def pinned(name: str) -> bool:
    """Whether an image's name has a version's tag or a digest."""
    return bool(re.search(r"@sha256:[0-9a-f]{64}$|:[^:/]*\d[^:/]*$", name)) and not name.endswith(":latest")


DOCKERFILE = (INFRA / "Dockerfile").read_text()


def stages() -> dict[str, list[tuple[str, str]]]:
    """(instruction, rest) of each stage of the Dockerfile, continued lines joined; what precedes the first is stage ''."""
    found: dict[str, list[tuple[str, str]]] = {"": []}
    lines = "\n".join(line for line in DOCKERFILE.splitlines() if line.strip() and not line.startswith("#"))
    stage = ""
    for line in re.sub(r"\\\n\s*", " ", lines).splitlines():
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            stage = rest.split(" AS ")[1]
            found[stage] = []
        found[stage].append((word, rest))
    return found


STAGES = stages()


def last(stage: str, word: str) -> str | None:
    """The instruction of that name which holds at a stage's end: its own last one, or that of the stage it is built on."""
    if stage not in STAGES:
        return None
    own = [rest for name, rest in STAGES[stage] if name == word]
    return own[-1] if own else last(STAGES[stage][0][1].split(" AS ")[0], word)


COMPOSE = (INFRA / "compose.yaml").read_text()
SERVICES: dict[str, Document] = yaml.safe_load(COMPOSE)["services"]
ONCE = {"airflow-init", "object-storage-init"}
"""Services that do one thing and end."""
