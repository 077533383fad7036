# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Draws docs/pictures/sharing.svg: independent routers beside shared ones.

    python docs/pictures/sharing.py

An illustration, not data: the paths of three tokens are written down below. Its colours follow the reader's theme.
"""

from pathlib import Path


LAYERS, EXPERTS, COLUMN, ROW = 8, 6, 46, 26
TOP, LEFT, PANEL = 78, 46, 440
COLOURS = ("blue", "orange", "green")  # one a token
STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #3a3f47; text-anchor: middle }
  .title { font-size: 16px; font-weight: 600 }
  .note { font-size: 12px; fill: #6b7280 }
  .expert { fill: none; stroke: #9aa2ad; stroke-width: 1.3 }
  .router { fill: #e8eaee; stroke: #9aa2ad; rx: 6px }
  .wire { stroke: #9aa2ad; stroke-dasharray: 2 3 }
  .path { fill: none; stroke-width: 3.5; stroke-linejoin: round; stroke-linecap: round; opacity: .9 }
  .blue { stroke: #3b6fd4 } .orange { stroke: #d9772b } .green { stroke: #2f9464 }
  @media (prefers-color-scheme: dark) {
    text { fill: #d5dae1 } .note { fill: #98a1ad } .router { fill: #2c323b }
    .blue { stroke: #6d9bf1 } .orange { stroke: #f09a56 } .green { stroke: #56bd8b }
  }
"""
# The top-1 expert of each token in each layer.
PANELS = (
    ("Independent routing", "a router for each layer", 1, ("25140352", "03415104", "51203425")),
    ("PathMoE, blocks of 4 layers", "a router for each block", 4, ("11112222", "33335544", "55550000")),
)


def x_of(panel: int, layer: float) -> float:
    return panel * PANEL + LEFT + layer * COLUMN + COLUMN / 2


def y_of(expert: int) -> float:
    return TOP + 44 + expert * ROW


def draw() -> str:
    """Returns the picture as SVG."""
    height = y_of(EXPERTS) + 34
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * PANEL} {height:g}" role="img">']
    lines += [
        "<title>Independent routers beside routers that blocks of layers share</title>",
        f"<style>{STYLE}</style>",
    ]
    for panel, (title, note, size, paths) in enumerate(PANELS):
        middle = x_of(panel, (LAYERS - 1) / 2)
        lines.append(f'<text class="title" x="{middle:g}" y="22">{title}</text>')
        lines.append(f'<text class="note" x="{middle:g}" y="42">{note}</text>')
        for first in range(0, LAYERS, size):
            left, right = x_of(panel, first) - 17, x_of(panel, first + size - 1) + 17
            centre, label = (left + right) / 2, "R" if size == 1 else "router"
            lines.append(f'<rect class="router" x="{left:g}" y="{TOP - 22}" width="{right - left:g}" height="26"/>')
            lines.append(f'<text x="{centre:g}" y="{TOP - 4}">{label}</text>')
        for layer in range(LAYERS):
            x = x_of(panel, layer)
            lines.append(f'<line class="wire" x1="{x:g}" y1="{TOP + 4}" x2="{x:g}" y2="{y_of(0) - 10:g}"/>')
            lines += [f'<circle class="expert" cx="{x:g}" cy="{y_of(e):g}" r="7"/>' for e in range(EXPERTS)]
            lines.append(f'<text class="note" x="{x:g}" y="{y_of(EXPERTS) + 2:g}">{layer + 1}</text>')
        for colour, path in zip(COLOURS, paths):
            points = " ".join(f"{x_of(panel, layer):g},{y_of(int(e)):g}" for layer, e in enumerate(path))
            lines.append(f'<polyline class="path {colour}" points="{points}"/>')
        lines.append(f'<text class="note" x="{middle:g}" y="{height - 8:g}">layers 1 to 8, six experts each</text>')
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw(), encoding="utf-8")
