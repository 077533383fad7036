# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Measures the cost of expert paths: all measures on a million tokens, and the overhead of recording.

    python -m benchmarks.paths --json benchmarks/paths.json

The paths are random: each token follows one of 20,000 paths, drawn by Zipf's law, and leaves it in one layer out of
ten. The overhead of recording is the time of a recorded forward over that of an unrecorded one in the same round, in
random order: the median over rounds, with the quartiles. The same is measured for a decode with a cache, in steps of
one token.
"""

import argparse
import json
import platform
import random
import statistics
import time
from pathlib import Path

import torch
import transformers
from tqdm.auto import tqdm

from benchmarks.options import check_options
from pathmoe import PathMoEConfig, PathMoEForCausalLM, record_paths
from pathmoe.command import ArgumentParser, run_command
from pathmoe.files import write_text
from pathmoe.paths import (
    adjacent_jaccard,
    cluster_purity,
    distinct_paths,
    expert_load,
    jaccard_matrix,
    load_entropy,
    load_variation,
    mutual_information,
    normalized_mutual_information,
    path_coverage,
    path_entropy,
    path_ids,
    path_perplexity,
    routing_entropy,
    sustained_engagement,
)


ROOT = Path(__file__).parents[1]


def draw_trace(tokens: int, layers: int, num_experts: int, top_k: int, paths: int = 20_000):
    """Draws experts (T, L, k) and probabilities (T, L, E) of tokens, and labels of four kinds."""
    generator = torch.Generator().manual_seed(0)

    def zipf(size):
        return torch.rand(tokens, generator=generator).mul(torch.tensor(size).log()).exp().long()

    kinds = torch.randint(num_experts, (paths, layers), generator=generator, dtype=torch.uint8)
    first = kinds[zipf(paths) - 1]
    strays = torch.rand(tokens, layers, generator=generator) < 0.1
    first[strays] = torch.randint(num_experts, (int(strays.sum()),), generator=generator, dtype=torch.uint8)
    # Experts at fixed distances from the first are all different.
    experts = (first[..., None] + 3 * torch.arange(top_k, dtype=torch.uint8)) % num_experts
    probabilities = torch.rand(tokens, layers, num_experts, generator=generator, dtype=torch.float16)
    labels = {"token id": zipf(50_000), "part of speech": zipf(13), "position": torch.arange(tokens) % 1024,
              "source": zipf(9)}  # fmt: skip
    return experts, probabilities, labels


def measure_seconds(tokens: int, layers: int, num_experts: int, top_k: int) -> dict[str, list[float]]:
    """Returns the seconds of each measure, called as in a report: wall time, and CPU time of all threads."""
    experts, probabilities, labels = draw_trace(tokens, layers, num_experts, top_k)
    layer_to_block = [layer // 4 for layer in range(layers)]

    def load(layer_to_block=None):
        shares = expert_load(experts, num_experts, layer_to_block)
        return load_variation(shares), load_entropy(shares)

    measures = {
        "distinct paths": lambda: distinct_paths(experts),
        "coverage of the 10 most frequent": lambda: path_coverage(experts, 10),
        "path entropy": lambda: path_entropy(experts),
        "path perplexity": lambda: path_perplexity(experts),
        "load per layer, its variation and entropy": load,
        "load per block, its variation and entropy": lambda: load(layer_to_block),
        "entropy of the probabilities": lambda: routing_entropy(probabilities),
        "adjacent-layer Jaccard": lambda: adjacent_jaccard(experts),
        "Jaccard of all pairs of layers": lambda: jaccard_matrix(experts),
        "sustained engagement, 4 layers": lambda: sustained_engagement(experts, 4),
    }
    for name, values in labels.items():
        measures[f"mutual information with {name}"] = lambda v=values: mutual_information(path_ids(experts), v)
    gold = labels["part of speech"]
    measures["purity"] = lambda: cluster_purity(path_ids(experts), gold)
    measures["NMI"] = lambda: normalized_mutual_information(path_ids(experts), gold)
    seconds = {}
    for name, measure in tqdm(measures.items(), desc="measures", disable=None):
        start = time.perf_counter(), time.process_time()
        measure()
        seconds[name] = [time.perf_counter() - start[0], time.process_time() - start[1]]
    return seconds


def record_overhead(rounds: int, batch: int, length: int, device: str, steps: int = 0) -> dict[str, list[float]]:
    """Returns the time of a recorded forward and `steps` of one token over that of bare ones: quartiles and median."""
    config = PathMoEConfig.from_json_file(ROOT / "configuration" / "model" / "quickstart.json")
    model = PathMoEForCausalLM(config).to(device).eval()
    ids = torch.randint(config.vocab_size, (batch, length), device=device)

    def run():
        cache = model(ids, use_cache=steps > 0).cache
        for _ in range(steps):
            model(ids[:, -1:], cache=cache)

    def seconds(**options) -> float:
        # On a CPU, the CPU time of the process, which other work on the machine hardly changes.
        clock = time.perf_counter if ids.is_cuda else time.process_time
        synchronize = torch.cuda.synchronize if ids.is_cuda else lambda: None
        synchronize()
        start = clock()
        if options:
            with record_paths(model, **options):
                run()
        else:
            run()
        synchronize()
        return clock() - start

    variants = {
        "bare": {},
        "experts": {"weights": False},
        "experts, weights and probabilities": {"weights": True, "probabilities": True},
    }
    ratios = {name: [] for name in variants}
    order = random.Random(0)
    with torch.no_grad():
        seconds(weights=True)
        for _ in tqdm(range(rounds), desc="rounds", disable=None):
            taken = {name: seconds(**options) for name, options in order.sample(list(variants.items()), len(variants))}
            for name in variants:
                ratios[name].append(taken[name] / taken["bare"])
    return {name: statistics.quantiles(values, n=4) for name, values in ratios.items() if name != "bare"}


def main(args: list[str] | None = None):
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top_k", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=32, help="steps of one token, after a prompt of 16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args(args)
    names = ("tokens", "layers", "experts", "top_k", "batch_size", "length", "steps")
    check_options(options, dict.fromkeys(names, 1) | {"rounds": 2}, json='"measure_seconds"')
    if options.top_k > options.experts:
        parser.error(f"--top_k {options.top_k} must be at most --experts {options.experts}.")
    batch, length, steps = options.batch_size, options.length, options.steps
    overheads = {
        f"forward of {batch} x {length} tokens": record_overhead(options.rounds, batch, length, options.device),
        f"decode of 1 x {steps} tokens": record_overhead(options.rounds, 1, 16, options.device, steps),
        f"decode of {batch} x {steps} tokens": record_overhead(options.rounds, batch, 16, options.device, steps),
    }
    seconds = measure_seconds(options.tokens, options.layers, options.experts, options.top_k)
    seconds["all together"] = [sum(column) for column in zip(*seconds.values())]
    print(f"{options.tokens:,} tokens, {options.layers} layers, {options.top_k} of {options.experts} experts:")
    print("wall seconds, and CPU seconds of all threads, which other work on the machine hardly changes")
    for name, (wall, threads) in seconds.items():
        print(f"  {name:45} {wall:6.2f} {threads:6.2f}")
    for call, overhead in overheads.items():
        print(f"A recorded {call} over a bare one:")
        for name, (low, median, high) in overhead.items():
            print(f"  {name:45} {median:6.3f} ({low:.3f} to {high:.3f})")
    if options.json:
        figures = {
            "settings": {name: value for name, value in vars(options).items() if name != "json"},
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "measure_seconds": seconds,
            "record_overhead": overheads,
        }
        write_text(options.json, json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main)
