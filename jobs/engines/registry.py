"""MLflow at the border: runs, registered models and the aliases champion, previous, challenger.

One version of `llmemb-recommender` names a recommender and, in its tags, the encoder that it reads; the whitening is part of
the recommender. So one alias moves encoder, whitening, recommender and space together. MLflow is imported inside functions:
training runs where it is not installed.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from jobs.engines.signatures import signature
from jobs.lake import artifacts, manifests
from jobs.run import InputError, Run, Unavailable, as_json, code_revision

RECOMMENDER = "llmemb-recommender"
ENCODER = "llmemb-encoder"
NAMES = {"recommender": RECOMMENDER, "encoder": ENCODER}
RECOMMENDER_CODE = Path(__file__).with_name("recommender_pyfunc.py")
ENCODER_CODE = Path(__file__).with_name("encoder_pyfunc.py")
ALIASES = ("champion", "previous", "challenger", "reference")
WRONG = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST", "PERMISSION_DENIED", "UNAUTHENTICATED")
"""Codes of MLflow for requests that no repetition mends."""
REQUIREMENTS = {
    "recommender": ("torch", "safetensors", "numpy"),
    "encoder": ("torch", "safetensors", "numpy", "transformers", "tokenizers", "peft"),
}
"""What a registered model needs where it is loaded; given, so that MLflow does not spend a minute guessing."""


# --------------------------------------------------------------------------------------------------------------- tracking


@contextmanager
def connected(run: Run) -> Iterator[Any]:
    """MLflow's client for the run's tracking and registry.

    Raises InputError without a `tracking_uri` and where MLflow calls the request wrong; Unavailable where it can't be reached or
    fails.
    """
    if not run.tracking_uri:
        raise InputError("run.tracking_uri is empty: models are promoted and found through MLflow, so give its address in [run]")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # unset, the server decides, and the client then goes straight to the object store, which only the server may reach
    os.environ.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "false")
    os.environ.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD", "false")
    # MLflow's own default waits four minutes for a server that is down
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")
    import mlflow
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        mlflow.set_tracking_uri(run.tracking_uri)
        mlflow.set_registry_uri(run.tracking_uri)
        yield mlflow.MlflowClient()
    except (MlflowException, SQLAlchemyError, OSError) as error:
        kind = InputError if getattr(error, "error_code", "") in WRONG else Unavailable
        raise kind(
            f"MLflow at {without_secret(run.tracking_uri)} failed: {without_secret(str(error))[:500]}; is it running, and is "
            "run.tracking_uri its address?"
        ) from error


def without_secret(text: str) -> str:
    """Text whose addresses name neither user nor password."""
    return re.sub(r"//[^/@\s]*@", "//", text)


def log_run(
    run: Run,
    job: str,
    params: Mapping[str, Any],
    metrics: Mapping[str, float],
    artifacts: Path | None = None,
    register: str | None = None,
    code: Path | None = None,
    *,
    inputs: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
    documents: Mapping[str, object] | None = None,
    curve: Sequence[Mapping[str, float]] = (),
    files: Sequence[Path] = (),
) -> str | None:
    """Records a run of a job; with `register`, its artifact folder becomes a version of that model.

    `artifacts` is a folder `models/KIND/ID` of the lake, `code` the pyfunc file that loads it (needed to register), `inputs` the
    data sets that the job read, with their digests; `documents` are kept as NAME.json, `files` as they are; `curve` are the
    figures of a training by epoch or step, see `log_curve`. An artifact that is registered already keeps its version. Returns the
    version, or None where nothing is registered or `tracking_uri` is empty. Raises InputError where MLflow can't be reached.
    """
    if not run.tracking_uri:
        return None
    with connected(run) as client:
        import mlflow

        known = {"job": job, "ds": run.ds, "code_revision": code_revision(), **(tags or {})}
        with mlflow.start_run(experiment_id=experiment(client, run), run_name=f"{job} {run.ds}", tags=known) as started:
            log_params(params)
            mlflow.log_metrics({name: float(value) for name, value in metrics.items()})
            log_curve(client, started.info.run_id, curve)
            log_inputs(inputs or {})
            log_papers(documents or {}, files)
            if artifacts is None or register is None or code is None:
                return None
            version = registered(client, register, artifacts) or add_version(register, artifacts, code, known)
            mlflow.set_tag("model_version", version)
            return version


def log_params(params: Mapping[str, Any]) -> None:
    """Nested parameters, by dotted names, of the active run."""
    import mlflow

    flat = list(flattened(params))
    for start in range(0, len(flat), 100):  # the most that one request may hold
        mlflow.log_params(dict(flat[start : start + 100]))


def log_curve(client: Any, run_id: str, curve: Sequence[Mapping[str, float]]) -> None:
    """The figures of a training as metrics `training.NAME` of a run; their step is `step` where they have one, else the epoch,
    from 1."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    points = [
        Metric(f"training.{name}", float(value), now, int(figures.get("step", epoch)))
        for epoch, figures in enumerate(curve, start=1)
        for name, value in figures.items()
        if name != "step"
    ]
    for start in range(0, len(points), 1000):  # the most that one request may hold
        client.log_batch(run_id, metrics=points[start : start + 1000])


def log_inputs(digests: Mapping[str, str]) -> None:
    """Data sets with their digests as inputs of the active run; empty digests (no champion yet) are left out."""
    import mlflow
    from mlflow.data.http_dataset_source import HTTPDatasetSource
    from mlflow.data.meta_dataset import MetaDataset

    # MLflow keeps 36 characters of a digest
    sets = [
        MetaDataset(HTTPDatasetSource(f"lake:{name}"), name=name, digest=digest[:36])
        for name, digest in digests.items()
        if digest
    ]
    if sets:
        mlflow.log_inputs(sets, [None] * len(sets), [None] * len(sets))


def log_papers(documents: Mapping[str, object], files: Sequence[Path]) -> None:
    """Documents as NAME.json, and files under their own names, of the active run."""
    import mlflow

    for name, document in documents.items():
        mlflow.log_dict(as_json(document), f"{name}.json")
    for file in files:
        mlflow.log_artifact(str(file))


def experiment(client: Any, run: Run) -> str:
    """The experiment's id; where MLflow is an SQLite file, its artifacts lie beside that file and not in the working folder."""
    found = client.get_experiment_by_name(run.experiment)
    if found is not None:
        return str(found.experiment_id)
    place = None
    if run.tracking_uri.startswith("sqlite:///"):
        place = (Path(run.tracking_uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts").as_uri()
    return str(client.create_experiment(run.experiment, artifact_location=place))


def flattened(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested parameters as (dotted name, text). The `[run]` table stays out: its address of MLflow may hold a password."""
    for name, value in params.items():
        if isinstance(value, Mapping):
            if name != "run":
                yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)[:6000]


# --------------------------------------------------------------------------------------------------------------- versions


def identity(artifact: Path) -> dict[str, str]:
    """Ids that a kept artifact stands for: its own, and of a recommender also its encoder's."""
    ids = {f"{artifact.parent.name}_id": artifact.name}
    if artifact.parent.name == "recommender" and (known := artifacts.about(artifact)):
        ids["encoder_id"] = str(known.get("encoder_id", ""))
    return ids


def registered(client: Any, model: str, artifact: Path) -> str | None:
    """The version of a model that holds this artifact, or None."""
    versions = client.search_model_versions(f"name = '{model}' and tags.artifact_id = '{artifact.name}'")
    return min((str(found.version) for found in versions), key=int, default=None)


def add_version(model: str, artifact: Path, code: Path, tags: Mapping[str, str]) -> str:
    """Logs an artifact as a pyfunc made of code and safetensors, inside the active run, and registers it."""
    import mlflow

    kind = artifact.parent.name
    # MLflow has something to say of hints in the code file, and sets filters of its own
    with warnings.catch_warnings(record=True):
        logged = mlflow.pyfunc.log_model(
            name=kind,
            python_model=str(code),
            signature=signature(kind),
            artifacts={kind: str(artifact)},
            code_paths=[str(Path(__file__).parents[2] / "models")],
            pip_requirements=[f"{name}=={installed(name).split('+')[0]}" for name in REQUIREMENTS[kind]],
        )
    known = {**tags, **identity(artifact), "artifact_id": artifact.name}
    return str(mlflow.register_model(logged.model_uri, model, tags=known).version)


def fetch(run: Run, kind: str, artifact_id: str) -> Path:
    """Folder of an artifact in the lake, brought from the registry where the lake lacks it.

    Raises InputError where neither has it, or the bytes are not those that the id stands for.
    """
    here = run.lake / "models" / kind / artifact_id
    if artifacts.has_artifact(run.lake, kind, artifact_id) or not run.tracking_uri:
        return artifacts.find(run.lake, kind, artifact_id)
    with connected(run) as client:
        import mlflow

        version = registered(client, NAMES[kind], here)
        if version is None:
            return artifacts.find(run.lake, kind, artifact_id)
        with tempfile.TemporaryDirectory() as aside:
            mlflow.artifacts.download_artifacts(f"models:/{NAMES[kind]}/{version}", dst_path=aside)
            staged = artifacts.stage(run.lake, kind)
            for file in sorted((Path(aside) / "artifacts" / artifact_id).iterdir()):
                (staged / file.name).write_bytes(file.read_bytes())
    found = artifacts.keep(run.lake, kind, staged)
    if found != artifact_id:
        raise InputError(f"version {version} of {NAMES[kind]} holds {found}, not {artifact_id}: it was changed; train it again")
    return here


# ---------------------------------------------------------------------------------------------------------------- aliases


def by_alias(run: Run, alias: str) -> dict[str, str] | None:
    """recommender_id, encoder_id, version and the ds of its training that an alias names, or None while it names nothing.

    `gated_id` is there where this one was trained on all events after another one was judged: that one's id.
    """
    if not run.tracking_uri:
        return None
    with connected(run) as client:
        # asking for an alias that is not set is an error, which looks like a registry that is broken
        known = [model for model in client.search_registered_models(f"name = '{RECOMMENDER}'") if alias in model.aliases]
        if not known:
            return None
        found = client.get_model_version(RECOMMENDER, known[0].aliases[alias])
        ids = {name: str(found.tags.get(name, "")) for name in ("recommender_id", "encoder_id", "ds")}
        judged = {"gated_id": str(found.tags["gated_id"])} if found.tags.get("gated_id") else {}
        return {**ids, **judged, "version": str(found.version)}


def judged_id(found: Mapping[str, str]) -> str:
    """The recommender that gates judged in place of one that was trained on all events: to compare with, as it saw no test."""
    return found.get("gated_id") or found["recommender_id"]


def champion(run: Run) -> dict[str, str] | None:
    """recommender_id, encoder_id, version and ds of the champion; None while there is none, or no registry."""
    return by_alias(run, "champion")


def opponent(run: Run, challenger_id: str) -> str:
    """The recommender to measure against: the champion, or once the challenger is that, the one it replaced; "" for none.

    So a night that is run again after its promotion comes to the same table.
    """
    for alias in ("champion", "previous"):
        found = by_alias(run, alias)
        if found is not None and judged_id(found) != challenger_id:
            return judged_id(found)
    return ""


def reference(run: Run, challenger_id: str) -> str:
    """The fixed reference, against which small losses of many nights add up; "" for none, or for the challenger itself."""
    found = by_alias(run, "reference")
    return judged_id(found) if found is not None and judged_id(found) != challenger_id else ""


def promoted_last(run: Run) -> str:
    """The recommender of the newest decision that promoted one, whatever the aliases say; "" where there was none."""
    with connected(run) as client:
        known = client.get_experiment_by_name(run.experiment)
        found = client.search_runs([known.experiment_id], "tags.decision = 'promoted'", max_results=1) if known else []
        return str(found[0].data.tags["recommender_id"]) if found else ""


def resolve(run: Run, which: str) -> dict[str, str]:
    """recommender_id and encoder_id of an alias, of `latest` (the newest `rat`), or of a recommender by its id.

    An artifact that the lake lacks is fetched from the registry. Raises InputError with the remedy where there is none.
    """
    if which in ALIASES:
        found = by_alias(run, which)
        if found is None:
            remedy = "run promote first" if run.tracking_uri else "give run.tracking_uri"
            raise InputError(f"no recommender is {which}: {remedy}, or name a recommender's id or 'latest'")
    else:
        made = manifests.latest(run, "rat") if which == "latest" else {"recommender_id": which}
        found = {"recommender_id": str(made["recommender_id"])}
    return {**found, **identity(fetch(run, "recommender", found["recommender_id"]))}


def set_aliases(run: Run, moves: Sequence[tuple[str, str | None]]) -> None:
    """Points aliases at versions one after the other; None removes an alias. The order decides what a kill leaves behind."""
    with connected(run) as client:
        for alias, version in moves:
            if version is None:
                client.delete_registered_model_alias(RECOMMENDER, alias)
            else:
                client.set_registered_model_alias(RECOMMENDER, alias, version)


def describe(run: Run, version: str, text: str) -> None:
    """Puts a model card beside a version of the recommender, where the registry's pages show it."""
    with connected(run) as client:
        client.update_model_version(RECOMMENDER, version, description=text)
