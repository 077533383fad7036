# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Measures the operators of PathMoE and Qwen3-MoE: matrix products, attention, moved rows, the optimizer.

    python -m benchmarks.operators --json benchmarks/operators.json
    python -m benchmarks.operators --table benchmarks/operators.json

The calls are those of `bench.py`, under torch's profiler, on a CPU. A share is the time inside operators of a kind
over the time of the whole call, as a median over calls. The rest is elementwise arithmetic, norms, memory allocation,
Python, and the overhead of the profiler, which is larger for small operators. A call that spends half of its time in
products could at most be twice as fast with the same products. GFLOP/s are those of products and attention.
"""

import argparse
import functools
import json
import statistics
from pathlib import Path

from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm

from benchmarks.bench import count_flops, describe_machine, seconds_of
from benchmarks.contenders import BATCHES, Case, make_zoo, run_experts, train_step
from benchmarks.options import check_options, read_report
from pathmoe.command import ArgumentParser, run_command
from pathmoe.files import write_text
from pathmoe.markdown import markdown_table


KINDS = {
    "products": ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "addmv_", "_grouped_mm"),
    "attention": tuple("_scaled_dot_product_flash_attention_for_cpu" + suffix for suffix in ("", "_backward")),
    "moved rows": ("index_select", "index", "_index_put_impl_", "index_add_", "index_copy_", "gather", "scatter_",
                   "scatter_add_", "_embedding_bag_forward_only", "embedding_dense_backward", "sort", "topk"),
    "optimizer": ("_fused_adamw_",),
}  # fmt: skip
# Suite, shape, mode, number of sequences, tokens per sequence.
CASES = [
    ("experts", "quickstart", "forward + backward", 1, 1024),
    ("experts", "0.9b-layer", "forward + backward", 1, 512),
    ("train_step", "quickstart", "step", 2, 512),
    ("train_step", "0.9b-layer", "step", 1, 512),
]


def measure(case: Case, name: str, backend: str, calls: int) -> dict:
    """Measures the milliseconds of a call without the profiler, and the share of each kind of operator with it."""
    zoo = make_zoo(case.shape, case.dtype, "cpu")
    run = (run_experts if case.experts_alone else train_step)(zoo, case, name, backend).run
    for turn in range(BATCHES):
        run(turn)
    seconds, rates, shares = [], [], {kind: [] for kind in KINDS}
    flops = count_flops(zoo, case)
    for turn in range(calls):
        call = functools.partial(run, turn)
        seconds.append(seconds_of(call, "cpu"))
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            whole = seconds_of(call, "cpu")
        times = {event.key: event.self_cpu_time_total / 1e6 for event in profiler.key_averages()}
        taken = {kind: sum(times.get(f"aten::{name}", 0) for name in names) for kind, names in KINDS.items()}
        for kind, of_kind in taken.items():
            shares[kind].append(of_kind / whole)
        rates.append(flops / (taken["products"] + taken["attention"]) / 1e9)
    result = {"ms": statistics.median(seconds) * 1e3}
    result["shares"] = {kind: statistics.median(values) for kind, values in shares.items()}
    result["gflops"] = statistics.median(rates)
    return result


def make_table(report: dict) -> str:
    rows = []
    for row in report["results"]:
        shares = [*row["shares"].values(), 1 - sum(row["shares"].values())]
        cells = [row["suite"].replace("_", " "), row["shape"], row["dtype"], row["model"], f"{row['ms']:.3g}"]
        cells += [f"{share:.0%}" if share else "" for share in shares]
        rows.append([*cells, f"{row['gflops']:.0f}"])
    head = ["call", "shape", "dtype", "model", "ms", *KINDS, "the rest", "GFLOP/s"]
    return markdown_table(head, rows, left=range(4))


def main(args: list[str] | None = None):
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--calls", type=int, default=10, help="number of calls with the profiler, and again without")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--table", type=Path, help="only print the table of such a file")
    options = parser.parse_args(args)
    check_options(options, {"calls": 1}, json='"model": "PathMoE"')
    if options.table:
        print(make_table(read_report(options.table, "results")))
        return
    options.device = "cpu"
    report = {**describe_machine(options), "results": []}
    rows = [(*case, dtype, *model) for case in CASES for dtype in options.dtype
            for model in (("PathMoE", "pathmoe"), ("Qwen3-MoE", "grouped_mm"))]  # fmt: skip
    for suite, shape, mode, batch, length, dtype, name, backend in tqdm(rows, desc="calls", disable=None):
        case = Case(suite, shape, dtype, False, mode, batch, length)
        measured = measure(case, name, backend, options.calls)
        report["results"].append({"suite": suite, "shape": shape, "dtype": dtype, "model": name, **measured})
        if options.json:
            write_text(options.json, json.dumps(report, indent=1) + "\n")
    print(make_table(report))


if __name__ == "__main__":
    run_command(main)
