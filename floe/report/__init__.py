"""One self-contained page about a run: reads artifacts, needs neither torch nor transformers."""

from __future__ import annotations

from floe.report.page import build_report

__all__ = ["build_report"]
