# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Perplexity of a causal language model, as a module of `evaluate`; eval/perplexity.py is its command line.

import evaluate
metric = evaluate.load("eval/metrics/perplexity")
metric.compute(predictions=["Some text."], model=model, tokenizer=tokenizer)["bits_per_byte"]
"""

import datasets
import evaluate

from pathmoe.evaluate.scoring import perplexity, score


class Perplexity(evaluate.Metric):
    """Wraps [`perplexity`] for `evaluate`. The texts are `predictions`; all other arguments are passed on."""

    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=score.__doc__,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions, model, tokenizer, **settings):
        return perplexity(model, tokenizer, predictions, **settings)
