"""LoRA weights beside frozen linear maps: added to a model, saved, loaded, merged.

PEFT takes seconds to import: functions import it, for merging needs none of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from models.text.base_model import layers_of


@dataclass(frozen=True, kw_only=True)
class Lora:
    """LoRA weights (Hu et al. 2021): rank r, scale alpha / r, on every linear map of the model's layers."""

    r: int = 8
    """Rank of the LoRA weights: more can learn more, and cost more."""
    alpha: int = 32
    """What they add to the base is multiplied by alpha / r."""
    dropout: float = 0.1
    """Share of what they read that is set to zero in a training step."""

    def __post_init__(self) -> None:
        if self.r < 1 or self.alpha < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"r = {self.r} and alpha = {self.alpha} must be at least 1, dropout = {self.dropout} in [0, 1)")


def add_lora(model: nn.Module, lora: Lora) -> nn.Module:
    """A model -> the same with trainable LoRA weights on every linear map of its layers. All else is frozen."""
    from peft import LoraConfig, get_peft_model

    from models.text.lora_layer import LoraLinear

    config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(linear_maps(model)))
    config._register_custom_module({nn.Linear: LoraLinear})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's use of a name that transformers is giving up
        wrapped: nn.Module = get_peft_model(model, config)
    return wrapped


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """A model -> a copy of its LoRA weights on the CPU, by PEFT's names."""
    from peft import get_peft_model_state_dict

    return {name: value.detach().cpu().clone() for name, value in get_peft_model_state_dict(model).items()}


def load_lora(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Puts LoRA weights into a model. Raises ValueError as `check_lora` does."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    check_lora(state, {name: tuple(value.shape) for name, value in get_peft_model_state_dict(model).items()})
    set_peft_model_state_dict(model, dict(state))


def merge_lora(model: nn.Module, lora: Lora, state: Mapping[str, Tensor]) -> None:
    """Adds the updates ΔW = alpha / r B A to a plain base model's maps. PEFT's merge gives the same, but wraps them first.

    Raises ValueError as `check_lora` does.
    """
    maps = linear_maps(model)
    expected = {}
    for name, module in maps.items():
        expected[f"base_model.model.{name}.lora_A.weight"] = (lora.r, module.in_features)
        expected[f"base_model.model.{name}.lora_B.weight"] = (module.out_features, lora.r)
    check_lora(state, expected)
    with torch.no_grad():
        for name, module in maps.items():
            down, up = (state[f"base_model.model.{name}.lora_{part}.weight"].to(module.weight.device).float() for part in "AB")
            module.weight.copy_(torch.addmm(module.weight.float(), up, down, alpha=lora.alpha / lora.r))


def linear_maps(model: nn.Module) -> dict[str, nn.Linear]:
    """A model -> the linear maps of its layers by name. LoRA adapts these."""
    inside = {id(module) for module in layers_of(model).modules()}
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) in inside}


def check_lora(state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError for LoRA weights with names or shapes that are not expected, or values that are not finite."""
    missing, strange = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or strange:
        raise ValueError(
            f"LoRA weights do not fit the base model: {len(missing)} keys missing, {len(strange)} unexpected, "
            f"for example {(missing or strange)[0]}: train them on this base"
        )
    for name, value in state.items():
        if tuple(value.shape) != expected[name]:
            raise ValueError(f"LoRA weight {name} is {tuple(value.shape)}, the base needs {expected[name]}")
        if not bool(value.isfinite().all()):
            raise ValueError(f"LoRA weight {name} is not finite: train again with a lower learning rate")


def update_norm(state: Mapping[str, Tensor]) -> float:
    """LoRA weights -> Frobenius norm of all updates ΔW = B A together, without their scale alpha / r."""
    total = 0.0
    for name, down in state.items():
        if "lora_A" in name:
            up = state[name.replace("lora_A", "lora_B")].float()
            total += float(((up.T @ up) * (down.float() @ down.float().T)).sum())
    return float(np.sqrt(max(total, 0.0)))
