# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import bits_per_byte, weighted_perplexity
from lm_eval.models.huggingface import HFLM

from pathmoe.command import UserError
from pathmoe.convert.texts import read_text
from pathmoe.evaluate import perplexity as script
from pathmoe.evaluate.perplexity import load_documents
from pathmoe.evaluate.scoring import perplexity, sliding_windows
from pathmoe.text.reader import load_text


@pytest.fixture(scope="module")
def model64(model):
    model64 = copy.deepcopy(model).double()
    model64.set_experts_implementation("eager")
    return model64


def window_settings():
    return st.tuples(st.integers(0, 300), st.integers(1, 60)).flatmap(
        lambda pair: st.tuples(st.just(pair[0]), st.just(pair[1]), st.integers(1, pair[1]))
    )


@given(window_settings())
def test_windows_score_every_position_once_and_in_order(settings):
    length = settings[0]
    scored = [i for _, first, end in sliding_windows(*settings) for i in range(first, end)]
    assert scored == list(range(length))


@given(window_settings())
def test_windows_are_at_most_max_length_long(settings):
    assert all(0 < end - start <= settings[1] for start, _, end in sliding_windows(*settings))


@given(window_settings())
def test_windows_give_every_position_its_context(settings):
    _, max_length, stride = settings
    for start, first, _ in sliding_windows(*settings):
        assert first - start >= min(first, max_length - stride)


@pytest.mark.parametrize(("max_length", "stride"), [(128, 64), (20, 7), (20, 20), (16, 1)])
def test_agrees_with_one_token_at_a_time(model64, tokenizer, texts, max_length, stride):
    nll = 0.0
    for text in texts:
        ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
        last = len(ids) - 1
        for i in range(1, len(ids)):
            # Token i is scored by the first window that reaches it; the last one ends where the text does.
            moves = max(0, math.ceil((i - max_length) / stride))
            start = max(0, min(max_length + moves * stride, last) - max_length)
            with torch.no_grad():
                logits = model64(torch.tensor([ids[start:i]])).logits[0, -1]
            nll -= logits.log_softmax(-1)[ids[i]].item()
    result = perplexity(model64, tokenizer, texts, max_length=max_length, stride=stride)
    assert result["nll"] == pytest.approx(nll, rel=1e-8)  # norms and routers compute in float32


def test_context_beyond_the_window_changes_the_result(model64, tokenizer, texts):
    wide, narrow = (
        perplexity(model64, tokenizer, texts, max_length=length, stride=length)["nll"] for length in (128, 4)
    )
    assert abs(wide - narrow) > 1


def test_no_token_sees_another_document(model64, tokenizer, texts):
    together = perplexity(model64, tokenizer, texts, max_length=20, stride=10)["nll"]
    apart = sum(perplexity(model64, tokenizer, [text], max_length=20, stride=10)["nll"] for text in texts)
    assert together == pytest.approx(apart, rel=1e-12)


@pytest.mark.parametrize("batch_size", [2, 5, 64])
def test_batch_size_does_not_change_the_result(model64, tokenizer, texts, batch_size):
    expected = perplexity(model64, tokenizer, texts, max_length=20, stride=10, batch_size=1)["nll"]
    assert perplexity(model64, tokenizer, texts, max_length=20, stride=10, batch_size=batch_size)[
        "nll"
    ] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("max_length", [24, 128])
def test_agrees_with_lm_eval(model, tokenizer, texts, max_length):
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=max_length, device="cpu")
    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    log_likelihoods = lm.loglikelihood_rolling(requests, disable_tqdm=True)
    lengths = [len(tokenizer.encode(text)) for text in texts]
    assert min(lengths) < max_length < max(lengths) or max_length == 128 > max(lengths)
    words = [len(text.split()) + text[0].isspace() + text[-1].isspace() for text in texts]
    sizes = [len(text.encode()) for text in texts]

    result = perplexity(model, tokenizer, texts, max_length=max_length, stride=max_length)
    assert result["word_perplexity"] == pytest.approx(weighted_perplexity(list(zip(log_likelihoods, words))), rel=1e-5)
    assert result["byte_perplexity"] == pytest.approx(weighted_perplexity(list(zip(log_likelihoods, sizes))), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(bits_per_byte(list(zip(log_likelihoods, sizes))), rel=1e-5)


def test_counts(model, tokenizer, texts):
    result = perplexity(model, tokenizer, texts)
    assert result["tokens"] == sum(len(tokenizer.encode(text)) for text in texts)
    assert result["bytes"] == sum(len(text.encode()) for text in texts)
    assert result["documents"] == len(texts)


def test_token_perplexity_of_uniform_predictions_is_the_vocabulary(model, tokenizer, texts):
    uniform = copy.deepcopy(model)
    torch.nn.init.zeros_(uniform.lm_head.weight)
    assert perplexity(uniform, tokenizer, texts)["token_perplexity"] == pytest.approx(len(tokenizer), rel=1e-5)


def test_first_token_is_not_scored_without_a_prefix_token(model64, tokenizer, texts):
    plain = copy.deepcopy(tokenizer)
    plain.bos_token = plain.eos_token = None
    text = texts[-1]
    ids = torch.tensor([plain.encode(text)])
    with torch.no_grad():
        log_probs = model64(ids).logits[0, :-1].log_softmax(-1)
    result = perplexity(model64, plain, [text])
    assert result["settings"]["prefix_token"] is None
    assert result["tokens"] == ids.shape[1] - 1
    assert result["nll"] == pytest.approx(-log_probs.gather(1, ids[0, 1:, None]).sum().item(), rel=1e-12)


def test_eos_is_the_prefix_where_there_is_no_bos(model, tokenizer, texts):
    without_bos = copy.deepcopy(tokenizer)
    without_bos.bos_token = None
    result = perplexity(model, without_bos, texts)
    assert result["settings"]["prefix_token"] == "</s>"
    assert result["tokens"] == sum(len(tokenizer.encode(text)) for text in texts)


def test_training_mode_is_given_back(model, tokenizer, texts):
    training = copy.deepcopy(model).train()
    perplexity(training, tokenizer, texts[:1])
    assert training.training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 16, "stride": 17}, "stride=17 must be from 1 to max_length=16"),
        ({"stride": 0}, "stride=0"),
        ({"max_length": 513}, "max_position_embeddings=512"),
        ({"max_length": 0}, "max_length=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"texts": []}, "no document"),
        ({"texts": ["", ""]}, "All 2 documents are empty"),
        ({"texts": [" ", "\n"]}, "All 2 documents are empty or blank"),
    ],
)
def test_settings_that_cannot_work_are_named(model, tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        perplexity(model, tokenizer, **{"texts": ["a"], **settings})


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv", "arrow", "folder", "splits"])
def test_every_kind_of_data_is_read(texts, tmp_path, kind):
    dataset = Dataset.from_dict({"body": texts, "source": ["x"] * len(texts)})
    path = tmp_path / f"data.{kind}"
    if kind == "jsonl":
        dataset.to_json(path)
    elif kind == "json":
        path.write_text(json.dumps(list(dataset)))
    elif kind == "parquet":
        dataset.to_parquet(path)
    elif kind == "csv":
        dataset.to_csv(path)
    elif kind == "arrow":
        dataset.save_to_disk(tmp_path / "saved")
        (tmp_path / "saved" / "data-00000-of-00001.arrow").rename(path)
    elif kind == "folder":
        dataset.save_to_disk(path)
    else:
        DatasetDict(train=dataset.select([0]), validation=dataset).save_to_disk(path)
    assert load_documents(str(path), ["body"], limit=3)["body"][:] == texts[:3]


def test_a_text_file_has_the_documents_that_training_reads(tmp_path):
    path = tmp_path / "two.txt"
    path.write_text("one\r\nmore\n\n\n two\n")
    assert load_documents(str(path), ["text"])["text"][:] == ["one\nmore", " two"]
    assert load_text(str(path), "train", cache_dir=tmp_path)["text"][:] == ["one\nmore", " two"]
    assert read_text(path) == "one\nmore\n\n two"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"data": "absent.jsonl"}, UserError, "absent.jsonl: there is no such file"),
        ({"columns": ["text", "body"]}, UserError, "no column 'body': choose one of text, source"),
        ({"limit": 0}, UserError, "--limit 0 must be at least 1"),
        ({"data": __file__}, UserError, r"must end in one of \.jsonl"),
    ],
)
def test_data_that_cannot_be_read_is_named(tmp_path, settings, error, message):
    path = tmp_path / "data.jsonl"
    Dataset.from_dict({"text": ["a"], "source": ["b"]}).to_json(path)
    with pytest.raises(error, match=message):
        load_documents(**{"data": str(path), "columns": ["text"], **settings})


def test_absent_split_lists_the_others(tmp_path):
    DatasetDict(train=Dataset.from_dict({"text": ["a"]})).save_to_disk(tmp_path / "data")
    with pytest.raises(UserError, match="no split 'validation': choose one of train"):
        load_documents(str(tmp_path / "data"), ["text"])


def test_absent_model_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="--model .*absent"):
        script.main(["--model", str(tmp_path / "absent"), "--data", "x.txt", "--output", str(tmp_path / "out.json")])


def test_command_line(model, tokenizer, model_folder, texts, tmp_path):
    data, output = tmp_path / "data.jsonl", tmp_path / "new" / "out.json"
    Dataset.from_dict({"text": texts}).to_json(data)
    options = ["--max_length", "32", "--stride", "8", "--batch_size", "3", "--limit", "3", "--device", "cpu"]
    command = ["--model", str(model_folder), "--data", str(data), "--output", str(output), *options]
    subprocess.run([sys.executable, "eval/perplexity.py", *command], check=True, cwd=Path(__file__).parents[2])
    written = json.loads(output.read_text())
    expected = perplexity(model, tokenizer, texts[:3], max_length=32, stride=8)
    assert written["documents"] == 3
    assert written["data"] == str(data)
    assert written["token_perplexity"] == pytest.approx(expected["token_perplexity"], rel=1e-5)


def test_sources_and_documents_add_up_to_the_total(model_folder, model, tokenizer, texts, tmp_path):
    data, output = tmp_path / "data.jsonl", tmp_path / "out.json"
    sources = ["a", "b", "a", "b"]
    Dataset.from_dict({"text": texts, "source": sources}).to_json(data)
    command = ["--model", str(model_folder), "--data", str(data), "--output", str(output), "--device", "cpu"]
    result = script.main([*command, "--source_column", "source"])
    documents = [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()]
    assert [document["source"] for document in documents] == sources
    for key in ("nll", "tokens", "words", "bytes"):
        assert sum(document[key] for document in documents) == pytest.approx(result[key])
        assert sum(source[key] for source in result["sources"].values()) == pytest.approx(result[key])
    for source in ("a", "b"):
        alone = perplexity(model, tokenizer, [text for text, its in zip(texts, sources) if its == source])
        assert result["sources"][source]["bits_per_byte"] == pytest.approx(alone["bits_per_byte"], rel=1e-6)
    assert len({document["text_sha"] for document in documents}) == 4


def test_empty_document_is_counted_and_changes_nothing(model, tokenizer, texts):
    expected, found = perplexity(model, tokenizer, texts), perplexity(model, tokenizer, ["", *texts])
    assert found.pop("empty_documents") == 1 and expected.pop("empty_documents") == 0
    assert found.pop("settings") == expected.pop("settings")
    assert found == pytest.approx(expected)


def test_tokenizer_of_another_model_is_named(model, tokenizer):
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["wug"])
    with pytest.raises(ValueError, match="produces token 300, but the model has 300 embeddings: use the model's own"):
        perplexity(model, larger, ["one wug"])
