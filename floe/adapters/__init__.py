"""Adapters: the adapted linear layer, its PEFT method, its files.

Importing this package registers floe with PEFT.
"""

from floe.adapters.config import FloeConfig
from floe.adapters.linear import MoELoRALinear, separate_base
from floe.adapters.targets import (
    adapted_layers,
    adapted_modules,
    parameter_counts,
    remove_adapters,
)
from floe.adapters.tuner import get_model

__all__ = [
    "FloeConfig",
    "MoELoRALinear",
    "adapted_layers",
    "adapted_modules",
    "get_model",
    "parameter_counts",
    "remove_adapters",
    "separate_base",
]
