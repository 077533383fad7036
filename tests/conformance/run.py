# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Runs transformers' own common model tests on PathMoE, on the CPU.

    python tests/conformance/run.py                                    # all parts
    python tests/conformance/run.py --part tp                          # common, training, fsdp, tp or ep
    python tests/conformance/run.py --config '{"router_block_size": 1}'
    python tests/conformance/run.py -- -x -k rope                      # what follows `--` goes to pytest

The tests come from the source distribution of the installed transformers, which is fetched once into
runs/conformance. That distribution lacks four modules that they import. supplied/distributed_testing_utils.py stands
in for the one that starts the ranks, SUPPLIED for the others; the mixins of `generate` and of the exporters are empty.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path


HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / "runs" / "conformance"
SUPPLIED = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    # Arguments that every config takes, with values that are not their defaults.
    "utils/test_configuration_utils.py": """config_common_kwargs = {
    "architectures": ["PathMoEForCausalLM"],
    "chunk_size_feed_forward": 5,
    "dtype": "float16",
    "id2label": {0: "label"},
    "label2id": {"label": 0},
    "output_attentions": True,
    "output_hidden_states": True,
    "problem_type": "regression",
    "return_dict": False,
}
""",
}


def fetch_tests() -> Path:
    """Downloads and unpacks the tests of the installed transformers, once; returns the folder that holds `tests`."""
    name = f"transformers-{version('transformers')}"
    folder = CACHE / name
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as tmp:
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--dest", tmp]
            subprocess.run([*pip, name.replace("-", "==")], check=True)
            with tarfile.open(next(Path(tmp).glob("*.tar.gz"))) as archive:
                members = [m for m in archive.getmembers() if m.name.startswith(f"{name}/tests/")]
                archive.extractall(tmp, members, filter="data")
            Path(tmp, name).rename(folder)
    tests = folder / "tests"
    (tests / "__init__.py").touch()
    for path, text in SUPPLIED.items():
        (tests / path).parent.mkdir(exist_ok=True)
        (tests / path).with_name("__init__.py").touch()
        (tests / path).write_text(text)
    shutil.copy(HERE / "supplied" / "distributed_testing_utils.py", tests)
    return folder


class Report:
    """A pytest plug-in: leaves out what is excluded or belongs to another part, and keeps what became of the rest."""

    def __init__(self, part: str, part_of: Callable, exclusions: dict[str, str]):
        self.part, self.part_of, self.exclusions = part, part_of, exclusions
        self.outcomes, self.skips, self.excluded = {}, defaultdict(list), {}

    def pytest_collection_modifyitems(self, config, items):
        unknown = set(self.exclusions) - {item.name for item in items}
        if unknown:
            raise ValueError(f"EXCLUDED names tests that do not exist: {sorted(unknown)}")
        ours = [item for item in items if self.part in ("all", self.part_of(item.originalname or item.name))]
        self.excluded = {item.name: self.exclusions[item.name] for item in ours if item.name in self.exclusions}
        selected = [item for item in ours if item.name not in self.exclusions]
        config.hook.pytest_deselected(items=[item for item in items if item not in selected])
        items[:] = selected

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.split("::")[-1]
        worst = {"failed": 2, "skipped": 1, "passed": 0}
        # A test has a report for each phase and each subtest: the worst counts.
        if worst[report.outcome] >= worst[self.outcomes.get(name, "passed")]:
            self.outcomes[name] = report.outcome
        if report.skipped and isinstance(report.longrepr, tuple):
            reason = report.longrepr[2].removeprefix("Skipped: ")
            if name not in self.skips[reason]:
                self.skips[reason].append(name)

    def summary(self) -> str:
        lines = [f"Skipped because: {reason}\n    {', '.join(names)}" for reason, names in sorted(self.skips.items())]
        lines += [f"Excluded: {name}: {reason}" for name, reason in self.excluded.items()]
        counts = {outcome: list(self.outcomes.values()).count(outcome) for outcome in ("passed", "failed", "skipped")}
        lines += [f"Failed: {name}" for name, outcome in self.outcomes.items() if outcome == "failed"]
        numbers = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        lines += [f"Conformance ({self.part}): {numbers}, {len(self.excluded)} excluded"]
        return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["all", "common", "training", "fsdp", "tp", "ep"], default="all")
    parser.add_argument("--config", type=json.loads, default={}, help="JSON that overrides fields of the tiny config")
    parser.add_argument("pytest_args", nargs="*", help="passed on to pytest")
    args = parser.parse_args()

    folder = fetch_tests()
    # The ranks of the distributed tests inherit these.
    os.environ.update(
        CUDA_VISIBLE_DEVICES="",
        HF_HUB_OFFLINE="1",
        PATHMOE_CONFORMANCE_CONFIG=json.dumps(args.config),
        PYTHONDONTWRITEBYTECODE="1",
        TRANSFORMERS_TEST_DEVICE="cpu",
    )
    sys.dont_write_bytecode = True
    # transformers' tests import each other as `tests`.
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if path[0] != str(folder):
        os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *path]).rstrip(os.pathsep)
        return subprocess.run([sys.executable, *sys.argv]).returncode

    import pytest
    from conformance_pathmoe import EXCLUDED, part_of

    with tempfile.TemporaryDirectory(dir=CACHE) as tmp:
        os.environ.update(TMPDIR=tmp, HF_HOME=f"{tmp}/huggingface")
        tempfile.tempdir = tmp
        report = Report(args.part, part_of, EXCLUDED)
        options = [
            "-c",
            os.devnull,
            f"--rootdir={HERE}",
            "--noconftest",
            "--import-mode=importlib",
            "-p",
            "no:cacheprovider",
            "-v",
            "--tb=short",
        ]
        # The fetched tests carry marks that are declared in their own repository.
        options += ["-W", "ignore::pytest.PytestUnknownMarkWarning", "--disable-warnings"]
        code = pytest.main([*options, *args.pytest_args, str(HERE / "conformance_pathmoe.py")], plugins=[report])
    print(report.summary())
    return code


if __name__ == "__main__":
    sys.exit(main())
