"""Which layers' adapters learn best: ``python -m benchmarks.quality --help``."""
