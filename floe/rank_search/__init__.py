"""Search for rank and number of experts; the only package that imports optuna."""
