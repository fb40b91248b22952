"""The encoder as MLflow loads it ("models from code"): raw attribute records -> embeddings.

`registry.py` logs this file with the artifact "encoder" (the folder that `scft` kept) and the package `models`. Nothing is
pickled: a reload reads safetensors and JSON, and the base model where it already lies.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from numpy.typing import NDArray

from models.text.embedding import embed_items
from models.text.encoder import load_encoder


class EncoderModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Embeddings of items from a kept encoder."""

    def load_context(self, context: Any) -> None:
        """Reads the artifact and the base model."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.encoder = load_encoder(Path(context.artifacts["encoder"]), device=device)

    def predict(self, context: Any, model_input: Any, params: dict[str, Any] | None = None) -> NDArray[np.float32]:
        """Records {field: value or list of values}, a list or a data frame -> emb_NE. Raises ValueError for a blocked field."""
        records = model_input if isinstance(model_input, list) else model_input.to_dict("records")
        return embed_items(self.encoder, [attributes(record) for record in records])


def attributes(record: dict[str, Any]) -> list[tuple[str, str]]:
    """A record's fields in their order, lists joined, what is missing left out."""
    texts = {name: ", ".join(map(str, value)) if isinstance(value, list | tuple) else value for name, value in record.items()}
    return [(name, str(value)) for name, value in texts.items() if value is not None and value == value]


mlflow.models.set_model(EncoderModel())
