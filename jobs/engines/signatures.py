"""What registered models take and give, for MLflow's pages and for who serves them by MLflow."""

from __future__ import annotations

from typing import Any


def signature(kind: str) -> Any:
    """The MLflow signature of a kind of artifact, or None.

    An encoder reads whatever fields a catalogue has, so its inputs are not named. MLflow hands named inputs on as a data frame of
    one row, in double precision.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec
    from mlflow.types.schema import Array

    numbers, names = Array(Array(DataType.double)), Array(Array(DataType.string))
    if kind == "recommender":
        return ModelSignature(
            inputs=Schema([
                ColSpec(Array(DataType.string), "item_ids"), ColSpec(numbers, "embeddings"),
                ColSpec(names, "histories", required=False), ColSpec(DataType.long, "k", required=False),
            ]),
            outputs=Schema([
                ColSpec(numbers, "vectors", required=False), ColSpec(names, "item_ids", required=False),
                ColSpec(numbers, "scores", required=False),
            ]),
        )  # fmt: skip
    if kind == "encoder":
        import numpy as np

        return ModelSignature(outputs=Schema([TensorSpec(np.dtype("float32"), (-1, -1))]))
    return None
