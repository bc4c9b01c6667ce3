"""How far a choice of layers reproduces, and who agrees with it; numpy alone."""

from floe.artifacts.audit import Audit
from floe.selection.audit.build import audit

__all__ = ["Audit", "audit"]
