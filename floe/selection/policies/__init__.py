"""Rules that order layers, by name. docs/POLICIES.md is written from them.

To add one, add a file (or a function to one) that registers itself: see ``registry.policy``.
"""

import importlib
import pkgutil

from floe.selection.policies.registry import POLICIES, Policy, PolicyInputs

__all__ = ["POLICIES", "Policy", "PolicyInputs"]

for _file in pkgutil.iter_modules(__path__):
    if _file.name != "__main__":  # writes the document when it is imported
        importlib.import_module(f"{__name__}.{_file.name}")
