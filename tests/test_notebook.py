# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""The notebook runs from its first cell to its last, with fewer steps."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]


def test_the_notebook_runs_and_its_blocks_agree():
    notebook = (ROOT / "examples" / "notebooks" / "quickstart.ipynb").read_text(encoding="utf-8")
    cells = [cell for cell in json.loads(notebook)["cells"] if cell["cell_type"] == "code"]
    code = "\n".join("".join(cell["source"]) for cell in cells)
    code, replaced = re.subn(r"^STEPS, LENGTH = 60, 128$", "STEPS, LENGTH = 2, 64", code, flags=re.MULTILINE)
    assert replaced == 1
    environment = {**os.environ, "MPLBACKEND": "Agg"}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    shared, independent = (float(value) for value in re.findall(r"agree by ([\d.]+)", result.stdout))
    assert shared > independent + 0.2  # also without training, since a block has one router
