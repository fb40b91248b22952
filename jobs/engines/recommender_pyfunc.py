"""The recommender as MLflow loads it ("models from code"): LLM embeddings -> item vectors, histories -> ranked items.

`registry.py` logs this file with the artifact "recommender" (the folder that `rat` kept) and the package `models`. Nothing
is pickled: a reload reads safetensors and JSON.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch

from models.behaviour.artifact import load_recommender
from models.behaviour.recommender import score


class RecommenderModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Item vectors and next items from a kept recommender."""

    def load_context(self, context: Any) -> None:
        """Reads the artifact."""
        self.recommender = load_recommender(Path(context.artifacts["recommender"]))

    def predict(self, context: Any, model_input: Any, params: dict[str, Any] | None = None) -> dict[str, Any]:
        """{"item_ids": N ids, "embeddings": llm_NE}, or a data frame with one such row -> {"vectors": emb_ND}.

        With "histories", lists of item ids, oldest first, it gives {"item_ids": the k best of each, "scores": theirs} among the
        items given; "k" is 10 unless given. Raises ValueError for a history of items that were not given.
        """
        # MLflow makes a frame of inputs that a signature names
        model_input = model_input.iloc[0].to_dict() if hasattr(model_input, "iloc") else model_input
        item_ids = [str(item_id) for item_id in model_input["item_ids"]]
        llm_NE = torch.as_tensor(np.stack([np.asarray(row, dtype=np.float32) for row in model_input["embeddings"]]))
        emb_ND = self.recommender.project(llm_NE, item_ids)
        if "histories" not in model_input:
            return {"vectors": emb_ND.numpy()}
        row = {item_id: number for number, item_id in enumerate(item_ids, start=1)}
        strange = [item_id for history in model_input["histories"] for item_id in history if item_id not in row]
        if strange:
            raise ValueError(f"{len(strange)} events of items without an embedding, for example {strange[0]!r}: give theirs too")
        newest = self.recommender.backbone.max_len
        rows = [[row[item_id] for item_id in history[-newest:]] for history in model_input["histories"]]
        input_BL = torch.tensor([[0] * (newest - len(history)) + history for history in rows])
        table_VD = torch.cat([torch.zeros(1, emb_ND.shape[1]), emb_ND])
        scores_BV = score(self.recommender.encode(table_VD[input_BL], input_BL != 0), table_VD)
        best = scores_BV.topk(min(int(model_input.get("k", 10)), len(item_ids)))
        return {"item_ids": [[item_ids[place - 1] for place in places] for places in best.indices.tolist()],
                "scores": best.values.tolist()}  # fmt: skip


mlflow.models.set_model(RecommenderModel())
