"""The user encoder as serving runs it, beside the same program exported: torch.export, AOTInductor (compiled), ONNX Runtime.

    pip install --target PEERS --no-deps onnxruntime onnx onnxscript onnx-ir ml_dtypes flatbuffers
    PYTHONPATH=PEERS OMP_NUM_THREADS=1 python tests/benchmarks/bench_export.py --recommender LAKE/models/recommender/ID

Milliseconds of one thread for batches of 1, 8 and 32 histories: the median of rounds in which the ways take turns, so that a busy
machine slows all. What can't be had here (a C++ compiler for AOTInductor, ONNX Runtime) is told and left out. `apart` is the
largest difference of a user vector's number. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models.behaviour.artifact import load_recommender

Way = Callable[[Tensor, Tensor], Tensor]
BATCHES = (1, 8, 32)


class Encoder(nn.Module):
    """A recommender's `encode` as a module, for exporters."""

    def __init__(self, recommender: Any) -> None:
        super().__init__()
        self.recommender = recommender
        members = getattr(recommender, "members", [recommender])
        self.sequences = nn.ModuleList([member.sequence for member in members])

    def forward(self, emb_BLD: Tensor, valid_BL: Tensor) -> Tensor:
        """user_BD."""
        # encode asks for no gradients by a decorator that exporters can't follow
        user_BD: Tensor = type(self.recommender).encode.__wrapped__(self.recommender, emb_BLD, valid_BL) if hasattr(
            type(self.recommender).encode, "__wrapped__") else self.recommender.encode(emb_BLD, valid_BL)  # fmt: skip
        return user_BD


def ways(encoder: Encoder, example: tuple[Tensor, Tensor], home: Path) -> tuple[dict[str, Way], dict[str, str]]:
    """Each way that works here, and what the others said."""
    found: dict[str, Way] = {"now": encoder}
    failed: dict[str, str] = {}
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = ({0: batch}, {0: batch})

    def attempt(name: str, make: Callable[[], Way]) -> None:
        try:
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                way = make()
                way(*example)
            found[name] = way
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"

    def exported() -> Any:
        return torch.export.export(encoder, example, dynamic_shapes=shapes)

    def aot() -> Way:
        path = torch._inductor.aoti_compile_and_package(exported(), package_path=str(home / "encoder.pt2"))
        loaded: Way = torch._inductor.aoti_load_package(path)
        return loaded

    def onnx() -> Way:
        import onnxruntime

        torch.onnx.export(encoder, example, str(home / "encoder.onnx"), dynamo=True, dynamic_shapes=shapes, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(home / "encoder.onnx"), options, providers=["CPUExecutionProvider"])
        names = [one.name for one in session.get_inputs()]

        def run(emb_BLD: Tensor, valid_BL: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, dict(zip(names, (emb_BLD.numpy(), valid_BL.numpy()), strict=True)))[0])

        return run

    attempt("torch.export", lambda: exported().module())
    attempt("aotinductor", aot)
    attempt("onnxruntime", onnx)
    return found, failed


def main() -> None:
    """Times every way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recommender", type=Path, required=True)
    parser.add_argument("--length", type=int, default=50, help="events of a history")
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    recommender = load_recommender(arguments.recommender)
    encoder = Encoder(recommender).eval()
    generator = torch.Generator().manual_seed(0)

    def batch(size: int) -> tuple[Tensor, Tensor]:
        emb_BLD = torch.randn(size, arguments.length, recommender.width, generator=generator)
        return emb_BLD, torch.ones(size, arguments.length, dtype=torch.bool)

    with tempfile.TemporaryDirectory() as home, torch.inference_mode(False), torch.no_grad():
        found, failed = ways(encoder, batch(2), Path(home))
        result: dict[str, Any] = {"length": arguments.length, "width": recommender.width, "failed": failed}
        for size in BATCHES:
            given = batch(size)
            right = encoder(*given)
            seconds: dict[str, list[float]] = {name: [] for name in found}
            for _ in range(arguments.rounds):
                for name, way in found.items():
                    started = time.perf_counter()
                    way(*given)
                    seconds[name].append(time.perf_counter() - started)
            result[f"batch_{size}_ms"] = {name: round(sorted(ones)[len(ones) // 2] * 1000, 3) for name, ones in seconds.items()}
            result[f"batch_{size}_apart"] = {
                name: round(float((way(*given) - right).abs().max()), 6) for name, way in found.items()
            }
    print(json.dumps(result | {"load_1m": round(os.getloadavg()[0], 1)}))


if __name__ == "__main__":
    main()
