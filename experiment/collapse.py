# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Measures the collapse in the first 200 steps with the usual and the new start, and the effect of a perturbation."""

import json

import matplotlib
import numpy as np
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from experiment.measure import commit, processor
from experiment.runs import Experiment, merge
from pathmoe.files import write_aside, write_text
from pathmoe.train.data import build_data, make_inputs
from pathmoe.train.engine import clip_gradients, gradient_norm
from pathmoe.train.model import build_config, build_model
from pathmoe.train.optimizer import build_optimizer
from pathmoe.train.recipe import Recipe
from pathmoe.train.routing_monitor import RoutingMonitor
from pathmoe.train.start import token_frequencies


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


STEPS, EVERY, SEED, PERTURBATION, RATE = 200, 2, 100, 1e-6, 3e-3
STARTS = {
    "old": {"unigram_start": False, "zero_init_projections": False, "model_overrides": {"tie_word_embeddings": True}},
    "new": {},
}
ROWS = ("indep", "pathb4", "rand")
PERTURBED = ("indep", "pathb4")


def first_steps(recipe: Recipe, perturbation: float) -> dict:
    """Trains for a few steps.

    Returns:
        `dict`: `loss` of every step, and, for each layer every `EVERY` steps, `effective_experts` and `cosine` (the
        mean cosine between the experts' inputs of two different tokens of the batch).
    """
    accelerator = Accelerator(cpu=True)
    config = build_config(recipe)
    tokenizer, batches, _ = build_data(recipe, accelerator, config.vocab_size)
    frequencies = token_frequencies(batches, config.vocab_size, accelerator) if recipe.unigram_start else None
    model = build_model(recipe, config, tokenizer, accelerator, frequencies).train()
    if perturbation:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + perturbation * torch.randn(parameter.shape, generator=generator))
    optimizer, scheduler = build_optimizer(recipe, model)
    monitor, cosines = RoutingMonitor(model, accelerator), []
    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_hook(lambda _, args, out: cosines.append(mean_cosine(out)))
    found = {"steps": [], "loss": [], "effective_experts": [], "cosine": []}
    for step in range(1, recipe.max_steps + 1):
        cosines.clear()
        inputs = make_inputs(batches.next_batch(recipe.batch_size), recipe, tokenizer.eos_token_id)
        output = model(**inputs, use_cache=False, output_router_logits=True)
        output.loss.backward()
        if step == 1 or step % EVERY == 0:
            found["steps"].append(step)
            found["effective_experts"].append(monitor.measure(output.router_logits)["effective_experts"])
            found["cosine"].append([round(cosine, 4) for cosine in cosines])
        found["loss"].append(round(output.loss.item(), 5))
        clip_gradients(model, recipe.max_grad_norm, gradient_norm(model).item())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
    return found


@torch.no_grad()
def mean_cosine(hidden_states: torch.Tensor) -> float:
    """Returns the mean cosine over all pairs of different tokens, for hidden states of shape `(batch, T, D)`."""
    unit = torch.nn.functional.normalize(hidden_states.flatten(0, 1), dim=-1)
    count = len(unit)
    return ((unit.sum(dim=0).square().sum() - count) / (count * (count - 1))).item()


def collapse(experiment: Experiment) -> int:
    """Trains the runs that have no result yet, and draws the picture."""
    runs = [(start, row, 0.0) for row in ROWS for start in STARTS]
    runs += [(start, row, PERTURBATION) for row in PERTURBED for start in STARTS]
    shared = experiment.settings["recipe"] | {
        "output_dir": str(experiment.output / "collapse"), "tokenizer": str(experiment.output / "tokenizer"),
        "max_steps": STEPS, "batch_size": 4, "micro_batch_size": 4, "seed": SEED, "learning_rate": RATE,
    }  # fmt: skip
    for start, row, perturbation in tqdm(runs, desc="collapse", unit="run"):
        file = experiment.results / f"collapse-{start}-{row}{'-perturbed' if perturbation else ''}.json"
        if not file.exists():
            fields = merge(merge(shared, STARTS[start]), experiment.settings["rows"][row])
            found = first_steps(Recipe(**fields), perturbation)
            note = {"part": "collapse", "start": start, "row": row, "perturbation": perturbation, "commit": commit(),
                    "processor": processor(), "corpus": experiment.corpus}  # fmt: skip
            write_text(file, json.dumps(note | found) + "\n")
    draw_collapse(experiment)
    return 0


def draw_collapse(experiment: Experiment):
    """Draws collapse.png from the results so far."""
    found = [json.loads(file.read_text()) for file in sorted(experiment.results.glob("collapse-*.json"))]
    if not found:
        return
    figure, (experts, cosine, loss) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    colours = dict(zip(ROWS, ("tab:blue", "tab:orange", "tab:gray")))
    whole = {(run["start"], run["row"]): run for run in found if not run["perturbation"]}
    for (start, row), run in whole.items():
        style = {"color": colours[row], "ls": "--" if start == "old" else "-", "label": f"{row}, {start} start"}
        experts.plot(run["steps"], np.mean(run["effective_experts"], axis=1), **style)
        cosine.plot(run["steps"], np.mean(run["cosine"], axis=1), **style)
    for run in found:
        if run["perturbation"] and (twin := whole.get((run["start"], run["row"]))):
            apart = np.abs(np.subtract(run["loss"], twin["loss"]))
            style = {"color": colours[run["row"]], "ls": "--" if run["start"] == "old" else "-"}
            loss.semilogy(np.maximum(apart, 1e-6), label=f"{run['row']}, {run['start']} start", **style)
    experts.set(title="effective experts of 16, mean over layers", xlabel="step", ylim=(0, 16.5))
    cosine.set(title="cosine of two tokens' expert inputs, mean over layers", xlabel="step")
    loss.set(title=f"loss of a run perturbed by {PERTURBATION:g} minus its twin's (nats)", xlabel="step")
    for axes in (experts, cosine, loss):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    with write_aside(experiment.results / "collapse.png") as partial:
        figure.savefig(partial, dpi=90, format="png")
    plt.close(figure)
