"""Adapters: the adapted linear layer, its PEFT method, its files. Importing it registers floe with PEFT."""

from floe.adapters.moe_lora import MoELoRALinear, separate_base
from floe.adapters.peft_tuner import (
    FloeConfig,
    adapted_layers,
    adapted_modules,
    get_model,
    parameter_counts,
)

__all__ = [
    "FloeConfig",
    "MoELoRALinear",
    "adapted_layers",
    "adapted_modules",
    "get_model",
    "parameter_counts",
    "separate_base",
]
