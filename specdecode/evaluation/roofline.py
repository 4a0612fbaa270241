"""A device in, what it can move and compute in a second out; a model in, what one of its passes must move and compute.

No pass is quicker than its bytes at the bandwidth, nor than its operations at the rate of the device (the roofline of Williams
et al. 2009). Both limits are measured, on the device as it is.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_NUM_REPEATS = 7  # of which the best counts: it is a limit
_LARGEST = 1 << 30  # more bytes than any cache holds are read no slower
_SMALLEST = 1 << 20
_LONG_ENOUGH_S = 0.002


@dataclass(frozen=True)
class Work:
    """Bytes to read and write, and floating-point operations."""

    num_bytes: float = 0.0
    num_operations: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.num_bytes + other.num_bytes, self.num_operations + other.num_operations)

    def __mul__(self, times: float) -> "Work":
        return Work(self.num_bytes * times, self.num_operations * times)


@dataclass(frozen=True)
class Limits:
    """Bytes and operations that a device manages in a second."""

    bandwidth: float
    operation_rate: float

    def floor_s(self, work: Work) -> float:
        """The least time that it could take."""
        return max(work.num_bytes / self.bandwidth, work.num_operations / self.operation_rate)


def measure_limits(num_bytes: float, device: torch.device, dtype: torch.dtype) -> Limits:
    """Measures the limits on work of a size: what fits a cache is read as fast as the cache can be."""
    return Limits(read_bandwidth(num_bytes, device), operation_rate(device, dtype))


def read_bandwidth(num_bytes: float, device: torch.device) -> float:
    """Bytes a second at which so many are read again and again, by adding them up."""
    count = int(min(max(num_bytes, _SMALLEST), _LARGEST)) // 4
    values = torch.ones(count, device=device)
    return 4 * count / _best_s(values.sum, device)


def operation_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a product of square matrices."""
    size = 8192 if device.type == "cuda" else 768
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    return 2.0 * size**3 / _best_s(lambda: matrix @ matrix, device)


@dataclass(frozen=True)
class PassCost:
    """What a forward pass of a model costs at the least.

    Attributes:
        num_weight_bytes: the weights that every pass reads: all but an embedding of which rows are looked up.
        num_kv_bytes_per_token: keys and values of one token in all layers.
        num_multiplied: weights that each token is multiplied with.
    """

    num_weight_bytes: int
    num_kv_bytes_per_token: int
    num_multiplied: int

    @staticmethod
    def of(model: Any, num_kv_bytes_per_token: int) -> "PassCost":
        """Counts a transformers model's weights; a mixture's as if each token met all experts."""
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        weights = [weight for weight in model.parameters() if weight is not embedding or weight is head]
        num_bytes, count = sum(weight.nbytes for weight in weights), sum(weight.numel() for weight in weights)
        return PassCost(num_bytes, num_kv_bytes_per_token, count)

    def work(self, batch: int, num_new: int, length: int) -> Work:
        """One pass over `num_new` tokens of each of `batch` sequences that have `length` tokens already."""
        num_kv_bytes = batch * (length + num_new) * self.num_kv_bytes_per_token
        return Work(self.num_weight_bytes + num_kv_bytes, 2.0 * self.num_multiplied * batch * num_new)


def _best_s(run: Callable[[], object], device: torch.device) -> float:
    """The shortest time of one call, among calls in groups that are long enough to be timed."""
    run()
    times: list[float] = []
    count = 1
    while len(times) < _NUM_REPEATS:
        _wait(device)
        started = time.perf_counter()
        for _ in range(count):
            run()
        _wait(device)
        taken = time.perf_counter() - started
        if taken < _LONG_ENOUGH_S:
            count *= 2
            continue
        times.append(taken / count)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
