# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Reports the results of `bench.py` as lines, a table and a picture."""

from pathlib import Path

from pathmoe.files import write_aside
from pathmoe.markdown import markdown_table


# These do not compete: the dense model has no experts, and the bounds leave out the work of experts or of routing.
BESIDE = ("dense Qwen3", "experts that cost nothing", "routing that costs nothing")


def find_ours(comparison: dict) -> dict:
    return next(result for result in comparison["results"] if result["ours"])


def find_best_peer(comparison: dict) -> dict:
    """Returns the competing result with the lowest median ratio to ours."""
    peers = [r for r in comparison["results"] if not r["ours"] and r["model"] not in BESIDE]
    return min(peers, key=lambda result: result["ratio"][1])


def find_peak(report: dict, comparison: dict) -> float:
    """Returns the GFLOP/s of the fastest matrix product beside the comparisons of a shape and dtype."""
    return max(report["matmul_peak"][comparison["shape"]][comparison["dtype"]].values())


def find_result(comparison: dict, model: str) -> dict | None:
    return next((result for result in comparison["results"] if result["model"] == model), None)


def _name(result: dict) -> str:
    return f"{result['model']}, {result['backend']}" if result["backend"] else result["model"]


def _case(comparison: dict) -> str:
    suite = {"train_step": "training step", "experts": f"experts, {comparison['mode']}"}.get(
        comparison["suite"], comparison["suite"]
    )
    if comparison["suite"] == "decode":
        size = f"batch {comparison['batch']}"
    elif comparison["suite"] == "experts":
        size = f"{comparison['batch'] * comparison['length']} tokens"
    else:
        size = f"{comparison['batch']} x {comparison['length']}"
    if comparison["sweep"]:
        size += f", {comparison['sweep']} {comparison['value']}"
    return f"{suite}, {size}"


def _ratio(comparison: dict) -> str:
    peer = find_best_peer(comparison)
    low, middle, high = peer["ratio"]
    text = f"{middle:.2f} ({low:.2f} to {high:.2f})"
    if bound := find_result(comparison, "experts that cost nothing"):
        # The peer over the bound, from both over ours.
        text += f" of {middle / bound['ratio'][1]:.2f}"
    elif comparison["mode"] == "forward + backward" and comparison["suite"] == "experts":
        # The peer over its products alone, at the rate that a product of one expert's share of the tokens reaches.
        text += f" of {peer['seconds'] * comparison['one_expert_gflops'] * 1e9 / comparison['flops']:.2f}"
    return text


def _memory(comparison: dict) -> str:
    ours, peer = find_ours(comparison), find_best_peer(comparison)
    if "activation_memory" in ours:
        grouped = [r["activation_memory"]["saved"] for r in comparison["results"] if r["backend"] == "grouped_mm"]
        # grouped_mm is missing where it was hopelessly slow.
        return f"{ours['activation_memory']['saved'] / grouped[0]:.2f} of grouped_mm's" if grouped else ""
    if ours["peak_memory"] and peer["peak_memory"]:
        return f"{ours['peak_memory'] / peer['peak_memory']:.2f}"
    return ""


def describe(comparison: dict, peak: float) -> str:
    """Returns one line for the terminal.

    Args:
        comparison (`dict`): An entry of the file's `comparisons`.
        peak (`float`): GFLOP/s of the fastest matrix product so far, in the same dtype.
    """
    ours, mode = find_ours(comparison), "compiled" if comparison["compiled"] else "eager"
    return (
        f"{_case(comparison)}, {comparison['shape']}, {comparison['dtype']}, {mode}: {ours['seconds'] * 1e3:.3g} ms, "
        f"{ours['gflops']:.3g} GFLOP/s of {peak:.3g}; "
        f"{_name(find_best_peer(comparison))} / ours: {_ratio(comparison)}"
    )


def make_table(*reports: dict) -> str:
    """Returns the comparisons as a Markdown table, without the scaling suite, which is drawn.

    Args:
        reports (`dict`): Reports of `bench.py --json`. Of a comparison in several reports, the first one counts.
    """
    head = [
        "call", "shape", "dtype", "mode", "ours, ms", "best peer", "its time / ours", "Qwen3-MoE / ours",
        "dense / ours", "routing", "of peak", "peer's", "memory",
    ]  # fmt: skip
    table = []
    fields = ("suite", "shape", "dtype", "compiled", "mode", "batch", "length")
    rows = {}
    for report in reports:
        for comparison in report["comparisons"]:
            if comparison["suite"] != "scaling":
                rows.setdefault(tuple(comparison[field] for field in fields), (report, comparison))
    for report, comparison in rows.values():
        ours, peer = find_ours(comparison), find_best_peer(comparison)
        peak = find_peak(report, comparison)
        same, dense, routing = (
            find_result(comparison, name) for name in ("Qwen3-MoE", "dense Qwen3", "routing that costs nothing")
        )
        cells = [
            _case(comparison),
            Path(comparison["shape"]).stem if comparison["shape"].endswith(".json") else comparison["shape"],
            comparison["dtype"],
            "compiled" if comparison["compiled"] else "eager",
            f"{ours['seconds'] * 1e3:.3g}",
            _name(peer),
            _ratio(comparison),
            f"{same['ratio'][1]:.2f}" if same else "",
            f"{dense['ratio'][1]:.2f}" if dense else "",
            f"{1 - routing['ratio'][1]:.0%}" if routing else "",
            f"{ours['gflops'] / peak:.0%}",
            f"{peer['gflops'] / peak:.0%}",
            _memory(comparison),
        ]
        table.append(cells)
    return markdown_table(head, table, left=(0, 1, 2, 3, 5))


def plot_scaling(report: dict, file: Path):
    """Draws the scaling suite: microseconds per token over each of the four sizes, a line for each contender.

    Args:
        report (`dict`): A report of `bench.py --json`.
        file (`Path`): The picture.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    titles = {
        "experts": "experts E, k of them for a token",
        "top_k": "k chosen of finer experts, active parameters equal",
        "length": "length, one layer's training step, equal tokens",
        "tokens": "tokens in a step",
    }
    points = [comparison for comparison in report["comparisons"] if comparison["suite"] == "scaling"]
    dtypes = list(dict.fromkeys(point["dtype"] for point in points))
    figure, rows = pyplot.subplots(len(dtypes), len(titles), figsize=(17, 3.8 * len(dtypes)), squeeze=False)
    for axes_of_dtype, dtype in zip(rows, dtypes):
        for axes, (sweep, title) in zip(axes_of_dtype, titles.items()):
            lines = {}
            for point in points:
                if (point["sweep"], point["dtype"]) != (sweep, dtype):
                    continue
                for result in point["results"]:
                    name = "PathMoE (ours)" if result["ours"] else _name(result)
                    per_token = result["seconds"] * 1e6 / (point["batch"] * point["length"])
                    lines.setdefault(name, []).append((point["value"], per_token))
            for name, line in lines.items():
                axes.plot(*zip(*line), marker="o", markersize=3, label=name, linewidth=2 if "ours" in name else 1)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_major_formatter("{x:g}")
            low, high = axes.get_ylim()
            axes.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else "")
            axes.tick_params(which="both", labelsize=7)
            axes.set_title(f"{title}, {dtype}", fontsize=8)
            axes.legend(fontsize=7)
        axes_of_dtype[0].set_ylabel("microseconds per token")
    figure.tight_layout()
    with write_aside(file) as partial:
        figure.savefig(partial, dpi=110)
    pyplot.close(figure)
