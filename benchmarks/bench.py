# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Compares PathMoE with its peers in one run: training step, experts alone, prefill, decoding, scaling, loss.

    python -m benchmarks.bench --json benchmarks/bench.json --plot benchmarks/scaling.png
    python -m benchmarks.bench --suite train_step --shape quickstart 0.9b-layer --compile --json OUT
    python -m benchmarks.bench --table benchmarks/bench.json

Peers are OLMoE, Qwen3-MoE and Mixtral of transformers, each with the fastest of transformers' experts backends (found
by a trial in the same run), and a dense Qwen3 of equal active parameters. All have PathMoE's shape, dtype, attention
implementation and tokens. They share the parameter tensors that have the same name and shape (routers are copies of
the blocks' routers), so that all route alike and large shapes fit. Token ids are drawn by Zipf's law, and so are the
experts where the experts run alone, so the load is skewed. Every round uses a different batch, so that an expert's
number of tokens changes as in training, and runs the contenders in a new random order. A ratio is the median over
rounds of a peer's time over ours in the same round, with the quartiles.

A training step is forward, loss, backward, a step of fused AdamW and zero_grad, with weights and moments in `--dtype`;
the learning rate is 0, so that every step does the same work. Memory is the peak that a call allocates beyond
parameters, optimizer state and inputs; on a CPU, it is counted over live tensors, and not known when compiled.
"""

import argparse
import dataclasses
import functools
import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
import transformers
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from benchmarks.bench_report import describe, find_peak, make_table, plot_scaling
from benchmarks.contenders import (
    BATCHES,
    BUILDERS,
    DECODE_STEPS,
    DENSE,
    FREE,
    FREE_ROUTING,
    LOSSES,
    OUR_LOSS,
    OURS,
    ROOT,
    SHAPES,
    Case,
    Contender,
    Zoo,
    load_config,
    make_zoo,
    run_experts,
)
from benchmarks.options import check_options, read_report
from pathmoe import PathMoEConfig
from pathmoe.accounting import forward_flops_per_token
from pathmoe.command import ArgumentParser, run_command
from pathmoe.files import write_text
from pathmoe.train.plan import PeakMemory


# The default shapes of each suite.
SUITES = {
    "train_step": ["quickstart", "0.9b-layer"],
    "experts": ["quickstart", "0.9b-layer", "16b-layer"],
    "prefill": ["quickstart", "0.9b-layer"],
    "decode": ["quickstart", "0.9b-layer"],
    "scaling": ["quickstart"],
    "loss": ["0.9b"],
}
PEERS = ["OLMoE", "Qwen3-MoE", "Mixtral"]
# The backends of transformers. The order is reversed, because batched_mm is slow for more than a few tokens, and a
# backend that is much slower than those before it is called only once.
BACKENDS = ["eager", *(n for n, f in ALL_EXPERTS_FUNCTIONS.items() if f.__module__.startswith("transformers."))]
BACKENDS = sorted(BACKENDS, reverse=True)
# PathMoE must agree with these: with the routers copied into its layers, it is a Qwen3-MoE.
SAME_FUNCTION = ["Qwen3-MoE", "transformers"]
DECODE_BATCHES = [1, 8, 64]
SWEEPS = {
    "experts": [8, 16, 32, 64, 128, 256],
    "top_k": [1, 2, 4, 8],
    "length": [128, 256, 512, 1024, 2048, 4096, 8192],
    "tokens": [1, 4, 16, 64, 256, 1024, 4096, 16384, 65536],
}
# A backend that is slower than the fastest by this factor is left out of the rounds; its trial's seconds are kept.
HOPELESS = 3
# Only backends within this factor of the fastest are also compiled, because compiling takes long.
WORTH_COMPILING = 2
MIN_ROUNDS = 5


def count_flops(zoo: Zoo, case: Case) -> float:
    """Returns the floating-point operations of one timed call of an MoE; recomputation does not count."""
    config, tokens = zoo.config, case.tokens
    head = 2 * config.hidden_size * config.vocab_size
    if case.suite == "loss":
        return 3 * head * tokens
    if case.mode == "decode":
        # A token attends to all previous ones, which is the average cost in a sequence of twice the length.
        context = 2 * case.length + DECODE_STEPS
        return forward_flops_per_token(config, context) * case.batch * DECODE_STEPS
    if case.experts_alone:
        flops = 6 * config.hidden_size * config.moe_intermediate_size * config.num_experts_per_tok * tokens
        return flops * (BATCHES * config.num_hidden_layers if case.mode == "forward" else 3)
    flops = forward_flops_per_token(config, case.length) * tokens
    if case.mode == "prefill":
        return flops - head * (tokens - case.batch)
    return 3 * flops


def activation_memory(contender: Contender) -> dict[str, int]:
    """Measures the memory that a forward leaves for its backward.

    Returns:
        `dict`: Bytes `saved`, of the distinct storages that autograd saves, without parameters; and `held`, of all
        tensors that the forward made and that stay alive, without its output. `held` is larger than `saved` by tensors
        that are kept outside of autograd, and smaller by saved inputs.
    """
    parameters = {p.untyped_storage()._cdata for p in contender.known if isinstance(p, torch.nn.Parameter)}
    saved = {}

    def pack(tensor):
        # The tensor is kept alive, so that no other storage gets its address.
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = contender.forward()
    sizes = {key: tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in parameters}
    del output
    saved.clear()
    with PeakMemory(contender.known) as memory:
        output = contender.forward()
    return {"saved": sum(sizes.values()), "held": memory.now - output.untyped_storage().nbytes()}


def peak_memory(contender: Contender, zoo: Zoo, case: Case) -> int | None:
    """Returns the peak bytes that a call allocates beyond existing tensors; `None` where that is not known, or
    negligible beside weights and cache."""
    if case.mode in ("decode", "forward"):
        return None
    if zoo.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contender.run()
        return torch.cuda.max_memory_allocated() - before
    if case.compiled:
        return None
    moments = [value for state in zoo.moments.values() for value in state.values()]
    with PeakMemory([*contender.known, *moments]) as memory:
        contender.run()
    return memory.peak


def seconds_of(run: Callable, device: str) -> float:
    synchronize = torch.cuda.synchronize if device != "cpu" else lambda: None
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def refuse_batched_mm(zoo: Zoo, case: Case) -> str | None:
    """Returns why `batched_mm`, which gathers weights for every token and chosen expert, is not tried, or `None`."""
    config = zoo.config
    tokens = case.batch * (1 if case.mode == "decode" else case.length)
    times = tokens * config.num_experts_per_tok / config.num_experts
    # A training step keeps the gathered weights of all layers for its backward, which makes gradients of their size.
    layers = {"step": config.num_hidden_layers + 2, "forward + backward": 3}.get(case.mode, 1)
    size = 3 * config.hidden_size * config.moe_intermediate_size * config.num_experts * zoo.dtype.itemsize
    free = psutil.virtual_memory().available if zoo.device == "cpu" else torch.cuda.mem_get_info()[0]
    if times > 8 or times * size * layers > free / 2:
        return f"gathers all experts {times:.0f} times, {times * size * layers / 1e9:.1f} GB"
    return None


def try_backends(
    build: Callable, zoo: Zoo, case: Case, name: str, backends: list[str]
) -> tuple[dict, dict[str, Contender]]:
    """Times the backends of a peer briefly.

    Returns:
        `tuple`: For each backend, the seconds of a call or the reason why it did not run; and the contenders that ran,
        fastest first.
    """
    trials, contenders = {}, {}
    for backend in backends:
        if backend == "batched_mm" and (reason := refuse_batched_mm(zoo, case)):
            trials[backend] = reason
            continue
        try:
            contender = build(zoo, case, name, backend)
            contender.start(f"{name} with {backend} experts")
            trials[backend] = seconds_of(contender.run, zoo.device)
            if trials[backend] < HOPELESS * min(trials[other] for other in [*contenders, backend]):
                # Different batches, as in the rounds, so that code compiled for one number of rows has no advantage.
                calls = [functools.partial(contender.run, turn) for turn in (1, 2)]
                # As in the rounds, oneDNN's compilation of bfloat16 products is not timed.
                for call in calls if case.dtype == "bfloat16" else []:
                    call()
                turns = [seconds_of(call, zoo.device) for call in calls]
                trials[backend] = statistics.mean(turns)
            contenders[backend] = contender
        except (RuntimeError, ImportError, ValueError, NotImplementedError) as error:
            trials[backend] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return trials, {backend: contenders[backend] for backend in sorted(contenders, key=trials.get)}


def check_agreement(ours: torch.Tensor, other: torch.Tensor, name: tuple):
    """Stops if ours and another contender compute different results from the same weights. In bfloat16, some tokens
    that are close to a tie between two experts are routed differently."""
    error = ((ours.float() - other.float()).norm() / other.float().norm()).item()
    if error > (1e-3 if ours.dtype == torch.float32 and other.dtype == torch.float32 else 0.1):
        raise SystemExit(f"Ours and {name} differ by {error:.1e} of the result's norm.")


def worth_compiling(case: Case, done: list[dict]) -> list[str]:
    """Returns the backends that were close to the fastest in the same comparison without compilation."""
    twin = {**dataclasses.asdict(case), "compiled": False}
    trials = next(next(iter(c["trials"].values())) for c in done if twin.items() <= c.items())
    seconds = {backend: result for backend, result in trials.items() if not isinstance(result, str)}
    return [backend for backend in seconds if seconds[backend] < WORTH_COMPILING * min(seconds.values())]


def gather(zoo: Zoo, case: Case, our_backend: str, backends: list[str]) -> tuple[dict, tuple, dict[tuple, Contender]]:
    """Builds the contenders: ours, and the best of each peer.

    Returns:
        `tuple`: The trials of each peer's backends; our name and backend; all contenders by name and backend.
    """
    build = run_experts if case.experts_alone else BUILDERS[case.suite]
    if case.suite == "loss":
        return {}, (OUR_LOSS, None), {(name, None): build(zoo, case, name, None) for name in LOSSES}
    ours, trials = (OURS, our_backend), {}
    contenders = {ours: build(zoo, case, *ours)}
    if case.experts_alone:
        # All peers have the same experts module, which is also ours.
        trials["transformers"], running = try_backends(build, zoo, case, OURS, backends)
        fastest = min(trials["transformers"][backend] for backend in running)
        for backend, contender in running.items():
            if trials["transformers"][backend] < HOPELESS * fastest:
                contenders["transformers", backend] = contender
        return trials, ours, contenders
    for peer in ["Qwen3-MoE"] if case.suite == "scaling" else PEERS:
        trials[peer], running = try_backends(build, zoo, case, peer, backends)
        if not running:
            continue
        best = next(iter(running))
        contenders[peer, best] = running[best]
        if case.compiled:
            # Compilation takes long, and the experts modules of the peers are the same code.
            backends = [best]
    if case.suite != "scaling":
        contenders[DENSE, None] = build(zoo, case, DENSE, None)
        contenders[FREE, FREE] = build(zoo, case, OURS, FREE)
        contenders[FREE_ROUTING, None] = build(zoo, case, FREE_ROUTING, our_backend)
    return trials, ours, contenders


def compare(zoo: Zoo, case: Case, our_backend: str, backends: list[str], seconds: float) -> dict:
    """Runs one comparison: trials of the peers' backends, then interleaved rounds with the best of each.

    Args:
        zoo (`Zoo`): The contenders' shape and parameters.
        case (`Case`): The comparison.
        our_backend (`str`): Experts implementation of PathMoE.
        backends (`list[str]`): Backends to try for the peers.
        seconds (`float`): Duration of the rounds, unless `MIN_ROUNDS` take longer.
    """
    if case.compiled:
        # Code compiled for other cases counts towards the limit beyond which dynamo falls back to eager.
        torch._dynamo.reset()
    start = time.perf_counter()
    trials, ours, contenders = gather(zoo, case, our_backend, backends)
    for key, contender in contenders.items():
        if contender.first is None:
            contender.start(key[0])
    for key, contender in contenders.items():
        if key[0] in SAME_FUNCTION:
            check_agreement(contenders[ours].first, contender.first, key)
    runs = {key: contender.run for key, contender in contenders.items()}
    times = take_turns(runs, seconds, zoo.device, warm_up=case.compiled or case.dtype == "bfloat16")
    flops = count_flops(zoo, case)
    results = []
    for key, contender in contenders.items():
        ratios = [other / own for other, own in zip(times[key], times[ours])]
        median = statistics.median(times[key])
        result = {"model": key[0], "backend": key[1], "ours": key == ours, "seconds": median}
        result["ratio"] = statistics.quantiles(ratios, n=4)
        result["gflops"] = None if key[0] in (DENSE, FREE, FREE_ROUTING) else flops / median / 1e9
        result["peak_memory"] = peak_memory(contender, zoo, case)
        if contender.first.ndim == 0:
            result["loss"] = contender.first.item()
        if contender.forward and not case.compiled:
            result["activation_memory"] = activation_memory(contender)
        results.append(result)
    counts = {"rounds": len(times[ours]), "took": time.perf_counter() - start, "flops": flops}
    return {**dataclasses.asdict(case), **counts, "trials": trials, "results": results}


def take_turns(runs: dict, seconds: float, device: str, warm_up: bool) -> dict[object, list[float]]:
    """Returns the seconds of each run in each round, in a new random order every round. Warming up calls each run with
    every batch first."""
    # oneDNN compiles bfloat16 products for each new number of rows: the first run of a batch would pay for the others.
    for turn in range(BATCHES if warm_up else 0):
        for run in runs.values():
            run(turn)
    times = {key: [] for key in runs}
    order = random.Random(0)
    deadline = time.perf_counter() + seconds
    rounds = 0
    while rounds < MIN_ROUNDS or time.perf_counter() < deadline:
        for key in order.sample(list(runs), len(runs)):
            times[key].append(seconds_of(functools.partial(runs[key], rounds), device))
        rounds += 1
    return times


def matmul_peak(config: PathMoEConfig, dtype: str, device: str, tokens: int) -> dict[str, float]:
    """Measures the GFLOP/s of matrix products: of squares, and of one expert's share of the tokens with its first
    weight. This is repeated before every comparison, so that one busy moment does not set the machine's peak."""
    squares = [512, 1024, 2048] + ([4096, 8192] if device != "cpu" else [])
    rows = max(1, tokens * config.num_experts_per_tok // config.num_experts)
    shapes = [(size, size, size) for size in squares]
    shapes.append((rows, config.hidden_size, 2 * config.moe_intermediate_size))
    rates = {}
    for rows, inner, columns in shapes:
        a, b = (torch.randn(size, dtype=getattr(torch, dtype), device=device)
                for size in ((rows, inner), (columns, inner)))  # fmt: skip
        F.linear(a, b)
        best = min(seconds_of(lambda: F.linear(a, b), device) for _ in range(3))  # noqa: B023
        rates[f"{rows} x {inner} x {columns}"] = 2 * rows * inner * columns / best / 1e9
    return rates


def plan_cases(options) -> list[Case]:
    """Returns all comparisons, those without compilation before the same ones with it."""
    cases = []
    for suite in options.suite:
        for shape in options.shape or SUITES[suite]:
            few_layers = load_config(shape).num_hidden_layers <= 2
            compiled = suite in (options.compile or []) and suite != "scaling" and (few_layers or options.shape)
            for dtype in options.dtype[:1] if suite == "scaling" else options.dtype:
                for mode in [False, True] if compiled else [False]:
                    cases += [Case(suite, shape, dtype, mode, *sizes) for sizes in plan_sizes(suite, shape, options)]
    return cases


def plan_sizes(suite: str, shape: str, options) -> list[tuple]:
    """Returns mode, number of sequences, tokens per sequence, and for a sweep its name and value."""
    small = options.device == "cpu"
    length = options.length or (512 if small else 2048)
    batch = options.batch_size or ((2 if shape == "quickstart" else 1) if small else 8)
    if suite == "train_step":
        return [("step", batch, length)]
    if suite == "prefill":
        return [("prefill", 1, length)]
    if suite == "decode":
        return [("decode", size, options.length or 128) for size in DECODE_BATCHES]
    if suite == "loss":
        return [("forward + backward", batch, length)]
    alone = ("forward + backward", 1, batch * length)
    if suite == "experts":
        return [alone, *(("forward", size, 1) for size in DECODE_BATCHES)]
    longest = max(SWEEPS["length"])
    return [
        *((*alone, "experts", value) for value in SWEEPS["experts"]),
        *((*alone, "top_k", value) for value in SWEEPS["top_k"]),
        *(("step", longest // value, value, "length", value) for value in SWEEPS["length"]),
        *(("forward + backward", 1, value, "tokens", value) for value in SWEEPS["tokens"]),
    ]


def overrides_of(case: Case) -> dict:
    """Returns the fields of the shape's configuration that a case changes."""
    if case.suite == "loss":
        return {"num_hidden_layers": 1}
    if case.suite != "scaling":
        return {}
    fields = {"num_hidden_layers": 1, "vocab_size": 512, "max_position_embeddings": max(SWEEPS["length"])}
    if case.sweep == "experts":
        fields["num_experts"] = case.value
    if case.sweep == "top_k":
        # Finer experts with the same number of parameters, active and in total.
        config = load_config(case.shape)
        fields["num_experts_per_tok"] = case.value
        fields["num_experts"] = config.num_experts * case.value // config.num_experts_per_tok
        fields["moe_intermediate_size"] = config.moe_intermediate_size * config.num_experts_per_tok // case.value
    return fields


def takes_too_long(case: Case, done: list[dict], seconds: float) -> bool:
    """Returns whether a point of a sweep would take much longer than its budget, judging by the previous point."""
    same = ("suite", "shape", "dtype", "sweep")
    before = [c for c in done if case.sweep and all(c[field] == getattr(case, field) for field in same)]
    if not before:
        return False
    growth = case.tokens / (before[-1]["batch"] * before[-1]["length"])
    return sum(result["seconds"] for result in before[-1]["results"]) * growth * MIN_ROUNDS > 10 * seconds


def describe_machine(options) -> dict:
    """Returns the machine and the versions, on which the figures depend."""
    cpu = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
    return {
        "machine": {
            "cpu": names[0] if names else platform.processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if options.device != "cpu" else None,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def find_commit() -> str | None:
    git = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    commit = git(["git", "rev-parse", "HEAD"]).stdout.strip() or None
    changed = bool(git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip())
    return commit + (" with changes" if changed else "") if commit else None


def resume(file: Path, report: dict) -> dict:
    """Reads the report of a stopped run, to continue it.

    Raises:
        SystemExit: If the settings, the machine or the versions have changed.
    """
    stopped = json.loads(file.read_text())
    if commits := {comparison["commit"] for comparison in stopped["comparisons"]} - {find_commit()}:
        print(f"{file} has comparisons of other commits, which are kept: {', '.join(map(str, commits))}")
    for field in ("settings", "machine", "versions"):
        if stopped[field] != json.loads(json.dumps(report[field])):
            raise SystemExit(f"--resume: {file} has different {field} ({stopped[field]}): run without --resume.")
    return stopped


def parse_options(args: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--shape", nargs="+", help=f"{', '.join(SHAPES)}, or a JSON file; each suite's own when unset")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument(
        "--compile", nargs="*", choices=list(SUITES), metavar="SUITE",
        help="suites to run also compiled (all suites when none is given); only for shapes of at most two layers, "
        "unless --shape is set",
    )  # fmt: skip
    parser.add_argument("--ours", default="pathmoe", help="experts implementation of PathMoE")
    parser.add_argument("--batch_size", type=int, help="sequences in a training step")
    parser.add_argument("--length", type=int, help="tokens in a sequence")
    parser.add_argument("--seconds", type=float, default=3.0, help="duration of the rounds of one comparison")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file for the figures, written after each comparison")
    parser.add_argument("--resume", action="store_true", help="run only the comparisons that --json lacks")
    parser.add_argument("--plot", type=Path, help="picture of the scaling suite, or of that of the first --table")
    parser.add_argument("--table", type=Path, nargs="+", help="only print the table of such files")
    options = parser.parse_args(args)
    check_options(options, {"batch_size": 1, "length": 1, "seconds": 0}, json='"matmul_peak"', plot="Matplotlib")
    if options.plot and not options.table and "scaling" not in options.suite:
        parser.error(f"--plot {options.plot} draws the scaling suite: add it to --suite.")
    if options.resume and not (options.json and options.json.is_file()):
        parser.error("--resume needs a --json file that a stopped run has written.")
    if options.compile == []:
        options.compile = list(SUITES)
    if not options.table and options.ours not in ["eager", *ALL_EXPERTS_FUNCTIONS]:
        parser.error(f"--ours {options.ours} must be one of eager, {', '.join(ALL_EXPERTS_FUNCTIONS)}.")
    for shape in options.shape or []:
        if shape not in SHAPES and not Path(shape).is_file():
            parser.error(f"--shape {shape} must be a file or one of {', '.join(SHAPES)}.")
    return options


def main(args: list[str] | None = None):
    options = parse_options(args)
    if options.table:
        reports = [read_report(file, "comparisons") for file in options.table]
        print(make_table(*reports))
        if options.plot:
            plot_scaling(reports[0], options.plot)
        return
    if options.compile:
        torch.compile(lambda x: x + 1)(torch.ones(8, device=options.device))  # fails early if there is no compiler
        torch._dynamo.config.recompile_limit = 64
    elsewhere = ("json", "plot", "table", "resume")
    settings = {key: value for key, value in vars(options).items() if key not in elsewhere}
    report = {"settings": settings, **describe_machine(options), "matmul_peak": {}, "comparisons": [], "left_out": []}
    if options.resume:
        report = resume(options.json, report)
    commit = find_commit()
    progress = tqdm(plan_cases(options), desc="comparisons", disable=None)
    for case in progress:
        progress.set_postfix_str(f"{case.suite} {case.shape} {case.dtype}")
        if any(dataclasses.asdict(case).items() <= comparison.items() for comparison in report["comparisons"]):
            continue
        if takes_too_long(case, report["comparisons"], options.seconds):
            report["left_out"].append(dataclasses.asdict(case))
            continue
        load = os.getloadavg()[0]
        zoo = make_zoo(case.shape, case.dtype, options.device, **overrides_of(case))
        peaks = report["matmul_peak"].setdefault(case.shape, {}).setdefault(case.dtype, {})
        for size, rate in matmul_peak(zoo.config, case.dtype, options.device, case.tokens).items():
            peaks[size] = max(rate, peaks.get(size, 0))
        one_expert = peaks[size]
        done = report["comparisons"]
        backends = worth_compiling(case, done) if case.compiled and case.suite != "loss" else BACKENDS
        seconds = options.seconds / (4 if case.sweep else 1)
        done.append(compare(zoo, case, options.ours, backends, seconds))
        done[-1] |= {"one_expert_gflops": one_expert, "load_before": load, "commit": commit}
        tqdm.write(describe(done[-1], find_peak(report, done[-1])))
        if options.json:
            write_text(options.json, json.dumps(report, indent=1) + "\n")
    if options.plot:
        plot_scaling(report, options.plot)


if __name__ == "__main__":
    run_command(main)
