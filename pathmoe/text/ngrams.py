# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Computes 64-bit digests of runs of N words, by which texts are compared."""

import hashlib
import re

import numpy as np


WORD = re.compile(r"\w+")
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that every word of a run changes its digest


class Words(dict):
    """The 64-bit digests of words. Each digest is computed on first access."""

    def __missing__(self, word: str) -> int:
        self[word] = int.from_bytes(hashlib.blake2b(word.encode("utf-8"), digest_size=8).digest(), "little")
        return self[word]


def ngram_digests(text: str, n: int, words: Words) -> np.ndarray:
    """Computes a 64-bit digest of every run of `n` words of a text.

    Args:
        text (`str`): Any text.
        n (`int`): Number of words in a run.
        words (`Words`): The digests of words, to which new words are added.

    Returns:
        `np.ndarray` of shape `(runs,)`, uint64: The digests in the order of the text. Equal runs have equal digests,
        and different runs have equal digests with a probability of 2^-64.
    """
    of_words = np.fromiter(map(words.__getitem__, WORD.findall(text.lower())), dtype=np.uint64)
    runs = np.zeros(max(0, len(of_words) - n + 1), dtype=np.uint64)
    for i in range(n):
        runs = runs * FACTOR + of_words[i : i + len(runs)]
    return runs


def are_among(runs: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Returns for each run whether it is in `known`, which must be sorted and not empty.

    This is much faster than `np.isin` for few runs and many known ones.
    """
    return known[np.minimum(np.searchsorted(known, runs), len(known) - 1)] == runs
