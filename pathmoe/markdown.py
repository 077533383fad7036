# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Markdown that the toolkit's reports are made of."""

from collections.abc import Collection, Iterable, Sequence


def markdown_table(
    head: Sequence[str], rows: Iterable[Sequence[object]], left: Collection[int] = (0,), gap: str = ""
) -> str:
    """A Markdown table, without a line break at its end.

    Args:
        head (`Sequence[str]`): The titles of the columns.
        rows (`Iterable[Sequence]`): The cells of each row.
        left (`Collection[int]`, defaults to the first): The columns that are aligned to the left.
        gap (`str`, defaults to `""`): What stands around the marks of the alignment.
    """
    first, *others = ("| " + " | ".join(map(str, cells)) + " |" for cells in (head, *rows))
    marks = (gap + ("---" if column in left else "--:") + gap for column in range(len(head)))
    return "\n".join([first, f"|{'|'.join(marks)}|", *others])
