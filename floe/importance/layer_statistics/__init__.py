"""What policies ask about a model's layers beyond the scores, measured on the model."""

from floe.importance.layer_statistics.measure import measure_statistics

__all__ = ["measure_statistics"]
