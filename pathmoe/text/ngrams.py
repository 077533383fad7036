# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Runs of N words as 64-bit digests, by which texts are compared."""

import hashlib
import re

import numpy as np


WORD = re.compile(r"\w+")
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that every word of a run changes its digest


class Words(dict):
    """The 64-bit digest of each word, computed when it is first met."""

    def __missing__(self, word: str) -> int:
        self[word] = int.from_bytes(hashlib.blake2b(word.encode("utf-8"), digest_size=8).digest(), "little")
        return self[word]


def ngram_digests(text: str, n: int, words: Words) -> np.ndarray:
    """A 64-bit digest of every run of `n` words of a text.

    Args:
        text (`str`): Any text.
        n (`int`): Words in a run.
        words (`Words`): The digests of words so far.

    Returns:
        `np.ndarray` of shape `(runs,)`, uint64: In the order of the text; equal where the runs are equal, and else by
        a chance of 2^-64.
    """
    of_words = np.fromiter(map(words.__getitem__, WORD.findall(text.lower())), dtype=np.uint64)
    runs = np.zeros(max(0, len(of_words) - n + 1), dtype=np.uint64)
    for i in range(n):
        runs = runs * FACTOR + of_words[i : i + len(runs)]
    return runs


def are_among(runs: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Whether each run is one of the known ones, which are sorted and at least one: much faster than `np.isin` for few
    runs among many."""
    return known[np.minimum(np.searchsorted(known, runs), len(known) - 1)] == runs
