# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Formats Markdown for reports."""

from collections.abc import Collection, Iterable, Sequence


def markdown_table(
    head: Sequence[str], rows: Iterable[Sequence[object]], left: Collection[int] = (0,), gap: str = ""
) -> str:
    """Formats a Markdown table, without a line break at the end.

    Args:
        head (`Sequence[str]`): The titles of the columns.
        rows (`Iterable[Sequence]`): The cells of each row.
        left (`Collection[int]`, defaults to the first): The columns that are aligned to the left.
        gap (`str`, defaults to `""`): The text on both sides of each alignment mark.
    """
    first, *others = ("| " + " | ".join(map(str, cells)) + " |" for cells in (head, *rows))
    marks = (gap + ("---" if column in left else "--:") + gap for column in range(len(head)))
    return "\n".join([first, f"|{'|'.join(marks)}|", *others])
