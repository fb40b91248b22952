"""What a job's process inherits: an allow-list, and each kind of job its own secrets. A pod's environment is its template's.

A recipe's own variables, such as the password of a table's source, are named in LLMEMB_PASS_ENV (for all jobs) or
LLMEMB_PASS_ENV_EXTRACT (for one): names or patterns, separated by commas.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

COMMON = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "LC_*", "TZ", "TMPDIR", "TMP", "TEMP", "XDG_CACHE_HOME"),
    *("VIRTUAL_ENV", "PYTHON*", "LD_LIBRARY_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
    *("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"),
    *("OMP_*", "MKL_*", "OPENBLAS_*", "NUMEXPR_*", "CUDA_*", "NVIDIA_*", "NCCL_*", "TORCH*", "PYTORCH_*", "LLMEMB_*", "HF_*"),
    *("TRANSFORMERS_*", "TOKENIZERS_*", "MLFLOW_*"),
)
SPARK = ("SPARK_*", "PYSPARK_*", "JAVA_HOME", "JAVA_TOOL_OPTIONS", "HADOOP_*", "YARN_*", "KRB5*")
STORES = ("LLMEMB_ONLINE_STORE", "LLMEMB_REGISTRY", "LLMEMB_FEAST_AUTH")
REGISTRY = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_CLIENT_CERT_PATH")
LINEAGE = ("OPENLINEAGE_*",)
HUB = ("HF_TOKEN",)
NOBODY = ("LLMEMB_ALERT_URL", "LLMEMB_SERVING_*", "MLFLOW_BACKEND_STORE_URI", "MLFLOW_REGISTRY_STORE_URI", "MLFLOW_AUTH_*",
          "MLFLOW_FLASK_SERVER_SECRET_KEY", "HF_TOKEN_PATH", "*PASSWORD*", "*SECRET*", "*_TOKEN", "*_KEY")  # fmt: skip
"""Never inherited by a general pattern: secrets of other services."""
OWN = {
    "extract": SPARK,
    "movielens": SPARK,
    "scft": REGISTRY + HUB,
    "embed": REGISTRY + HUB,
    "pretrain": REGISTRY,
    "rat": REGISTRY,
    "evaluate": REGISTRY + HUB,
    **dict.fromkeys(("bakeoff", "rerank", "generate"), REGISTRY),
    "codes": REGISTRY + STORES,
    "promote": REGISTRY,
    "project": REGISTRY,
    "pin": REGISTRY + STORES,
    "publish": REGISTRY + STORES,
    "recommend": REGISTRY + STORES,
    "rollback": REGISTRY + STORES,
    "collect": REGISTRY + STORES,
    "lookup": STORES,
    "explain": STORES,
    "forget": STORES,
    "report": REGISTRY + LINEAGE,
}
"""What each job gets besides: nothing that trains or embeds sees the stores."""


def environment_of(job: str, given: Mapping[str, str]) -> dict[str, str]:
    """The variables of a job's process, out of those of the worker."""
    named = ",".join(given.get(f"LLMEMB_PASS_ENV{suffix}", "") for suffix in ("", f"_{job.upper()}"))
    own = (*OWN.get(job, ()), *(name.strip() for name in named.split(",") if name.strip()))
    return {name: value for name, value in given.items() if matches(name, own) or (matches(name, COMMON) and not secret(name))}


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a name is one of the patterns'."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def secret(name: str) -> bool:
    """Whether a variable goes to those alone that need it."""
    return matches(name, STORES + REGISTRY + LINEAGE + HUB + NOBODY)
