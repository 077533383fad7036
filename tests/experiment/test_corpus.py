# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import hashlib
import io
import json
import random
import tarfile

import pytest

from experiment import corpus
from experiment.corpus import Package
from pathmoe.text.ngrams import Words, ngram_digests


def prose(seed: int, words: int = 300) -> str:
    generator = random.Random(seed)
    return " ".join("".join(generator.choices("aeioutnshr", k=5)) for _ in range(words))


def texts(documents):
    return [document["text"] for document in documents]


@pytest.fixture
def django(tmp_path, monkeypatch):
    """A cache that holds a small package of documentation under the name of the real one, and its list."""
    pages = "\n\n".join(prose(seed) for seed in range(200)).encode()
    cache = tmp_path / "cache"
    cache.mkdir()
    with tarfile.open(cache / "django.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("django/docs/topic.txt")
        member.size = len(pages)
        archive.addfile(member, io.BytesIO(pages))
    digest = hashlib.sha256((cache / "django.tar.gz").read_bytes()).hexdigest()
    package = Package("django", "pypi", "Django", "1.0", "django.tar.gz", digest)
    monkeypatch.setattr(corpus, "listed_packages", lambda: [package])
    return package, cache


def build(tmp_path, cache):
    corpus.main(["--output_dir", str(tmp_path / "out"), "--cache_dir", str(cache), "--sources", "django"])


def test_a_changed_file_is_refused_by_name(django, tmp_path):
    package, cache = django
    (cache / package.file).write_bytes(b"another file")
    with pytest.raises(ValueError, match=rf"Django 1\.0.*SHA-256.*{package.sha256}"):
        build(tmp_path, cache)
    assert not (tmp_path / "out").exists()


def test_both_files_hold_every_document_once(django, tmp_path):
    build(tmp_path, django[1])
    splits = {
        name: [json.loads(line)["text"] for line in (tmp_path / "out" / f"{name}.jsonl").open(encoding="utf-8")]
        for name in ("train", "validation")
    }
    assert sorted("\n".join(splits["train"] + splits["validation"]).split("\n")) == sorted(map(prose, range(200)))
    assert len(splits["validation"]) == -(-sum(map(len, splits.values())) // 40)


def test_an_interrupted_build_leaves_nothing(django, tmp_path, monkeypatch):
    calls = []

    def stop(document, **options):
        calls.append(document)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return "{}"

    monkeypatch.setattr(corpus.json, "dumps", stop)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, django[1])
    assert list((tmp_path / "out").glob("*")) == []


def test_of_repeated_documents_the_first_is_kept():
    first, other = prose(1), prose(2)
    near = first.replace(first.split()[150], "changed")
    splits, counts = corpus.split([{"text": text, "source": "s"} for text in (first, other, first, near)])
    assert sorted(texts(splits["train"] + splits["validation"])) == sorted([first, other])
    assert counts["s"]["repeated"] == len(first) + len(near)


def test_validation_shares_little_with_training():
    # Each document begins with the end of the one before, and the first is held out.
    parts = [prose(seed, 100) for seed in range(90)]
    found = [{"text": f"{parts[i]} {parts[i + 1]} {prose(500 + i, 60)}", "source": "s"} for i in range(81)]
    found.append({"text": prose(900), "source": "other"})
    splits, counts = corpus.split(found)
    words = Words()
    in_train = {run for text in texts(splits["train"]) for run in ngram_digests(text, 13, words).tolist()}
    assert counts["s"]["shared"] and splits["validation"]
    for text in texts(splits["validation"]):
        runs = ngram_digests(text, 13, words).tolist()
        assert sum(run in in_train for run in runs) <= 0.1 * len(runs)


def test_every_listed_package_has_a_reader_and_a_hash():
    packages = corpus.listed_packages()
    assert [package.source for package in packages] == list(corpus.SOURCES)
    assert all(len(bytes.fromhex(package.sha256)) == 32 for package in packages)


@pytest.mark.parametrize(
    "read, content, expected",
    [
        (
            corpus.restructured_text,
            "Title\n=====\n\nSee :class:`~a.b.Query` and\n``x``::\n\n    code()\n\n"
            ".. _target:\n\n.. note::\n\n    Kept.\n",
            "Title\nSee a.b.Query and x:\nKept.",
        ),
        (
            corpus.web_pages,
            "<head><title>t</title></head><p>One &amp;\n<b>two</b></p><p>three</p>",
            "One & two\nthree",
        ),
        (
            corpus.glosses,
            '  1 licence\n00001740 03 n 02 en_tity 0 thing(a) 0 000 | what is; "an example"  \n',
            'en tity, thing: what is; "an example"',
        ),
    ],
)
def test_markup_goes_and_prose_stays(read, content, expected):
    assert list(read({"file": content.encode()})) == [expected]
