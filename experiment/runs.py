# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""The settings, the corpus, and the runs of each part of the experiment with their results."""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from datasets import load_dataset
from huggingface_hub.errors import StrictDataclassError

from experiment.first.train import ExperimentRun, make_run
from pathmoe.command import UserError, one_line
from pathmoe.files import read_json, write_aside
from pathmoe.text.rows import BUILDERS
from pathmoe.train.model import build_config
from pathmoe.train.recipe import Recipe


PARTS = ("tune", "primary", "map")
MOVED = 0.01  # nats; a point's extra rows are trained if its contrast differs by more from that of the first point
PLACES = ("dataset", "data_files", "cache_dir")  # recipe fields with the place of the text, not the content


@dataclass(frozen=True)
class Experiment:
    """The settings, folders and corpus of an experiment.

    Args:
        settings (`dict`): The content of the YAML file.
        output (`Path`): The folder of the runs.
        results (`Path`): The folder of the small results.
        corpus (`dict`): The SHA-256 of each file of the corpus and of the tokenizer. Empty if nothing is trained.
    """

    settings: dict
    output: Path
    results: Path
    corpus: dict = field(default_factory=dict)

    def read(self, run: ExperimentRun) -> dict | None:
        """Reads the result of a run. Returns `None` if there is none.

        Raises:
            UserError: If the file is not a result, or is the result of different settings, corpus or tokenizer.
        """
        file = self.results / f"{run.name}.json"
        if not file.is_file():
            return None
        result = read_json(file)
        if missing := {"settings", "corpus"} - set(result):
            raise UserError(f"{file} is not the result of a run, it lacks {', '.join(sorted(missing))}: remove it.")
        if result["settings"] != digest(run):
            raise UserError(f"{file} was trained with different settings: remove it or restore the settings.")
        if self.corpus and result["corpus"] != self.corpus:
            raise UserError(f"{file} was trained on a different corpus or tokenizer: choose another --results folder.")
        return result

    def tuning_runs(self) -> dict[str, list[ExperimentRun]]:
        """Returns, for each row, the runs among which the learning rate is chosen."""
        tune = self.settings["tune"]
        return {
            row: [
                make_run(self.settings, row, tune["tokens"], tune["seed"], float(rate), f"tune-{row}-{float(rate):g}")
                for rate in tune["learning_rates"]
            ]
            for row in self.settings["rows"]
        }

    def learning_rates(self) -> dict[str, float]:
        """Returns the learning rate of each row whose tuning runs have all finished."""
        chosen = {}
        for row, runs in self.tuning_runs().items():
            results = [self.read(run) for run in runs]
            if all(results):
                best = min(results, key=lambda result: result["validation_loss"])
                chosen[row] = best["learning_rate"]
        return chosen

    def primary_runs(self) -> list[ExperimentRun]:
        """Returns the runs of the primary contrast, seed by seed. Rows without a learning rate are left out."""
        primary, rates = self.settings["primary"], self.learning_rates()
        return [
            make_run(self.settings, row, primary["tokens"], seed, rates[row], f"primary-{row}-s{seed}")
            for seed in primary["seeds"]
            for row in self.settings["rows"]
            if row in rates
        ]

    def map_runs(self, extra: bool = True) -> dict[str, list[ExperimentRun]]:
        """Returns the runs of each point of the map. `extra` adds the extra rows where the contrast has moved."""
        points = self.settings.get("map", {}).get("points", {})
        runs = {point: self.point_runs(point, self.settings["map"]["rows"]) for point in points}
        contrasts = {point: self.contrast(of_point) for point, of_point in runs.items()} if extra else {}
        first = next(iter(contrasts.values()), None)
        for point, contrast in contrasts.items():
            if None not in (first, contrast) and abs(contrast - first) > MOVED:
                runs[point] += self.point_runs(point, self.settings["map"]["extra_rows"])
        return runs

    def point_runs(self, point: str, rows: list[str]) -> list[ExperimentRun]:
        """Returns the runs of some rows at a point of the map."""
        changes, rates = self.settings["map"]["points"][point], self.learning_rates()
        tokens = changes.get("tokens", self.settings["primary"]["tokens"])
        runs = []
        for seed in self.settings["map"]["seeds"]:
            for row in (row for row in rows if row in rates):
                recipe = merge(self.settings["recipe"], changes.get("recipe", {}))
                if "source" in changes:
                    folder = self.output / "corpus" / changes["source"]
                    files = {split: str(folder / f"{split}.parquet") for split in ("train", "validation")}
                    recipe |= {"dataset": "parquet", "data_files": files}
                own = merge(self.settings["rows"][row], changes.get("rows", {}).get(row, {}))
                settings = {"recipe": recipe, "rows": {row: own}}
                runs.append(make_run(settings, row, tokens, seed, rates[row], f"map-{point}-{row}-s{seed}"))
        return runs

    def contrast(self, runs: list[ExperimentRun], row: str = "pathb4", base: str = "indep") -> float | None:
        """Returns the mean difference of two rows over the seeds that both have finished, or `None` without any."""
        found = {(run.row, run.seed): self.read(run) for run in runs}
        pairs = [
            (found[row, seed]["nats"], found[base, seed]["nats"])
            for seed in {run.seed for run in runs}
            if found.get((row, seed)) and found.get((base, seed))
        ]
        return sum(one - two for one, two in pairs) / len(pairs) if pairs else None


def merge(base: dict, changes: dict) -> dict:
    """Returns a recipe with changes. The `model_overrides` of both are merged."""
    merged = base | changes
    merged["model_overrides"] = base.get("model_overrides", {}) | changes.get("model_overrides", {})
    return merged


def digest(run: ExperimentRun) -> str:
    """Returns a hash of a run's recipe that does not depend on where the text is stored."""
    recipe = {name: value for name, value in run.recipe.items() if name not in PLACES}
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def read_settings(file: Path) -> dict:
    """Reads the settings.

    Raises:
        UserError: If the file is missing, is not YAML, or lacks a part.
    """
    if not file.is_file():
        raise UserError(f"--config {file} does not exist: name a YAML file such as experiment/cpu.yaml.")
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {file} is not valid YAML: {error}") from error
    needed = {"recipe", "rows", "tune", "primary"}
    if missing := needed - set(settings if isinstance(settings, dict) else ()):
        raise UserError(f"--config {file} lacks {', '.join(sorted(missing))}: add them.")
    return settings


def is_number(value: object) -> bool:
    """Returns whether a value, or the text of one, is a number."""
    try:
        float(value)  # type: ignore[arg-type]  # that is the question
    except (TypeError, ValueError):
        return False
    return True


def check_settings(settings: dict, file: Path):
    """Checks the parts of the settings and the recipe of every run before anything is written.

    Raises:
        UserError: If a run cannot be trained. The message names the file, the part and the value.
    """

    def refuse(part: str, value: object, need: str):
        raise UserError(f"--config {file}: {part}={value!r:.80} must be {need}.")

    def check(part: str, value: object, fields: dict[str, type | tuple]):
        """Checks that a part is a mapping whose fields have these types; those in a tuple are of lists."""
        if not isinstance(value, dict):
            refuse(part, value, "a mapping")
        for name, kind in fields.items():
            entry, kinds = value.get(name), kind if isinstance(kind, tuple) else (kind,)
            entries = [entry] if kind is not kinds else entry if isinstance(entry, list) and entry else [None]
            if not all(isinstance(item, kinds) and not isinstance(item, bool) for item in entries):
                words = " or ".join(kind.__name__ for kind in kinds)
                refuse(f"{part}.{name}", entry, f"a list of {words}" if kind is kinds else f"of type {words}")

    check("tune", settings["tune"], {"tokens": int, "seed": int, "learning_rates": (float, int, str)})
    check("primary", settings["primary"], {"tokens": int, "seeds": (int,)})
    check("recipe", settings["recipe"], {"model": str, "batch_size": int, "sequence_length": int})
    if not Path(model := settings["recipe"]["model"]).is_file():
        raise UserError(f"--config {file}: model={model!r} not found: run in the repository's root.")
    check("rows", settings["rows"], {})
    for row in settings["rows"]:
        if not re.fullmatch(r"[\w.-]+", str(row)):
            refuse("row", row, "a name of letters, digits, '_', '.' and '-'")
    for rate in settings["tune"]["learning_rates"]:
        if not is_number(rate):
            refuse("tune.learning_rates", rate, "a list of numbers")

    def check_rows(part: str, rows: Iterable[str]):
        if unknown := sorted(set(rows) - set(settings["rows"])):
            refuse(part, unknown, f"rows of this file: {', '.join(settings['rows'])}")

    places = {part: {"tokens": settings[part]["tokens"]} for part in ("tune", "primary")}
    if (of_map := settings.get("map")) is not None:
        check("map", of_map, {"seeds": (int,), "rows": (str,), "points": dict})
        check_rows("map.rows", [*of_map["rows"], *(of_map.get("extra_rows") or [])])
        places |= {f"map.points.{point}": changes for point, changes in of_map["points"].items()}
    for part in ("primary", "map"):
        seeds = (settings.get(part) or {}).get("seeds", [])
        if len(set(seeds)) < len(seeds):
            refuse(f"{part}.seeds", seeds, "different seeds: equal ones repeat a run")
    for place, changes in places.items():
        check(place, changes, {})
        check(f"{place}.recipe", changes.get("recipe", {}), {})
        check(f"{place}.rows", changes.get("rows", {}), {})
        check_rows(f"{place}.rows", changes.get("rows", {}))
        if isinstance(tokens := changes.get("tokens"), int) and tokens < 1:
            refuse(f"{place}.tokens", tokens, "at least one batch")
        for row, own in settings["rows"].items():
            check(f"rows.{row}", own, {})
            tokens = changes.get("tokens", settings["primary"]["tokens"])
            parts = {"recipe": merge(settings["recipe"], changes.get("recipe", {}))}
            parts["rows"] = {row: merge(own, changes.get("rows", {}).get(row, {}))}
            for rate in settings["tune"]["learning_rates"]:
                try:
                    recipe = make_run(parts, row, tokens, settings["tune"]["seed"], float(rate)).recipe
                    build_config(Recipe(**recipe | {"dataset": "json", "output_dir": "runs"}))
                except (
                    StrictDataclassError,
                    UserError,
                    TypeError,
                    ValueError,
                    ArithmeticError,
                    AttributeError,
                ) as error:
                    reason = one_line(error.__cause__ or error)
                    reason = re.sub(r"Recipe\S+ got an unexpected keyword argument", "unknown recipe field", reason)
                    raise UserError(f"--config {file}: row {row} of {place}: {reason}") from error


def corpus_files(folder: Path) -> tuple[str, dict[str, str]]:
    """Returns the builder and the two files of a corpus.

    Raises:
        UserError: If a file is missing.
    """
    for suffix in (".parquet", ".jsonl"):
        files = {split: str(folder / f"{split}{suffix}") for split in ("train", "validation")}
        if all(Path(file).is_file() for file in files.values()):
            return BUILDERS[suffix], files
    raise UserError(
        f"{folder} has no train.parquet and validation.parquet (or .jsonl) with the columns text and source: pass the "
        "folder of a corpus as --corpus, or build one with `python -m experiment.corpus --output_dir FOLDER`."
    )


def hash_corpus(files: dict[str, str]) -> dict[str, str]:
    """Returns the SHA-256 of the two files of a corpus.

    Raises:
        UserError: If a file is empty, or both are the same.
    """
    for file in files.values():
        if not Path(file).stat().st_size:
            raise UserError(f"{file} is empty: build the corpus again.")
    hashes = {split: hash_file(Path(file)) for split, file in files.items()}
    if hashes["train"] == hashes["validation"]:
        raise UserError(f"{files['train']} and {files['validation']} are the same text: pass another --corpus.")
    return hashes


def place_corpus(corpus: Path | None, output: Path, sources: set[str]) -> tuple[str, dict[str, str], dict[str, str]]:
    """Links the corpus into the folder of the runs, so that recipes do not depend on the place of the corpus.

    Args:
        corpus (`Path`, *optional*): The folder of the corpus. If `None`, the corpus that was linked before is used.
        output (`Path`): The folder of the runs.
        sources (`set[str]`): Sources whose text is also written to separate files.

    Returns:
        `tuple`: The builder, the two files, and the SHA-256 of each file.

    Raises:
        UserError: If the corpus is missing or is not the one that the runs have used before.
    """
    folder, known = output / "corpus", output / "corpus.json"
    builder, files = corpus_files(corpus or folder)
    hashes = hash_corpus(files)
    if known.exists() and read_json(known) != hashes:
        raise UserError(
            f"the corpus in {corpus or folder} is not the one that {output} was begun with: name another --output."
        )
    if corpus is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for file in files.values():
            link = folder / Path(file).name
            if link.exists() and link.samefile(file):
                continue
            if link.exists() and not link.is_symlink():
                raise UserError(f"{link} is a file of its own, not a link to a corpus: name another --output.")
            link.unlink(missing_ok=True)
            link.symlink_to(Path(file).resolve())
        builder, files = corpus_files(folder)
    with write_aside(known) as partial:
        partial.write_text(json.dumps(hashes), encoding="utf-8")
    for source in sources:
        for split, file in files.items():
            kept = folder / source / f"{split}.parquet"
            if not kept.exists():
                text = load_dataset(builder, data_files=file, split="train")
                text = text.filter(lambda row, source=source: row["source"] == source)
                if not len(text):
                    raise UserError(f"{file} has no document of source {source!r}, which the map needs: add some.")
                with write_aside(kept) as partial:
                    text.to_parquet(str(partial))
    return builder, files, hashes


def hash_file(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
