# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Measures the speed and the memory of a run."""

import contextlib
import math
import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedConfig

from pathmoe.accounting import forward_flops_per_token
from pathmoe.train.recipe import Recipe


def measure_matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measures the best FLOP/s of several large square matrix products, to which the utilisation (MFU) refers."""
    size = 1024 if device.type == "cpu" else 8192
    a = torch.ones(size, size, device=device, dtype=dtype)  # random numbers would change those of a resumed run
    best = math.inf
    for _ in range(6):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def measure_peak_memory(accelerator: Accelerator) -> int:
    """Returns the peak memory of the rank that uses most, in bytes: GPU memory, or main memory on a CPU."""
    if accelerator.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return max(gather_object([peak]))


@dataclass
class Speed:
    """The speed of a run over several steps.

    Args:
        seconds_per_step (`float`): Seconds per step, without evaluations and checkpoints.
        tokens_per_s (`float`): Tokens per second of all ranks together.
        mfu (`float`): Model FLOP/s as a fraction of the FLOP/s of a large matrix product.
        shares (`dict[str, float]`): Fractions of the time that data, logging and routing statistics take.
    """

    seconds_per_step: float
    tokens_per_s: float
    mfu: float
    shares: dict[str, float]


class Throughput:
    """Measures the speed of a run between two lines of the log.

    Args:
        recipe (`Recipe`): The recipe.
        accelerator (`Accelerator`): The engine.
        config (`PreTrainedConfig`): The model's configuration.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator, config: PreTrainedConfig):
        self.tokens_per_step = recipe.batch_size * recipe.sequence_length
        self.flops_per_token = 3 * forward_flops_per_token(config, recipe.sequence_length)
        dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
        self.peak = measure_matmul_peak(accelerator.device, dtype) * accelerator.num_processes
        self.steps, self._start = 0, time.perf_counter()
        self._spent: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the time of the block to `name`: `"data"`, `"log"` or `"routing"`."""
        began = time.perf_counter()
        yield
        self._spent[name] += time.perf_counter() - began

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time of the block from the measurement."""
        began = time.perf_counter()
        yield
        self._start += time.perf_counter() - began

    def measure(self) -> Speed:
        """Returns the speed since the last call, or since the start."""
        now = time.perf_counter()
        seconds = now - self._start
        tokens_per_s = self.tokens_per_step * self.steps / seconds
        shares = {f"{name}_share": self._spent[name] / seconds for name in ("data", "log", "routing")}
        speed = Speed(seconds / self.steps, tokens_per_s, tokens_per_s * self.flops_per_token / self.peak, shares)
        self.steps, self._start = 0, now
        self._spent.clear()
        return speed
