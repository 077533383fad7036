# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import functools
import json

import pytest
import torch

from benchmarks import bench, contenders
from benchmarks.bench_report import BESIDE, find_ours, make_table
from pathmoe.accounting import count_parameters, forward_flops_per_token


SHAPE = {
    "model_type": "pathmoe", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2,
    "max_position_embeddings": 64, "router_block_size": 2, "norm_topk_prob": True, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    file = tmp_path_factory.mktemp("bench") / "tiny.json"
    file.write_text(json.dumps(SHAPE))
    return str(file)


@pytest.fixture(scope="module")
def zoo(shape):
    return contenders.make_zoo(shape, "float32", "cpu")


@pytest.fixture(scope="module")
def report(shape, tmp_path_factory):
    """What a real run of all suites writes, with short sweeps; transformers' grouped_mm stands for ours."""
    folder = tmp_path_factory.mktemp("report")
    sweeps = {"experts": [8, 16], "top_k": [1, 2], "length": [16, 32], "tokens": [1, 16]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "SWEEPS", sweeps)
        patch.setattr(bench, "DECODE_BATCHES", [1, 2])
        patch.setattr(bench, "DECODE_STEPS", 2)
        args = ["--shape", shape, "--ours", "grouped_mm", "--seconds", "0", "--batch_size", "2", "--length", "16"]
        args += ["--dtype", "float32", "--device", "cpu", "--json", str(folder / "bench.json")]
        bench.main([*args, "--suite", *bench.SUITES])
        whole = json.loads((folder / "bench.json").read_text())
        stopped = {**whole, "comparisons": whole["comparisons"][:-1]}
        (folder / "bench.json").write_text(json.dumps(stopped))
        bench.main([*args, "--resume", "--plot", str(folder / "scaling.png")])
        with pytest.raises(SystemExit, match="has different settings"):
            bench.main([*args, "--resume", "--seconds", "1"])
    assert (folder / "scaling.png").stat().st_size > 10_000
    resumed = json.loads((folder / "bench.json").read_text())
    assert resumed["comparisons"][:-1] == stopped["comparisons"]
    assert len(resumed["comparisons"]) == len(whole["comparisons"])
    assert resumed["comparisons"][-1]["took"] != whole["comparisons"][-1]["took"]
    return resumed


def test_a_run_reports_every_suite_with_its_peers(report):
    found = {}
    for comparison in report["comparisons"]:
        found.setdefault(comparison["suite"], set()).update(result["model"] for result in comparison["results"])
    bounds = {"experts that cost nothing", "routing that costs nothing"}
    models = {"PathMoE", "OLMoE", "Qwen3-MoE", "Mixtral", "dense Qwen3"} | bounds
    assert found == {
        "train_step": models,
        "prefill": models,
        "decode": models,
        "experts": {"PathMoE", "transformers"},
        "scaling": {"PathMoE", "transformers", "Qwen3-MoE"},
        "loss": set(contenders.LOSSES),
    }
    assert {c["sweep"] for c in report["comparisons"] if c["suite"] == "scaling"} == set(bench.SWEEPS)


def test_every_backend_of_every_peer_is_tried_or_says_why_not(report):
    for comparison in report["comparisons"]:
        for trials in comparison["trials"].values():
            assert trials.keys() == set(bench.BACKENDS)
            assert all(isinstance(result, str) or result > 0 for result in trials.values())
            assert not isinstance(trials["grouped_mm"], str)


def test_ratios_are_those_of_the_rounds(report):
    for comparison in report["comparisons"]:
        assert find_ours(comparison)["ratio"] == [1, 1, 1]
        assert comparison["rounds"] >= bench.MIN_ROUNDS
        peaks = report["matmul_peak"][comparison["shape"]]["float32"]
        assert max(peaks.values()) > find_ours(comparison)["gflops"]
        for result in comparison["results"]:
            low, middle, high = result["ratio"]
            assert 0 < low <= middle <= high


def test_peers_have_the_active_flops_and_parameters_of_ours(zoo):
    ours = zoo.build("PathMoE", "eager").config
    flops, active = forward_flops_per_token(ours, 32), count_parameters(ours)["active"]
    routers = SHAPE["num_hidden_layers"] * SHAPE["num_experts"] * SHAPE["hidden_size"]
    for peer in bench.PEERS:
        assert forward_flops_per_token(contenders.peer_config(peer, ours), 32) == flops
    dense = contenders.peer_config("dense Qwen3", ours)
    assert forward_flops_per_token(dense, 32) == flops - 2 * routers
    assert count_parameters(dense)["active"] == active - count_parameters(ours)["router"]


def test_models_hold_the_same_parameters_and_their_own_backend(zoo):
    ours = zoo.build("PathMoE", "eager")
    for peer in bench.PEERS:
        model = zoo.build(peer, "batched_mm")
        assert model.config._experts_implementation == "batched_mm"
        assert model.model.layers[1].mlp.experts.down_proj is ours.model.layers[1].mlp.experts.down_proj
        assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert zoo.build("PathMoE", "grouped_mm").config._experts_implementation == "grouped_mm"
    assert ours.config._experts_implementation == "eager"


def test_qwen3_moe_of_the_zoo_computes_what_ours_does(report):
    (comparison,) = (c for c in report["comparisons"] if c["suite"] == "train_step")
    losses = {result["model"]: result["loss"] for result in comparison["results"]}
    assert losses["Qwen3-MoE"] == pytest.approx(losses["PathMoE"], rel=1e-5)


def test_another_function_stops_the_comparison():
    with pytest.raises(SystemExit, match="differ by"):
        bench.check_agreement(torch.ones(4), torch.ones(4) * 1.01, ("Qwen3-MoE", "eager"))


def test_training_steps_change_no_parameter_and_share_the_moments(shape):
    zoo = contenders.Zoo(contenders.load_config(shape), torch.float32, "cpu")
    before = {name: parameter.detach().clone() for name, parameter in zoo.parameters.items()}
    case = contenders.Case("train_step", shape, "float32", False, "step", 1, 8)
    for name in ("PathMoE", "Mixtral"):
        contenders.train_step(zoo, case, name, "eager").run()
    for name, parameter in zoo.parameters.items():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])
    moments = zoo.moments[zoo.parameters["model.layers.0.mlp.experts.down_proj"]]
    assert moments["step"] == 2
    assert moments["exp_avg"].abs().sum() > 0


def test_saved_activations_of_linear_layers_are_counted_by_hand():
    first, second = torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)
    x = torch.randn(5, 8)

    def forward():
        # Autograd keeps x once although two products need it, silu's input and output, and no parameter.
        return second(torch.nn.functional.silu(first(x) + first(x)))

    known = [*first.parameters(), *second.parameters(), x]
    found = bench.activation_memory(contenders.Contender(forward, known, forward))
    assert found == {"saved": 4 * (5 * 8 + 5 * 16 + 5 * 16), "held": 4 * (5 * 16 + 5 * 16)}


def test_saved_activations_of_grouped_mm_are_counted_by_hand(zoo, shape):
    case = contenders.Case("experts", shape, "float32", False, "forward + backward", 1, 24)
    found = bench.activation_memory(contenders.run_experts(zoo, case, "PathMoE", "grouped_mm"))
    rows, hidden, width = 24 * 2, SHAPE["hidden_size"], SHAPE["moe_intermediate_size"]
    # Gathered states; gate and up; silu of the gate; its product with up; the output before and its weight. The few
    # integers that say where rows come from are left to the tolerance.
    floats = rows * (hidden + 2 * width + width + width + hidden + 1)
    assert 4 * floats <= found["saved"] <= 4 * floats + 8 * (5 * rows + 2 * 8)


@pytest.mark.parametrize(
    "suite", ["experts", *(pytest.param(s, marks=pytest.mark.slow) for s in ("decode", "train_step"))]
)
def test_a_compiled_comparison_follows_its_twin_with_the_backends_that_had_a_chance(suite, tmp_path):
    shape = tmp_path / "shape.json"
    shape.write_text(json.dumps(SHAPE | {"num_hidden_layers": 1}))
    with pytest.MonkeyPatch.context() as patch:
        # Inductor needs minutes; what it is given is the same.
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
        patch.setattr(bench, "DECODE_BATCHES", [2])
        patch.setattr(bench, "DECODE_STEPS", 2)
        args = ["--shape", str(shape), "--ours", "grouped_mm", "--seconds", "0", "--length", "8"]
        file = tmp_path / "bench.json"
        args += ["--dtype", "float32", "--device", "cpu", "--json", str(file)]
        bench.main([*args, "--suite", suite, "--compile"])
    comparisons = json.loads(file.read_text())["comparisons"]
    half = len(comparisons) // 2
    for twin, compiled in zip(comparisons[:half], comparisons[half:], strict=True):
        assert (twin["compiled"], compiled["compiled"]) == (False, True)
        trials = next(iter(twin["trials"].values()))
        seconds = [result for result in trials.values() if not isinstance(result, str)]
        tried = next(iter(compiled["trials"].values()))
        limit = bench.WORTH_COMPILING * min(seconds)
        assert set(tried) == {name for name in trials if trials[name] in seconds and trials[name] < limit}
        assert all(result["peak_memory"] is None for result in compiled["results"])


def test_token_ids_follow_zipfs_law():
    counts = torch.bincount(contenders.zipf(50, (20_000,)), minlength=50)
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.2)


def test_table_is_made_of_the_file(report, tmp_path, capsys):
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(report))
    bench.main(["--table", str(file), str(file)])
    table = capsys.readouterr().out.splitlines()
    shown = [comparison for comparison in report["comparisons"] if comparison["suite"] != "scaling"]
    assert len(table) == 2 + len(shown)
    for row, comparison in zip(table[2:], shown):
        assert f"| {find_ours(comparison)['seconds'] * 1e3:.3g} |" in row
        peers = [r["ratio"][1] for r in comparison["results"] if not r["ours"] and r["model"] not in BESIDE]
        assert f"{min(peers):.2f} (" in row
    report["comparisons"][0]["results"][0]["seconds"] = 12.3
    assert "| 1.23e+04 |" in make_table(report)


def test_an_unknown_backend_or_shape_is_refused_with_the_names_there_are(capsys):
    for args, names in ((["--ours", "nothing"], "grouped_mm"), (["--ours", "eager", "--shape", "huge"], "quickstart")):
        with pytest.raises(SystemExit):
            bench.main(args)
        assert names in capsys.readouterr().err
