"""LoRA weights -> an encoder that is kept: written, judged as it reads back, registered; or refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from jobs.engines import registry
from jobs.lake import artifacts
from jobs.run import Refused, as_json
from jobs.scft.config import Config
from jobs.scft.refresh import trainings
from jobs.scft.tuning import validation_size, watched
from jobs.scft.worth import BASE, BEFORE, NEW, Sample, measure_encoders
from models.text.base_model import load_base
from models.text.embedding import embed
from models.text.encoder import Encoder, load_encoder, of_base, save_encoder
from models.text.prompts import Texts
from models.text.scft import Scft, Tuned
from models.text.view_retrieval import Validation, autocast_like_base, hold_out_views, refusals, relative_distance, validate_views


def keep(
    config: Config,
    encoder: Encoder,
    texts: Texts,
    training: Scft,
    tuned: Tuned | None,
    inputs: dict[str, str],
    sample: Sample | str,
) -> dict[str, Any]:
    """Writes the artifact, judges it as it reads back, keeps and registers it; the Result's fields that come of it.

    Without `tuned` it is the base model as it is, which is measured once. Raises Refused with the figures.
    """
    validation, _ = hold_out_views(texts, training, encoder.limit, config.run.seed)
    staged = artifacts.stage(config.run.lake, "encoder")
    save_encoder(staged, encoder.spec, tuned.learned if tuned else None)
    device, is_base = encoder.device, tuned is None and encoder.spec == of_base(encoder.spec)
    before, base_CE = ({}, None) if is_base else measure_base(config, encoder, validation, tuned)
    encoder.model = torch.nn.Identity()  # makes room for the copy that is judged
    loaded = load_encoder(staged, device=device)
    with watched(loaded, validation_size(texts, training)):
        figures, emb_CE = validate_views(loaded, validation)
    moved = 0.0 if base_CE is None else relative_distance(emb_CE, base_CE)
    before = before or {"step": 0.0, **figures}
    wrong = refusals(figures, before, moved, config.gates, candidates=len(emb_CE), zero_shot=is_base)
    if wrong:
        raise Refused(f"the encoder is refused: {'; '.join(wrong)}")
    worth = (
        {"verdict": "base", "why": "it is the base model as it is"} if is_base else measure_against_base(config, loaded, sample)
    )
    encoder_id = artifacts.keep(config.run.lake, "encoder", staged)
    version = register(config, encoder_id, figures, inputs, curve_of(tuned), worth["verdict"])
    return {"encoder_id": encoder_id, "figures": figures, "base_figures": before, "moved": moved, "version": version,
            "worth": worth}  # fmt: skip


def measure_against_base(config: Config, loaded: Encoder, sample: Sample | str) -> dict[str, Any]:
    """What the encoder is worth beside its base model and the encoder in use before. Raises Refused as `measure_encoders`."""
    device = loaded.device

    def base() -> Encoder:
        model, tokenizer, _ = load_base(config.base, device=device, layers=config.layers)
        return Encoder(model, tokenizer, of_base(loaded.spec)).eval()

    encoders: dict[str, Callable[[], Encoder]] = {NEW: lambda: loaded, BASE: base}
    if before := in_use(config):
        encoders[BEFORE] = lambda: load_encoder(registry.fetch(config.run, "encoder", before), device=device)
    return measure_encoders(config, sample, encoders)


def in_use(config: Config) -> str:
    """The champion's encoder; without a registry or a champion that of the newest training; "" where there was none."""
    champion = registry.champion(config.run)
    if champion is not None and champion["encoder_id"]:
        return champion["encoder_id"]
    newest = next(trainings(config.run.lake, config.run.ds), None)
    return "" if newest is None else str(newest.result["encoder_id"])


def measure_base(
    config: Config, encoder: Encoder, validation: Validation, tuned: Tuned | None
) -> tuple[dict[str, float], NDArray[np.float32]]:
    """Figures and base_CE: the base model as `embed` would have it, before anything was learned."""
    spec = encoder.spec
    if tuned is None or config.training.fp8 or config.four_bit or of_base(spec) != dataclasses.replace(spec, lora=None):
        # what training began with was in 8 bits or in 4, with suffix tokens, or with attention of its own
        device, encoder.model = encoder.device, torch.nn.Identity()
        model, tokenizer, _ = load_base(config.base, device=device, layers=config.layers)
        plain = Encoder(model, tokenizer, of_base(spec)).eval()
        with watched(plain, sum(len(part.length_B) for part in validation.parts)):
            figures, base_CE = validate_views(plain, validation)
        return {"step": 0.0, **figures}, base_CE
    as_base = encoder.model.disable_adapter()  # type: ignore[operator]
    with watched(encoder, len(validation.candidates.length_B)), as_base, autocast_like_base(encoder), torch.no_grad():
        return tuned.history[0], embed(encoder.eval(), validation.candidates)


def curve_of(tuned: Tuned | None) -> list[dict[str, float]]:
    """Every step's loss, then the figures of each validation, with their steps."""
    if tuned is None:
        return []
    return [*({"step": step, "loss": loss} for step, loss in enumerate(tuned.losses, start=1)), *tuned.history]


def register(
    config: Config,
    encoder_id: str,
    figures: dict[str, float],
    inputs: dict[str, str],
    curve: Sequence[Mapping[str, float]],
    worth: str,
) -> str | None:
    """The encoder's version in MLflow's registry, as a pyfunc that embeds raw attribute records; None without MLflow."""
    if not config.run.tracking_uri:
        return None
    return registry.log_run(
        config.run,
        "scft",
        as_json(config),
        figures,
        artifacts.find(config.run.lake, "encoder", encoder_id),
        registry.ENCODER,
        registry.ENCODER_CODE,
        inputs=inputs,
        tags={"worth": worth},
        curve=curve,
    )
