"""floe: routed low-rank experts on the layers that matter.

Names load on first use: ``import floe`` itself loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "floe.adapters": ("FloeConfig", "MoELoRALinear", "get_model"),
    "floe.adapters.export": ("export_lora",),
    "floe.adapters.files": ("load_adapter", "save_adapter"),
    "floe.config": ("RunConfig", "load_config"),
    "floe.errors": ("DataError", "FileError"),
    "floe.importance.score": ("score",),
    "floe.importance.layer_statistics": ("measure_statistics",),
    "floe.importance.scores": ("Scores",),
    "floe.importance.statistics": ("LayerStatistics",),
    "floe.ops": (
        "accumulate_fisher_",
        "mask_gradients",
        "moe_lora",
        "moe_lora_add",
        "moe_lora_group",
    ),
    "floe.pipeline": ("RunResult", "run"),
    "floe.rank_search.search": ("SearchResult", "search"),
    "floe.selection.allocate": ("allocate",),
    "floe.selection.audit": ("Audit", "audit"),
    "floe.selection.masks": (
        "MaskSolution",
        "solve_mask",
        "solve_two_class",
        "solve_two_class_literal",
    ),
    "floe.selection.selection": ("Selection", "select"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME)]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'floe' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from floe.adapters import FloeConfig as FloeConfig
    from floe.adapters import MoELoRALinear as MoELoRALinear
    from floe.adapters import get_model as get_model
