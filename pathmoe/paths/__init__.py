# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Expert paths of any mixture-of-experts model: record and replay, measure, perturb."""

from .hooks import RoutedModel, balance_routing, edit_paths
from .measure import (
    Interval,
    adjacent_jaccard,
    bootstrap,
    cluster_purity,
    distinct_paths,
    expert_load,
    jaccard_matrix,
    jackknife,
    load_entropy,
    load_variation,
    mutual_information,
    normalized_mutual_information,
    path_counts,
    path_coverage,
    path_entropy,
    path_ids,
    path_perplexity,
    permutation_baseline,
    routing_entropy,
    subsample_documents,
    sustained_engagement,
)
from .perturb import (
    PerturbationCurve,
    document_losses,
    freeze_routing,
    noise_router,
    restrict_paths,
    shuffle_experts,
)
from .record import PathTrace, record_paths
from .replay import replay_paths


__all__ = [
    "Interval",
    "PathTrace",
    "PerturbationCurve",
    "RoutedModel",
    "adjacent_jaccard",
    "balance_routing",
    "bootstrap",
    "cluster_purity",
    "distinct_paths",
    "document_losses",
    "edit_paths",
    "expert_load",
    "freeze_routing",
    "jaccard_matrix",
    "jackknife",
    "load_entropy",
    "load_variation",
    "mutual_information",
    "noise_router",
    "normalized_mutual_information",
    "path_counts",
    "path_coverage",
    "path_entropy",
    "path_ids",
    "path_perplexity",
    "permutation_baseline",
    "record_paths",
    "replay_paths",
    "restrict_paths",
    "routing_entropy",
    "shuffle_experts",
    "subsample_documents",
    "sustained_engagement",
]
