"""Metrics, in plain PyTorch and ops of mmkern."""

from .error_rate import ErrorRate as ErrorRate  # what a metric returns, and none itself
from .error_rate import character_error_rate, word_error_rate
from .retrieval import mean_average_precision, ndcg, recall_at_k

__all__ = ["character_error_rate", "mean_average_precision", "ndcg", "recall_at_k", "word_error_rate"]
