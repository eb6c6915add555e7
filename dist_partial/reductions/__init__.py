"""Carries gradients across the replicas: each reduction says what it sends, what it keeps, and how it sums."""

from dist_partial.reductions.all_reduce import AllReduce
from dist_partial.reductions.base import Exchange, Reduction, mean
from dist_partial.reductions.block_parallel import BlockParallel
from dist_partial.reductions.local_only import LocalOnly
from dist_partial.reductions.local_sgd import LocalSGD, averages, nesterov
from dist_partial.reductions.power_sgd import PowerSGD
from dist_partial.reductions.quantized import Quantized
from dist_partial.reductions.top_k import TopK

__all__ = [
    "AllReduce",
    "BlockParallel",
    "Exchange",
    "LocalOnly",
    "LocalSGD",
    "PowerSGD",
    "Quantized",
    "Reduction",
    "TopK",
    "averages",
    "mean",
    "nesterov",
]
