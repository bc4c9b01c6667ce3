"""How far a choice of layers reproduces, and who agrees with it; numpy alone."""

from floe.selection.audit.build import audit
from floe.selection.audit.result import Audit

__all__ = ["Audit", "audit"]
