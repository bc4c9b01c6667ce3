"""A run: configuration in, report out.

``stages`` is the order of things, the other modules one stage each.
"""

from floe.pipeline.stages import STAGES, RunResult, export_run, run

__all__ = ["STAGES", "RunResult", "export_run", "run"]
