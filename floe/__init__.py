"""floe: routed low-rank experts on the layers that matter.

Names load on first use: ``import floe`` itself loads neither torch nor transformers. PEFT knows the
method once both are imported, in any order.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "floe.adapters": ("FloeConfig", "MoELoRALinear", "get_model"),
    "floe.adapters.conversion": ("export_lora",),
    "floe.adapters.files": ("load_adapter", "save_adapter"),
    "floe.config": ("RunConfig",),
    "floe.config_file": ("load_config",),
    "floe.errors": ("DataError", "FileError"),
    "floe.importance.score": ("score",),
    "floe.importance.layer_statistics": ("measure_statistics",),
    "floe.importance.scores": ("LayerStatistics", "Scores"),
    "floe.ops": (
        "accumulate_fisher_",
        "mask_gradients",
        "moe_lora",
        "moe_lora_add",
        "moe_lora_group",
    ),
    "floe.pipeline.run": ("RunResult", "run"),
    "floe.rank_search.search": ("SearchResult", "search"),
    "floe.selection.placement": ("allocate",),
    "floe.selection.audit": ("Audit", "audit"),
    "floe.selection.masks.solvers": (
        "MaskSolution",
        "solve_mask",
        "solve_two_class",
        "solve_two_class_literal",
    ),
    "floe.selection.select": ("Selection", "select"),
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


class _WithPeft:
    """Registers the method with PEFT at the end of ``import peft``."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        """PEFT's own spec, whose module is followed by ``floe.adapters``; None for the rest."""
        if name != "peft":
            return None
        sys.meta_path.remove(cls)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: Any) -> None:
                run(module)
                importlib.import_module("floe.adapters")

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


if "peft" in sys.modules:
    importlib.import_module("floe.adapters")
else:
    sys.meta_path.insert(0, _WithPeft)  # type: ignore[arg-type]


if TYPE_CHECKING:
    from floe.adapters import FloeConfig as FloeConfig
    from floe.adapters import MoELoRALinear as MoELoRALinear
    from floe.adapters import get_model as get_model
