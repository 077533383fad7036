# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""How fast a run is, and how much memory it takes."""

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
    """FLOP/s of a large square matrix product, the best of five: what the utilisation is measured against."""
    size = 1024 if device.type == "cpu" else 8192
    a = torch.ones(size, size, device=device, dtype=dtype)  # drawing numbers would change what a resumed run draws
    best = math.inf
    for _ in range(6):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def measure_peak_memory(accelerator: Accelerator) -> int:
    """The most memory in bytes that any rank has had in use so far: of its GPU's, or of the machine's."""
    if accelerator.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return max(gather_object([peak]))


@dataclass
class Speed:
    """How fast a run was over several steps.

    Args:
        seconds_per_step (`float`): Seconds, evaluations and checkpoints left out.
        tokens_per_s (`float`): Tokens per second, of all ranks together.
        mfu (`float`): The model's FLOPs as a share of what the processors reach in a large matrix product.
        shares (`dict[str, float]`): What the loop costs beside the steps, as shares of the time.
    """

    seconds_per_step: float
    tokens_per_s: float
    mfu: float
    shares: dict[str, float]


class Throughput:
    """Measures the speed of a run from one line of the log to the next.

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
        """Counts the time of the block under `name`: `"data"`, `"log"` or `"routing"`."""
        began = time.perf_counter()
        yield
        self._spent[name] += time.perf_counter() - began

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time of the block out."""
        began = time.perf_counter()
        yield
        self._start += time.perf_counter() - began

    def measure(self) -> Speed:
        """The speed since the last call, or since the start."""
        now = time.perf_counter()
        seconds = now - self._start
        tokens_per_s = self.tokens_per_step * self.steps / seconds
        shares = {f"{name}_share": self._spent[name] / seconds for name in ("data", "log", "routing")}
        speed = Speed(seconds / self.steps, tokens_per_s, tokens_per_s * self.flops_per_token / self.peak, shares)
        self.steps, self._start = 0, now
        self._spent.clear()
        return speed
