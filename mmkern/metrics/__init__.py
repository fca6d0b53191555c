"""Metrics, in plain PyTorch."""

from .retrieval import mean_average_precision, ndcg, recall_at_k

__all__ = ["mean_average_precision", "ndcg", "recall_at_k"]
