# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import itertools
import json
import math
import re
import shutil
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2_contingency
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from pathmoe.command import UserError
from pathmoe.evaluate import path_report as script
from pathmoe.evaluate.path_figures import coverage, log_likelihood_ratio, path_ranks, permuted
from pathmoe.evaluate.path_reading import align_tags, encode, read_text
from pathmoe.paths import jaccard_matrix, path_coverage, record_paths, routing_entropy
from pathmoe.text.brown import tagged_document


ENTRIES = "The/at quick/jj fox/nn jumps/vbz over/in a/at lazy/jj dog/nn ,/, and/cc the/at dogs/nns sleep/vb ./."


def documents():
    """Tagged documents that differ, and two without tags that hold what a page or a tokenizer may trip over."""
    words = ENTRIES.split()
    sections = [" ".join(words[i:] + words[: 2 * i] + words[::-1]) for i in range(1, 9)]
    rows = [{**tagged_document(section), "source": f"book {i % 2}"} for i, section in enumerate(sections)]
    odd = ["</script><b>Naïve café</b> — 東京 & 🙂\n\n\tfox & dog " * 3, "  The dogs jump over the quick fox. " * 9]
    return rows + [{"text": text, "source": "odd", "starts": None, "ends": None, "tags": None} for text in odd]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "some.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in documents()))
    return file


@pytest.fixture(scope="module")
def qwen_folder(texts, tmp_path_factory):
    """A Qwen3-MoE with a tokenizer of its own, which makes more tokens of a text than the PathMoE's."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size=262, special_tokens=["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        moe_intermediate_size=16,
        num_experts=6,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("qwen")
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


OPTIONS = ["--max_tokens", "2000", "--perturbed_tokens", "120", "--resamples", "5", "--device", "cpu"]


@pytest.fixture(scope="module")
def output(model_folder, qwen_folder, data, tmp_path_factory):
    """The report of a PathMoE beside a Qwen3-MoE."""
    output = tmp_path_factory.mktemp("report") / "new"
    models = ["--model", str(model_folder), "--model", str(qwen_folder)]
    script.main([*models, "--data", str(data), "--output", str(output), *OPTIONS])
    return output


@pytest.fixture(scope="module")
def figures(output):
    return json.loads((output / "paths.json").read_text())


@pytest.fixture(scope="module")
def reading(model, tokenizer):
    return read_text(model, encode(tokenizer, documents(), 700, each=200), max_length=50)


@given(st.lists(st.sampled_from(["a", "bc", "def ", " ", "\n", "é", ". "]), max_size=12), st.data())
def test_a_token_has_the_tag_of_the_word_that_holds_its_first_visible_character(parts, draw):
    text = "".join(parts)
    words = [match.span() for match in re.finditer(r"\w+", text)]
    cuts = sorted(draw.draw(st.sets(st.integers(0, len(text)))) | {0, len(text)})
    offsets = [*zip(cuts, cuts[1:]), (0, 0)]
    document = {"text": text, "starts": [a for a, _ in words], "ends": [b for _, b in words],
                "tags": [str(i) for i in range(len(words))]}  # fmt: skip
    for (start, end), tag in zip(offsets, align_tags(offsets, document)):
        visible = [i for i in range(start, end) if not text[i].isspace()]
        holding = [str(i) for i, (a, b) in enumerate(words) if visible and a <= visible[0] < b]
        assert tag == (holding[0] if holding else None)


def test_sub_words_have_the_tag_of_their_word(tokenizer):
    document = tagged_document("Extraordinary/jj foxes/nns jump/vb ./.")
    ((_, ids, offsets),) = encode(tokenizer, [document], 99, each=99)
    tags = align_tags(offsets, document)
    assert len(ids) > 6  # "extraordinary" is none of the tokenizer's tokens
    assert [tag for i, tag in enumerate(tags) if i == 0 or tag != tags[i - 1]] == ["ADJ", "NOUN", "VERB", "PUNCT"]


def test_reading_gives_the_text_back_and_runs_no_piece_across_documents(reading):
    for number, document in enumerate(reading.documents[:-1]):
        texts = [text for text, of in zip(reading.texts, reading.document_ids) if of == number]
        assert "".join(texts) == document["text"]
    assert max(len(piece) for piece in reading.pieces) == 50
    assert len(reading.experts) == len(reading.offsets) == len(reading.document_ids) == 700


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30), st.integers(1, 30))
def test_log_likelihood_ratio_is_that_of_scipy(a, b, c, d):
    expected = chi2_contingency([[a, b], [c, d]], correction=False, lambda_="log-likelihood").statistic
    assert log_likelihood_ratio(a, a + b, a + c, a + b + c + d) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("top", [1, 10, 100])
def test_coverage_by_ranks_is_path_coverage(reading, top):
    assert coverage(path_ranks(reading.experts), top) == pytest.approx(path_coverage(reading.experts, top))


def test_permutation_keeps_every_layers_choices_and_breaks_paths(reading):
    shuffled = permuted(reading.experts, seed=0)
    for layer in range(4):
        assert torch.equal(shuffled[:, layer].unique(dim=0, return_counts=True)[1],
                           reading.experts[:, layer].unique(dim=0, return_counts=True)[1])  # fmt: skip
    assert not torch.equal(shuffled, reading.experts)


def test_models_are_compared_on_equally_many_tokens(figures, tokenizer):
    total = sum(len(ids) for ids in tokenizer([document["text"] for document in documents()]).input_ids)
    assert [model["tokens"] for model in figures["models"]] == [figures["data"]["tokens"]] * 2 == [total] * 2
    assert [model["architecture"] for model in figures["models"]] == ["PathMoEForCausalLM", "Qwen3MoeForCausalLM"]
    assert [model["layer_to_block"] for model in figures["models"]] == [[0, 0, 1, 1], [0, 1, 2]]


def test_figures_are_those_of_a_trace_of_its_own(figures, model, tokenizer):
    with record_paths(model, probabilities=True) as trace:
        for document in documents():
            model(**tokenizer(document["text"], return_tensors="pt"))
    shown, top1 = figures["models"][0], trace.experts[:, :, 0].long()
    measures = {measure["key"]: measure["value"] for measure in shown["measures"]}
    assert measures["distinct_paths"] == len(top1.unique(dim=0))
    entropy = routing_entropy(trace.probabilities).mean().item() / math.log(trace.model.num_experts)
    assert measures["routing_entropy"] == pytest.approx(entropy)
    np.testing.assert_allclose(shown["jaccard"], jaccard_matrix(trace.experts))
    flow = {(layer, a, b): share for layer, links in enumerate(shown["flow"]) for a, b, share in links}
    for layer in range(3):
        for a in range(4):
            for b in range(4):
                share = ((top1[:, layer] == a) & (top1[:, layer + 1] == b)).double().mean().item()
                assert flow.get((layer, a, b), 0) == pytest.approx(share)
    for path in shown["paths"]:
        assert path["tokens"] == (top1 == torch.tensor(path["path"])).all(dim=1).sum()


def test_every_measure_has_an_interval(figures):
    for measure in [measure for model in figures["models"] for measure in model["measures"]]:
        assert measure["low"] <= measure["value"] <= measure["high"], measure["key"]


def test_page_holds_all_figures_and_needs_nothing_else(output, figures):
    page = (output / "report.html").read_text()
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.S)
    assert json.loads(data) == figures
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!#|data:)", page)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)


def test_text_of_the_data_cannot_end_the_pages_script():
    page = script.render({"token": "</script><!-- <script> é"})
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.S)
    assert "<" not in data
    assert json.loads(data)["token"] == "</script><!-- <script> é"


@pytest.fixture(scope="module")
def dense_folder(tokenizer, tmp_path_factory):
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2)  # fmt: skip
    folder = tmp_path_factory.mktemp("dense")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def refused(error, message, tmp_path, models, data, *options):
    command = [part for model in models for part in ("--model", str(model))]
    with pytest.raises(error, match=message):
        script.main([*command, "--data", str(data), "--output", str(tmp_path / "out"), *options])
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_shown_are_named(model_folder, dense_folder, data, tmp_path, capsys):
    refused(UserError, "LlamaForCausalLM has no routers", tmp_path, [model_folder, dense_folder], data)
    refused(UserError, "--model .*absent: this folder does not exist", tmp_path, [tmp_path / "absent"], data)
    refused(SystemExit, "2", tmp_path, [model_folder] * 3, data)
    assert "--model is given 3 times" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "", "empty.jsonl is empty"),
        ("blank.jsonl", '{"text": " "}\n{"text": ""}\n', "holds no text: all its rows are empty"),
        ("other.jsonl", '{"body": "a"}\n', "has no column 'text', only body"),
        ("data.xyz", "a", r"must end in one of \.jsonl"),
        (
            "few.jsonl",
            '{"text": "The fox."}\n' * 3,
            "reaches 3 documents of at least two tokens, but intervals need at least 4",
        ),
    ],
)
def test_data_that_cannot_be_read_is_named(model_folder, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    refused(UserError, message, tmp_path, [model_folder], tmp_path / name)


def test_missing_data_is_named(model_folder, tmp_path):
    refused(UserError, "absent.jsonl: there is no such file", tmp_path, [model_folder], tmp_path / "absent.jsonl")


def test_a_length_must_suit_both_models(model_folder, qwen_folder, data, tmp_path):
    message = "--max_length 257 must be from 2 to 256, the most that the models can read"
    refused(UserError, message, tmp_path, [model_folder, qwen_folder], data, "--max_length", "257")


@pytest.fixture(scope="module")
def browser(output, tmp_path_factory):
    """A real browser that shows the report."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        reason = (
            "THE REPORT WAS NOT TRIED IN A BROWSER: install chromium and chromium-driver, then `make browser-test`."
        )
        warnings.warn(reason, stacklevel=1)
        pytest.skip(reason)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",  # a container's is too small for a busy browser
        "--force-prefers-reduced-motion",  # or a click may be aimed while the page still scrolls
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1400,1000",
        f"--user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=Service(driver)) as browser:
        browser.set_network_conditions(offline=True, latency=0, throughput=-1)
        browser.get((output / "report.html").as_uri())
        yield browser


UNDEFINED = ("measures", "coverage", "engagement", "load_variation", "jaccard", "jaccard_chance", "perturbations",
             "prefetch")  # fmt: skip


def without(figures, every):
    """Figures with `null` for one in `every` number that is no count, in the parts that may have such."""
    numbers = itertools.count()

    def thin(value):
        if isinstance(value, dict):
            return {key: thin(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [thin(entry) for entry in value]
        return None if isinstance(value, float) and next(numbers) % every == 0 else value

    models = [model | {key: thin(model[key]) for key in UNDEFINED} for model in figures["models"]]
    return figures | {"models": models}


def choose(browser, section, label, text):
    """Takes an option of the first control of that name in a section, as a reader does."""
    from selenium.webdriver.support.select import Select

    path = f"//section[@id='{section}']//label[starts-with(., '{label}')]/following-sibling::select"
    Select(browser.find_element("xpath", path)).select_by_visible_text(text)


def all_of(browser, selector):
    return browser.find_elements("css selector", selector)


@pytest.mark.browser
class TestInBrowser:
    def test_page_is_complete_and_reports_no_error(self, browser, figures):
        assert browser.get_log("browser") == []
        sections = [section.get_attribute("id") for section in all_of(browser, "main section")]
        assert sections == [
            "summary",
            "flow",
            "load",
            "concentration",
            "clusters",
            "text",
            "perturbations",
            "prefetch",
        ]
        assert [link.get_attribute("hash") for link in all_of(browser, "nav a")] == [f"#{name}" for name in sections]
        assert len(all_of(browser, "#perturbations figure")) == len(figures["models"][0]["perturbations"]["curves"])
        text = browser.find_element("tag name", "body").text
        assert "undefined" not in text and "NaN" not in text and "[object" not in text
        broken = "return [...document.querySelectorAll('svg *')].filter(e => /NaN|undefined/.test(e.outerHTML)).length"
        assert browser.execute_script(broken) == 0

    @pytest.mark.parametrize("every", [1, 2, 3])
    @pytest.mark.parametrize("count", [1, 2])
    def test_page_is_complete_where_figures_are_undefined(self, browser, figures, output, tmp_path, every, count):
        shown = without(figures, every)
        (tmp_path / "report.html").write_text(script.render(shown | {"models": shown["models"][:count]}))
        browser.get((tmp_path / "report.html").as_uri())
        try:
            self.test_page_is_complete_and_reports_no_error(browser, figures)
            text = browser.find_element("tag name", "body").text
            assert "–" in text and "null" not in text and "Infinity" not in text
            broken = "return [...document.querySelectorAll('svg *')].filter(e => /null|Infinity/.test(e.outerHTML))"
            assert browser.execute_script(broken + ".length") == 0
            if every == 1:
                assert "None of these figures is a finite number." in text
        finally:
            browser.get((output / "report.html").as_uri())

    def test_every_picture_has_a_text_and_its_figures(self, browser):
        figures = all_of(browser, "figure")
        assert len(figures) > 10
        for figure in figures:
            assert len(figure.find_element("css selector", "svg[role=img]").get_attribute("aria-label")) > 40
            assert figure.find_element("tag name", "details").find_elements("css selector", "tbody tr")
        unnamed = "return [...document.querySelectorAll('svg')].filter(e => !e.ariaLabel && !e.ariaHidden).length"
        assert browser.execute_script(unnamed) == 0
        controls = all_of(browser, "select")
        assert controls and all(all_of(browser, f"label[for='{control.get_attribute('id')}']") for control in controls)
        assert browser.find_element("tag name", "html").get_attribute("lang") == "en"

    def test_a_path_can_be_traced_through_the_flow(self, browser, figures):
        path = figures["models"][0]["paths"][1]
        assert not all_of(browser, ".chosen-path")
        name = "-".join(map(str, path["path"]))
        choose(browser, "flow", "Trace a path", next(
            option.text for option in all_of(browser, "#flow option") if option.text.startswith(name + " (")
        ))  # fmt: skip
        line = all_of(browser, ".chosen-path")[-1]
        assert len(line.get_attribute("points").split()) == len(path["path"])
        choose(browser, "flow", "Trace a path", "none")
        assert not all_of(browser, ".chosen-path")

    def test_order_and_threshold_redraw_the_flow(self, browser):
        bars = "return [...document.querySelectorAll('#flow svg rect')].map(e => e.getAttribute('y')).join()"
        before = browser.execute_script(bars)
        choose(browser, "flow", "Experts in order of", "load")
        assert browser.execute_script(bars) != before
        choose(browser, "flow", "Experts in order of", "number")
        assert browser.execute_script(bars) == before
        bands = len(all_of(browser, "#flow svg path"))
        choose(browser, "flow", "Draw flows from", "3 %")
        assert len(all_of(browser, "#flow svg path")) < bands

    def test_paths_are_filtered_by_part_of_speech(self, browser, figures):
        paths = figures["models"][0]["paths"]
        tag = paths[0]["tags"][0][0]
        choose(browser, "clusters", "Paths of mostly", tag)
        rows = all_of(browser, "#clusters .pair > div:first-child tbody tr")
        assert len(rows) == sum(path["tags"][0][0] == tag for path in paths if path["tags"])

    def test_text_is_coloured_and_shows_the_path_under_the_pointer(self, browser, figures):
        from selenium.webdriver import ActionChains
        from selenium.webdriver.support.wait import WebDriverWait

        shown = figures["models"][0]["text"]
        tokens = all_of(browser, "#text-0-0, [id^='text-0-']")
        assert len(tokens) == len(shown)
        path = "path " + "-".join(map(str, shown[3]["path"]))

        def pointed_at_shows(browser):
            # A busy machine's browser may take the pointer's move before it has drawn the scrolled page: try again.
            browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", tokens[3])
            ActionChains(browser).move_by_offset(1, 1).move_to_element(tokens[3]).perform()
            detail = all_of(browser, "#text .detail .path")[0].get_attribute("aria-label")
            return (detail, browser.find_element("id", "tip").text) == (path, path)

        WebDriverWait(browser, 30).until(pointed_at_shows, f"the pointed-at token does not show {path}")

    def test_text_is_walked_with_the_keyboard(self, browser, figures):
        from selenium.webdriver.common.keys import Keys

        box = all_of(browser, "#text [role=listbox]")[0]
        box.send_keys(Keys.HOME, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
        assert box.get_attribute("aria-activedescendant") == "text-0-2"
        path = "-".join(map(str, figures["models"][0]["text"][2]["path"]))
        assert all_of(browser, "#text .detail .path")[0].get_attribute("aria-label") == "path " + path

    def test_one_colour_can_be_seen_alone(self, browser, figures):
        choose(browser, "text", "Colour by", "expert in layer 1")
        button = all_of(browser, "#text .legend button")[0]
        expert = int(button.text.split()[1])
        button.click()
        lit = [token.get_attribute("id") for token in all_of(browser, "[id^='text-0-'].lit")]
        shown = figures["models"][0]["text"]
        assert lit == [f"text-0-{i}" for i, token in enumerate(shown) if token["path"][1] == expert]
        all_of(browser, "#text .legend button")[0].click()
        assert not all_of(browser, "[id^='text-0-'].lit")

    def test_nothing_is_cut_off_on_a_narrow_screen(self, browser):
        from selenium.webdriver.support.wait import WebDriverWait

        browser.set_window_size(520, 900)
        narrow = "return window.innerWidth <= 520"
        WebDriverWait(browser, 30).until(lambda browser: browser.execute_script(narrow), "the window stays wide")
        assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
        browser.set_window_size(1400, 1000)
        assert browser.get_log("browser") == []
