"""How far a choice of layers reproduces, and who agrees with it; numpy alone."""

from floe.selection.audit.build import Audit, audit

__all__ = ["Audit", "audit"]
