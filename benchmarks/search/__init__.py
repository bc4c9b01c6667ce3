"""How many trials a search needs: ``python -m benchmarks.search --help``."""
