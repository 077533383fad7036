# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""What users give the evaluation scripts by mistake: each is refused by one line, and nothing is written."""

import gzip
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from experiment import overlap
from pathmoe import PathMoEConfig, PathMoEForCausalLM
from pathmoe.command import UserError
from pathmoe.evaluate import compare, contamination, path_report, perplexity, report, run_lm_eval
from pathmoe.evaluate.inputs import explained
from pathmoe.files import write_texts


GOOD = "".join(json.dumps({"text": f"The quick brown fox number {i} jumps over the dog."}) + "\n" for i in range(6))


class Place:
    """A folder of its own for one case: a model to damage, data, and a place for the output."""

    def __init__(self, folder, model_folder):
        self.folder, self.model, self.output = folder, folder / "model", folder / "out.json"
        shutil.copytree(model_folder, self.model)
        self.data = self.file("data.jsonl", GOOD)
        self.options = []

    def file(self, name, content):
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def give(self, name, content):
        self.data = self.file(name, content)

    def beside(self, name, content):
        """A file in the output folder of commands that write several."""
        self.output.with_suffix("").mkdir(exist_ok=True)
        self.file(f"out/{name}", content)

    def config(self, **changes):
        file = self.model / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    def tensors(self, edit):
        file = self.model / "model.safetensors"
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    def damage(self, name, content):
        (self.model / name).write_bytes(content)

    def truncate(self, name):
        content = (self.model / name).read_bytes()
        self.damage(name, content[: len(content) // 2])


def perplexity_command(place):
    perplexity.main([*arguments(place), "--output", str(place.output)])


def paths_command(place):
    options = ["--max_tokens", "200", "--perturbed_tokens", "0", "--resamples", "2"]
    path_report.main([*options, *arguments(place), "--output", str(place.output.with_suffix(""))])


def lm_eval_command(place):
    options = ["--tasks", "pathmoe_offline_piqa", "--limit", "2", "--device", "cpu", *place.options]
    run_lm_eval.main(["--model", str(place.model), "--output", str(place.output.with_suffix("")), *options])


def arguments(place):
    return ["--model", str(place.model), "--data", str(place.data), "--device", "cpu", *place.options]


def options(*values):
    return lambda place: place.options.extend(values)


@pytest.fixture
def place(tmp_path, model_folder):
    return Place(tmp_path, model_folder)


def refused(command, place, message, capsys):
    """The command ends with one line that holds `message`, and leaves the folder as it was."""
    before = sorted(path for path in place.folder.rglob("*"))
    with pytest.raises((UserError, SystemExit)) as ended:
        command(place)
    if isinstance(ended.value, SystemExit):
        assert ended.value.code == 2
        said = capsys.readouterr().err
    else:
        said = str(ended.value)
    assert message in said
    assert sorted(path for path in place.folder.rglob("*")) == before


MODELS = [
    (lambda p: p.config(router_block_size=1), "missing (model.routers."),
    (lambda p: p.config(router_block_size=4), "unknown (model.routers.1"),
    (lambda p: p.config(num_experts=8), "of a different shape"),
    (lambda p: p.tensors(lambda t: t.pop("model.routers.1.weight")), "1 missing (model.routers.1.weight)"),
    (lambda p: p.tensors(lambda t: t["model.norm.weight"].fill_(torch.nan)), "model.norm.weight has values"),
    (lambda p: p.tensors(lambda t: t["lm_head.weight"][0].fill_(math.inf)), "lm_head.weight has values"),
    (lambda p: p.tensors(lambda t: t["lm_head.weight"][0].fill_(-1e30)), "lm_head.weight has values above 1e+18"),
    (lambda p: p.truncate("model.safetensors"), "the model could not be loaded"),
    (lambda p: p.damage("model.safetensors", b""), "the model could not be loaded"),
    (lambda p: (p.model / "model.safetensors").unlink(), "the model could not be loaded"),
    (lambda p: p.damage("config.json", b""), "config.json is damaged"),
    (lambda p: p.truncate("config.json"), "config.json is damaged"),
    (lambda p: p.damage("config.json", b"[1]"), "must hold a JSON object, but holds [1]"),
    (lambda p: p.damage("config.json", b"\xff\xfe{"), "config.json is damaged"),
    (lambda p: (p.model / "config.json").unlink(), "config.json cannot be read"),
    (lambda p: p.config(model_type="no_such_type"), "model_type 'no_such_type', which transformers does not know"),
    (lambda p: p.config(num_experts_per_tok=9), "config.json cannot be used"),
    (lambda p: p.damage("tokenizer.json", b""), "tokenizer.json is damaged"),
    (lambda p: p.truncate("tokenizer.json"), "tokenizer.json is damaged"),
    (lambda p: p.damage("tokenizer.json", b"{}"), "the tokenizer could not be loaded"),
    (lambda p: p.damage("tokenizer.json", b"7"), "must hold a JSON object, but holds 7"),
    (lambda p: [file.unlink() for file in p.model.glob("tokenizer*")], "it holds no tokenizer.json"),
    (lambda p: p.config(model_type=None), "the model_type None, which transformers does not know"),
    (lambda p: p.file("model/model.safetensors.index.json", "{"), "model.safetensors.index.json is damaged"),
    (lambda p: p.file("model/model.safetensors.index.json", "{}"), "model.safetensors.index.json has no weight_map"),
    (
        lambda p: p.file("model/model.safetensors.index.json", '{"weight_map": {"a": "../data.jsonl"}}'),
        "lists '../data.jsonl', which is not a file in the same folder",
    ),
    (lambda p: p.file("model/generation_config.json", "{"), "generation_config.json is damaged"),
    (options("--dtype", "float99"), "--dtype float99: choose auto, float32"),
    (options("--dtype", "int64"), "--dtype int64: choose auto, float32"),
    (options("--device", "abacus"), "--device abacus cannot be used here"),
    (options("--device", "cuda:99"), "--device cuda:99 cannot be used here"),
    (options("--max_length", "0"), "--max_length 0 must be at least"),
    (options("--max_length", "-5"), "--max_length -5 must be at least"),
    (options("--max_length", "99999"), "--max_length 99999 must be"),
    (lambda p: p.file("out", ""), "cannot be written"),
]  # fmt: skip


@pytest.mark.parametrize("command", [perplexity_command, paths_command, lm_eval_command])
@pytest.mark.parametrize(("break_it", "message"), MODELS)
def test_models_and_options_that_cannot_be_used_are_refused(command, place, break_it, message, capsys):
    if message == "cannot be written":  # a file where a folder must be
        place.output = place.folder / "out" / "below.json"
    break_it(place)
    refused(command, place, message, capsys)


DATA = [
    ("empty.jsonl", b"", "empty.jsonl is empty"),
    ("blank.jsonl", b"\n\n", "blank.jsonl"),
    ("nothing.jsonl.gz", gzip.compress(b"", mtime=0), "nothing.jsonl.gz holds no rows"),
    ("a.jsonl", GOOD.encode() + b'{"text": "cut o', "line 7 is not valid JSON"),
    ("a.jsonl", GOOD.encode() + b"[1, 2]\n", "line 7 holds list, not an object"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "line 2 is not valid UTF-8"),
    ("a.jsonl", b'{"text": 1}\n{"text": 2}\n', "column 'text' holds 1 in row 1, which is not text"),
    ("a.jsonl", b'{"text": "a"}\n{"text": 2}\n', "column 'text' holds int in row 2 and str in row 1"),
    ("a.jsonl", b'{"text": null}\n{"text": null}\n{"text": "a"}\n', "2 of 3 rows have no text"),
    ("a.jsonl", b'{"body": "a"}\n', "has no column 'text'"),
    ("a.json", b"{", "a.json"),
    ("a.csv", b"text\na\n\xff\n", "line 3 is not valid UTF-8"),
    ("a.csv", b"body\na\n", "has no column 'text'"),
    ("a.parquet", b"PAR1 no", "cannot be read"),
    ("a.arrow", b"no", "cannot be read"),
    ("a.txt", b"a\n\xff", "line 2 is not valid UTF-8"),
    ("a.xyz", b"# a", "must end in one of .jsonl"),
    ("a.parquet.gz", b"a", "must end in one of .jsonl"),
    ("a.jsonl.gz", b"no gzip", "cannot be read"),
    ("a.jsonl.gz", gzip.compress(GOOD.encode(), mtime=0)[:40], "cannot be read"),
    ("a.jsonl.gz", gzip.compress(GOOD.encode() + b"{", mtime=0), "line 7 is not valid JSON"),
]  # fmt: skip


@pytest.mark.parametrize("command", [perplexity_command, paths_command])
@pytest.mark.parametrize(("name", "content", "message"), DATA)
def test_data_that_cannot_be_read_is_refused(command, place, name, content, message, capsys):
    place.give(name, content)
    refused(command, place, message, capsys)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (options("--stride", "9", "--max_length", "8"), "--stride 9 must be at most --max_length 8"),
        (options("--stride", "0"), "--stride 0 must be at least 1"),
        (options("--stride", "9999"), "--stride 9999 must be at most the 512"),
        (options("--batch_size", "0"), "--batch_size 0 must be at least 1"),
        (options("--limit", "-1"), "--limit -1 must be at least 1"),
        (options("--source_column", "where"), "has no column 'where'"),
        (options("--text_column", ""), "--text_column must not be empty"),
        (
            lambda p: (p.give("a.jsonl", '{"text": "a", "of": ["b"]}\n'), options("--source_column", "of")(p)),
            "column 'of' holds ['b'], which is neither text nor a number",
        ),
        (lambda p: setattr(p, "output", p.folder / "out.txt"), "must end in .json"),
        (lambda p: (p.folder / "out.json").symlink_to("/nowhere/out"), "out.json is a link to /nowhere/out"),
        (options("--split", "test"), "--split test: "),
        (options("--name", "wiki"), "--name wiki: "),
        (lambda p: setattr(p, "output", p.folder / ("n" * 300 + ".json")), "File name too long"),
        (lambda p: (p.folder / "out.json").mkdir(), "is a folder: name a file"),
        (lambda p: setattr(p, "output", p.folder / "data.json"), "would overwrite the data"),
        (lambda p: setattr(p, "output", p.model / "config.json"), "is not an earlier result"),
        (lambda p: setattr(p, "output", p.file("notes.json", "mine")), "notes.json exists and is not an earlier"),
        (lambda p: p.file("out.jsonl", '{"mine": 1}'), "out.jsonl exists and is not an earlier result"),
        (lambda p: setattr(p, "data", p.folder / "model"), "not a file, a folder"),
        (lambda p: setattr(p, "model", p.folder / "absent"), "absent: this folder does not exist"),
    ],
)
def test_perplexity_refuses(place, break_it, message, capsys):
    break_it(place)
    refused(perplexity_command, place, message, capsys)


def tagged(**columns):
    row = {"text": "The fox.", "starts": [0, 4], "ends": [3, 7], "tags": ["DET", "NOUN"]} | columns
    return lambda place: place.give("tagged.jsonl", (json.dumps(row) + "\n") * 4)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (tagged(tags=["DET", "NOUN", "VERB"]), "starts, ends and tags must be lists of one length"),
        (tagged(ends=[3, 99]), "a word starts or ends outside the text's 8 characters"),
        (tagged(starts=[0, -4]), "a word starts or ends outside the text's 8 characters"),
        (tagged(starts=None), "starts, ends and tags must be lists of one length"),
        (tagged(tags=[1, 2]), "starts and ends must be whole numbers, and tags texts"),
        (lambda p: p.config(num_experts=1, num_experts_per_tok=1), "has one expert (num_experts: 1)"),
        (lambda p: p.beside("paths.json", "[]"), "paths.json exists and is not an earlier result"),
        (lambda p: p.beside("report.html", "<p>mine"), "report.html exists and is not an earlier result"),
        (options("--resamples", "1000000000"), "--resamples 1000000000 must be at most"),
        (options("--resamples", "0"), "--resamples 0 must be at least 2"),
        (options("--resamples", "1"), "--resamples 1 must be at least 2"),
        (options("--seed", "-1"), "--seed -1 must be at least 0"),
        (lambda p: options("--data", str(p.data), str(p.data))(p), "names a file twice"),
        (lambda p: options("--model", str(p.model))(p), "model is given twice: give one model, or two different"),
        (options("--max_tokens", "3"), "documents of at least two tokens, but intervals need at least 4"),
        (lambda p: p.give("a.jsonl", '{"text": "a"}\n' * 8), "reaches 0 documents of at least two tokens"),
        (tagged(source={"of": "b"}), "column 'source' holds {'of': 'b'}, which is neither text nor a number"),
    ],
)
def test_path_report_refuses(place, break_it, message, capsys):
    break_it(place)
    refused(paths_command, place, message, capsys)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (options("--batch_size", "0"), "--batch_size 0"),
        (options("--limit", "nan"), "--limit nan must be"),
        (options("--revision", "v2"), "--revision v2 is for models of the Hub"),
        (options("--limit", "2.5"), "--limit 2.5 must be a whole number"),
        (options("--num_fewshot", "-1"), "--num_fewshot -1 must be at least 0"),
        (options("--tasks", "pathmoe_offline_piqa,,"), "a name between the commas is missing"),
        (lambda p: p.beside("results.json", '{"results": {}}'), "results.json exists and is not an earlier result"),
    ],
)
def test_lm_eval_runner_refuses(place, break_it, message, capsys):
    break_it(place)
    refused(lm_eval_command, place, message, capsys)


def perplexity_result(folder, name, nll=5.0, **changes):
    settings = {"max_length": 8, "stride": 4, "name": None, "split": "s", "text_column": "text", "limit": None}
    documents = [{"text_sha": f"{i:04x}", "nll": nll + i, "bytes": 7, "tokens": 3, "words": 2} for i in range(3)]
    total = sum(document["nll"] for document in documents)
    (folder / f"{name}.json").write_text(json.dumps({"settings": settings, "nll": total} | changes))
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    return folder / f"{name}.json"


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda file: perplexity_result(file.parent, "two", nll=math.nan), "the score of item 0 is nan"),
        (lambda file: perplexity_result(file.parent, "two", nll=math.inf), "are not finite numbers"),
        (
            lambda file: perplexity_result(file.parent, "two", settings={"allow_missing": True}),
            "two.json was evaluated with --allow_missing",
        ),
        (
            lambda file: (
                perplexity_result(file.parent, "x", 6.0).with_suffix(".jsonl").replace(file.parent / "two.jsonl")
            ),
            "the score is 21 in ",
        ),
        (lambda file: file.write_text(""), "two.json is damaged"),
        (lambda file: file.write_text("[]"), "must hold a JSON object"),
        (lambda file: file.write_text("{}"), "is not a result of the evaluation"),
        (lambda file: file.write_bytes(b"\xff"), "two.json is damaged"),
        (lambda file: file.with_suffix(".jsonl").write_text("{"), "jsonl line 1 is damaged"),
        (lambda file: file.with_suffix(".jsonl").write_text(""), "two"),
        (lambda file: file.with_suffix(".jsonl").unlink(), "neither a folder of run_lm_eval.py"),
    ],
)
def test_compare_refuses_damaged_results(tmp_path, capsys, break_it, message):
    one, two = (perplexity_result(tmp_path, name) for name in ("one", "two"))
    break_it(two)
    with pytest.raises(SystemExit, match="2"):
        compare.main([str(one), str(two), "--output", str(tmp_path / "out")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["one.json"], "RUN one.json: give at least two runs"),
        (["one.json", "two.json", "--names", "a", " "], "give each of the 2 runs a different name"),
        (["one.json", "one.json"], "give each of the 2 runs a different name"),
        (["one.json", "two.json", "--tasks", ","], "--tasks ',': a name between the commas is missing"),
    ],
)
def test_compare_refuses(tmp_path, capsys, monkeypatch, args, message):
    for name in ("one", "two"):
        perplexity_result(tmp_path, name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        compare.main([*args, "--output", "out"])
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["comparison.md", "comparison.csv", "comparison.png"])
def test_compare_replaces_its_own_results_alone(tmp_path, name):
    args = [str(perplexity_result(tmp_path, run)) for run in ("one", "two")]
    args += ["--output", str(tmp_path / "out")]
    compare.main(args)
    compare.main(args)
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name} exists and is not an earlier result"):
        compare.main(args)
    assert (tmp_path / "out" / name).read_text() == "mine"


def test_files_that_belong_together_are_all_written_or_none(tmp_path):
    with pytest.raises(OSError):
        write_texts({tmp_path / "new" / "a.json": "{}", tmp_path / "new" / ("b" * 300): ""})
    assert not list(tmp_path.iterdir())


def test_names_are_no_html_in_a_comparison(tmp_path):
    runs = [str(perplexity_result(tmp_path, name, nll=5.0 + len(name))) for name in ("one", "three")]
    compare.main([*runs, "--names", "<script>a", "b|c", "--output", str(tmp_path / "out")])
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "<script" not in text and "&lt;script&gt;a" in text and "b\\|c" in text


@pytest.mark.parametrize("command", [contamination.main, overlap.main])
def test_reports_on_text_check_their_output_first(tmp_path, command):
    (tmp_path / "out").write_text("")
    for name in ("mine.json", "other.md"):
        (tmp_path / name).write_text("{}")
    for output, message in (
        ("out/a.json", "cannot be written"),
        ("a.txt", "must end in .json"),
        ("mine.json", "mine.json exists and is not an earlier result"),
        ("other.json", "other.md exists and is not an earlier result"),
    ):
        with pytest.raises(UserError, match=message):
            command(["--data", str(tmp_path), "--suite", "quickstart", "--output", str(tmp_path / output)])


@pytest.mark.parametrize("n", ["0", "1000000000", "many"])
@pytest.mark.parametrize("command", [contamination.main, overlap.main])
def test_reports_on_text_refuse_runs_of_no_length(tmp_path, command, n, capsys):
    with pytest.raises(SystemExit, match="2"):
        command(["--data", str(tmp_path), "--suite", "quickstart", "--n", n, "--output", str(tmp_path / "a.json")])
    assert n in (said := capsys.readouterr().err) and said.count("\n") == 1


def test_overlap_refuses_sources_that_are_no_names(tmp_path):
    (tmp_path / "train.jsonl").write_text(GOOD)
    (tmp_path / "validation.jsonl").write_text('{"text": "a", "source": {"of": "b"}}\n')
    with pytest.raises(UserError, match="column 'source' holds {'of': 'b'}"):
        overlap.main(["--data", str(tmp_path), "--suite", "quickstart", "--output", str(tmp_path / "a.json")])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", "{"),
        ("metrics.jsonl", '{"step": 1, "loss": "b", "tokens": 10}\n'),
        ("metrics.jsonl", '{"step": 1, "loss": NaN, "tokens": 10}\n'),
        ("report.md", "mine"),
        ("report.png", "mine"),
        ("perplexity.json", "{"),
        ("perplexity.json", "{}"),
        ("lm_eval/results.json", '{"results": {"a": {"acc,none": "x"}}}'),
    ],
)
def test_run_report_names_a_damaged_file(place, name, content):
    run = place.folder / "run"
    shutil.copytree(place.model, run / "final")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0, "tokens": 10}\n')
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text(content)
    with pytest.raises(UserError, match=name.split("/")[0]):
        report.main(["--run", str(run), "--text", str(place.data)])


def test_run_report_names_the_option_of_what_is_missing(place, capsys):
    shutil.copytree(place.model, place.folder / "final")
    place.file("metrics.jsonl", '{"step": 1, "loss": 3.0, "tokens": 10}\n')
    for run, text, missing in (("no", place.data, "--run no: no/final"), (place.folder, "no.txt", "--text no.txt")):
        with pytest.raises(SystemExit, match="2"):
            report.main(["--run", str(run), "--text", str(text)])
        assert f"{missing} does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", gzip.compress(GOOD.encode(), mtime=0)),
        ("A.JSONL", GOOD.encode()),
        ("a[1].jsonl", GOOD.encode()),
        ("a.txt.gz", gzip.compress(b"The fox.", mtime=0)),
    ],
)
def test_other_names_of_the_same_kinds_are_read(place, name, content):
    place.give(name, content)
    perplexity_command(place)
    assert json.loads(place.output.read_text())["documents"] == (1 if "txt" in name else 6)


@pytest.mark.parametrize("command", [perplexity_command, paths_command, lm_eval_command])
def test_an_earlier_result_is_replaced(command, place):
    command(place)
    before = sorted(place.folder.rglob("*"))
    command(place)
    assert sorted(place.folder.rglob("*")) == before


def test_rows_without_text_are_skipped_and_counted(place, capsys):
    place.give("a.jsonl", GOOD + '{"text": null}\n{"body": "a"}\n')
    perplexity_command(place)
    assert json.loads(place.output.read_text())["skipped_documents"] == 2
    assert "skipped 2 of 8 rows, which have no text" in capsys.readouterr().err


def test_missing_weights_are_drawn_at_random_only_if_asked_for(place):
    place.config(router_block_size=1)
    place.options.append("--allow_missing")
    with pytest.warns(UserWarning, match="2 missing tensors were initialized at random: model.routers.2"):
        perplexity_command(place)
    assert json.loads(place.output.read_text())["settings"]["allow_missing"] is True


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
ROUTED = {"num_experts_per_tok": 2, **SIZES}


@pytest.mark.parametrize(
    "make",
    [
        lambda v: Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=v, num_experts=4, moe_intermediate_size=8, **ROUTED)),
        lambda v: MixtralForCausalLM(MixtralConfig(vocab_size=v, num_local_experts=4, intermediate_size=8, **ROUTED)),
        lambda v: LlamaForCausalLM(LlamaConfig(vocab_size=v, intermediate_size=16, tie_word_embeddings=True, **SIZES)),
        lambda v: PathMoEForCausalLM(
            PathMoEConfig(vocab_size=v, num_experts=4, moe_intermediate_size=8, tie_word_embeddings=True, **ROUTED)
        ),
    ],
    ids=["qwen3_moe", "mixtral", "dense_tied", "pathmoe_tied"],
)
def test_whole_checkpoints_of_other_kinds_are_not_refused(place, tokenizer, make):
    (place.model / "model.safetensors").unlink()
    make(len(tokenizer)).save_pretrained(place.model)
    place.options += ["--max_length", "64"]
    perplexity_command(place)
    assert place.output.is_file()


def test_figures_that_are_not_finite_are_null_and_explained():
    figures = explained({"a": [1.0, math.nan], "b": {"c": -math.inf}})
    assert json.loads(json.dumps(figures, allow_nan=False)) == {
        "a": [1.0, None],
        "b": {"c": None},
        "undefined": ["a[1]: nan", "b.c: -inf"],
    }
