"""Carries gradients across the replicas: each reduction says what it sends, what it keeps, and how it sums."""

from dist_partial.reductions.all_reduce import EveryStep
from dist_partial.reductions.base import Exchange, Reduction, mean, reduce, states
from dist_partial.reductions.local_only import Never
from dist_partial.reductions.local_sgd import LocalSGD, averages, nesterov
from dist_partial.reductions.power_sgd import PowerSGD
from dist_partial.reductions.quantized import Quantized
from dist_partial.reductions.top_k import TopK

__all__ = [
    "EveryStep",
    "Exchange",
    "LocalSGD",
    "Never",
    "PowerSGD",
    "Quantized",
    "Reduction",
    "TopK",
    "averages",
    "mean",
    "nesterov",
    "reduce",
    "states",
]
