"""A night's manifests -> OpenLineage events, made and sent by the project's own client.

An event stands for a job's run: what it read and wrote, each with the digest of its bytes as the data set's version, under the
night as its parent run. The client is imported inside functions: it takes a second.
"""

from __future__ import annotations

import datetime as dt
import logging
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from jobs.engines.spark import AS_OF, IN_TICKS
from jobs.lake.nights import JobRun, Night
from jobs.redaction import without_users
from jobs.run import InputError

if TYPE_CHECKING:
    from openlineage.client.event_v2 import InputDataset, OutputDataset, RunEvent
    from openlineage.client.facet_v2 import OutputDatasetFacet, RunFacet

PRODUCER = "urn:llmemb:jobs"
NIGHT = "night"
"""Job of the parent run."""
LAKE_PARTITION = re.compile(r"\w+/(ds|space|encoder)=")
"""How a partition of the lake is written, which a path of the user's is not."""
FILES = re.compile(rf"\w+\.{IN_TICKS.pattern}")
"""How Spark's SQL writes files as a table, with their format."""
API_KEY = "OPENLINEAGE_API_KEY"
"""Environment variable of the client that holds the endpoint's key."""
TIMEOUT_S, RETRIES = 5.0, 2


# ----------------------------------------------------------------------------------------------------------------- making


def events(night: Night, namespace: str) -> list[RunEvent]:
    """A START and a COMPLETE or FAIL event for each run, in the order of the data; equal manifests give equal events."""
    return [event for run in night.runs for event in run_events(night, run, namespace)]


def run_events(night: Night, run: JobRun, namespace: str) -> Iterator[RunEvent]:
    """The two events of one run."""
    from openlineage.client import event_v2
    from openlineage.client.event_v2 import RunState

    begun = started(night, run)
    # a manifest that counts a million years is no reason for none of the events
    ended = begun + dt.timedelta(seconds=min(max(run.seconds, 0), 1e9))
    run_id = identity(namespace, night.ds, run.name, begun.isoformat())
    rows = run.result.get("rows") or {}
    last = RunState.COMPLETE if run.status == "done" else RunState.FAIL
    for state, at in ((RunState.START, begun), (last, ended)):
        facets = run_facets(night, run, namespace, ended=state is last)
        yield event_v2.RunEvent(
            eventType=state,
            eventTime=at.isoformat(),
            run=event_v2.Run(runId=run_id, facets=facets),
            job=event_v2.Job(namespace=namespace, name=run.job),
            inputs=list(inputs(run.result.get("inputs"), namespace)),
            outputs=list(outputs(run.result.get("outputs"), namespace, rows)) if state is last else [],
            producer=PRODUCER,
        )


def identity(*parts: str) -> str:
    """A run's id, the same whenever and wherever it is made."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, "/".join(parts)))


def started(night: Night, run: JobRun) -> dt.datetime:
    """When a run began; the night's first moment where it does not tell."""
    try:
        begun = dt.datetime.fromisoformat(run.manifest["started_at"])
        return begun if begun.tzinfo else begun.replace(tzinfo=dt.UTC)
    except (KeyError, TypeError, ValueError):
        return dt.datetime.fromisoformat(f"{night.ds}T00:00:00+00:00")


def run_facets(night: Night, run: JobRun, namespace: str, *, ended: bool) -> dict[str, RunFacet]:
    """The night as parent run; of a run that has ended also the night's date, the code, and the error where there is one."""
    from openlineage.client.facet_v2 import RunFacet, error_message_run, nominal_time_run, parent_run

    parent = parent_run.ParentRunFacet(
        run=parent_run.Run(runId=identity(namespace, night.ds)),
        job=parent_run.Job(namespace=namespace, name=NIGHT),
        producer=PRODUCER,
    )
    found: dict[str, RunFacet] = {"parent": parent}
    if not ended:
        return found
    nominal = nominal_time_run.NominalTimeRunFacet(nominalStartTime=f"{night.ds}T00:00:00Z", producer=PRODUCER)
    found["nominalTime"] = nominal
    if run.manifest.get("error"):
        error = str(run.manifest["error"])
        found["errorMessage"] = error_message_run.ErrorMessageRunFacet(
            message=error, programmingLanguage="python", producer=PRODUCER
        )
    known = {"codeRevision": run.manifest.get("code_revision", ""), "recipeSha256": run.manifest.get("recipe_sha256", "")}
    # custom facets carry a prefix, as the specification asks
    found["llmemb_manifest"] = cast("RunFacet", RunFacet(producer=PRODUCER).with_additional_properties(**known))
    return found


# -------------------------------------------------------------------------------------------------------------- data sets


def inputs(digests: object, namespace: str) -> Iterator[InputDataset]:
    """Data sets of a Result's inputs."""
    from openlineage.client.event_v2 import InputDataset

    for place, name, digest in versions(digests, namespace):
        yield InputDataset(namespace=place, name=name, facets={"version": version(digest)})


def outputs(digests: object, namespace: str, rows: Mapping[str, Any]) -> Iterator[OutputDataset]:
    """Data sets of a Result's outputs, with their row counts where these are known."""
    from openlineage.client.event_v2 import OutputDataset
    from openlineage.client.facet_v2 import output_statistics_output_dataset as statistics

    for place, name, digest in versions(digests, namespace):
        given: dict[str, OutputDatasetFacet] = {}
        count = rows.get(name)
        if isinstance(count, int) and count >= 0:
            given["outputStatistics"] = statistics.OutputStatisticsOutputDatasetFacet(rowCount=count, producer=PRODUCER)
        yield OutputDataset(namespace=place, name=name, facets={"version": version(digest)}, outputFacets=given)


def versions(digests: object, namespace: str) -> Iterator[tuple[str, str, str]]:
    """(namespace, name, digest) of data sets; empty digests (no champion yet) and names are left out."""
    for written, digest in (digests if isinstance(digests, Mapping) else {}).items():
        if digest and str(written).strip():
            yield *data_set(str(written), namespace), str(digest)


def version(digest: str) -> Any:
    """The facet that holds the digest of a data set's bytes."""
    from openlineage.client.facet_v2 import dataset_version_dataset

    return dataset_version_dataset.DatasetVersionDatasetFacet(datasetVersion=digest, producer=PRODUCER)


def data_set(written: str, namespace: str) -> tuple[str, str]:
    """A name of a manifest -> (namespace, name) as OpenLineage names data sets.

    A table of the lake has one name, whoever reads or writes it, so that a lineage graph hangs together; its partition is in the
    version. A source table keeps its name, whatever time it is read as of. A source path is named by its storage, without user
    or password.
    """
    from openlineage.client.naming import dataset as naming

    written = written.strip()
    if past := AS_OF.fullmatch(written):
        written = past["name"]
    if files := FILES.fullmatch(written):
        written = files[1]
    written = without_users(written) if "/" in written else written.replace("`", "")
    if "/" not in written or LAKE_PARTITION.match(written):
        return namespace, written.partition("/")[0]
    url = urlsplit(written)
    host, path = url.netloc.rpartition("@")[2], url.path.rstrip("/") or "/"
    if url.scheme in ("s3", "s3a", "s3n"):
        named: naming.DatasetNaming = naming.S3(host, path.strip("/") or "/")
        return named.get_namespace(), named.get_name()
    if url.scheme in ("", "file"):
        return naming.LocalFileSystem(path).get_namespace(), path
    # a container of Azure stands where others have a user
    container = url.username if url.scheme in ("abfs", "abfss", "wasb", "wasbs") else ""
    return f"{url.scheme}://{f'{container}@' if container else ''}{host}", path


# ---------------------------------------------------------------------------------------------------------------- sending


def check_endpoint(url: str) -> None:
    """Raises InputError for what is no HTTP address, and for one that holds a secret: recipes are kept in manifests."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"report.openlineage_url {url!r} is no address: write it as http://marquez:5000/api/v1/lineage")
    if parts.query or "@" in parts.netloc:
        raise InputError(
            f"report.openlineage_url for {parts.hostname} holds credentials or a query: put the key in the environment variable "
            f"{API_KEY}"
        )


def lines(found: Sequence[RunEvent]) -> str:
    """The events as JSON, one a line."""
    from openlineage.client.serde import Serde

    return "".join(f"{Serde.to_json(event)}\n" for event in found)


def send(found: Sequence[RunEvent], url: str) -> int:
    """Posts events to an OpenLineage endpoint, in order; returns how many it took. Raises OSError at the first it does not.

    The key is that of `OPENLINEAGE_API_KEY`; any other way to authenticate, and filters, are the client's own configuration
    (`OPENLINEAGE__TRANSPORT__AUTH`, `openlineage.yml`).
    """
    from openlineage.client import OpenLineageClient

    # at lower levels it quotes settings that it can't read, and a key may be one of them
    logging.getLogger("openlineage.client").setLevel(logging.ERROR)
    client = OpenLineageClient(config={"transport": transport(url)})
    if client.transport.kind == "noop":
        return 0
    try:
        for event in found:
            client.emit(event)
    finally:
        client.close()
    return len(found)


def transport(url: str) -> dict[str, Any]:
    """The client's settings for an endpoint: its address, and the key where the environment holds one."""
    parts = urlsplit(url)
    found: dict[str, Any] = {
        "type": "http",
        "url": f"{parts.scheme}://{parts.netloc}/",
        "timeout": TIMEOUT_S,
        "retry": {"total": RETRIES, "connect": RETRIES, "read": RETRIES},
    }
    if endpoint := parts.path.strip("/"):
        found["endpoint"] = endpoint
    if key := os.environ.get(API_KEY):
        found["auth"] = {"type": "api_key", "apiKey": key}
    return found
