"""The paper's latency tables on whole models: ``python -m benchmarks.latency --help``."""
