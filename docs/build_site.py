# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Builds the site of these pages into build/site; a broken link is an error.

    python docs/build_site.py

What a page links to outside of docs/ (`../results/x.png`) is copied into the site, so that the pages read the same in
the repository and on the site. Everything is made in build/; the generator is Zensical, which reads mkdocs.yml.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\(([^)#\s]+)")


def copy_pages(source: Path, target: Path):
    """Copies the pages, and the files of the repository that they link to under `target`/repository.

    Raises:
        SystemExit: If a page links to a file that does not exist. The generator checks the links between pages alone.
    """
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.py"))
    for page in source.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        for link in {link for link in LINK.findall(text) if "://" not in link}:
            if not (source / link).exists():
                sys.exit(f"{page.relative_to(ROOT)} links to {link}, which does not exist.")
            if link.startswith("../"):
                # Markdown is shown as it is: its own links are not part of the site.
                place = f"repository/{link[3:]}" + (".txt" if link.endswith(".md") else "")
                (target / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / link, target / place)
                text = text.replace(f"]({link}", f"]({place}")
        (target / page.name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    copy_pages(ROOT / "docs", ROOT / "build" / "docs")
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict", "-f", str(ROOT / "mkdocs.yml")]
    sys.exit(subprocess.run(command, cwd=ROOT).returncode)
