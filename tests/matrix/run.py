# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Runs the tests with the oldest and the newest transformers of the range, and loads each one's checkpoints in each.

    python tests/matrix/run.py                  all groups, both ends of the range beside the installed transformers
    python tests/matrix/run.py --quick          what CI runs
    python tests/matrix/run.py --transformers 5.20.2 5.24.0 --groups generation hub
    python tests/matrix/run.py --torch 2.11.0   with a torch of its own for each transformers (gigabytes)

An environment is a virtual one that sees the packages of the one that runs this script, and on top of them another
transformers with what it needs. Writes the results as JSON and Markdown; exits with 1 if anything fails.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from importlib.metadata import version
from pathlib import Path


ROOT = Path(__file__).parents[2]
ENDS = ("5.17.0", "5.24.0")  # pyproject.toml states the first one; the second is the newest that was tried
UNIT = "tests/modeling_pathmoe"
GROUPS = {
    "model": ["tests/test_loading.py"] + [f"{UNIT}/test_{name}.py" for name in (
        "configuration", "doors", "linear_cross_entropy", "losses", "norm", "parity", "sharing"
    )],
    "generation": [f"{UNIT}/test_generation.py"],
    "routing": [f"{UNIT}/test_routers.py", f"{UNIT}/test_routing.py"],
    "experts": ["tests/experts"],
    "paths": ["tests/paths"],
    "hub": ["tests/hub"],
    "convert": ["tests/convert"],
    "trainer": ["tests/test_examples.py", "tests/train/test_callback.py"],
}  # fmt: skip
QUICK = ("generation", "routing", "hub")


def build_environment(transformers: str, torch: str | None) -> Path:
    """Builds the environment of one transformers, unless it is there, and returns its Python."""
    if transformers == version("transformers") and torch is None:
        return Path(sys.executable)
    folder = ROOT / ".venv" / "matrix" / "-".join(filter(None, (transformers, torch and f"torch-{torch}")))
    python, done = folder / "bin" / "python", folder / "done"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        packages = sysconfig.get_paths()["purelib"]
        site = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
        (site / "outer.pth").write_text(f"import site; site.addsitedir({packages!r})\n")
        wanted = [f"transformers=={transformers}", f"torch=={torch or version('torch')}"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
        done.touch()
    found = subprocess.run(
        [python, "-c", "import torch, transformers; print(transformers.__version__, torch.__version__)"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert found[0] == transformers and found[1].startswith(torch or version("torch")), found
    return python


def run_group(python: Path, files: list[str]) -> dict[str, int]:
    """Runs test files in an environment and counts the outcomes; a run that breaks off counts as an error."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            python,
            "-m",
            "pytest",
            "-n",
            "2",
            "-q",
            "--no-header",
            "--tb=short",
            f"--junitxml={report}",
            *files,
        ]
        done = subprocess.run(command, cwd=ROOT, env=environment(folder), capture_output=True, text=True)
        counts = {"passed": 0, "failed": 0, "skipped": 0}
        if report.exists():
            (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
            counts["failed"] = int(suite.get("failures")) + int(suite.get("errors"))
            counts["skipped"] = int(suite.get("skipped"))
            counts["passed"] = int(suite.get("tests")) - counts["failed"] - counts["skipped"]
        if done.returncode and not counts["failed"]:
            counts["failed"] = 1
        if counts["failed"]:
            print(done.stdout[-5000:], done.stderr[-2000:], file=sys.stderr)
        return counts


def environment(modules: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": modules}


def exchange(pythons: dict[str, Path]) -> dict[str, dict[str, str]]:
    """Loads the checkpoints that each environment writes in each environment, with and without this package.

    Returns:
        `dict`: For `"A → B"` and `"A → B, without the package"`, what `exchange.py` says of each variant.
    """
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        script = ROOT / "tests" / "matrix" / "exchange.py"
        for writer, python in pythons.items():
            subprocess.run([python, script, "write", Path(folder) / writer], env=environment(folder), check=True)
        for reader, python in pythons.items():
            for how in ("package", "code"):
                with tempfile.TemporaryDirectory() as modules:
                    done = subprocess.run(
                        [python, script, "read", how, *(Path(folder) / writer for writer in pythons)],
                        env=environment(modules), capture_output=True, text=True,
                    )  # fmt: skip
                if done.returncode:
                    print(done.stderr[-3000:], file=sys.stderr)
                found = json.loads(done.stdout) if not done.returncode else {}
                for writer in pythons:
                    name = f"{writer} → {reader}" + (", without the package" if how == "code" else "")
                    results[name] = found.get(str(Path(folder) / writer), {"all": "FAILED: the process broke off"})
    return results


def tables(report: dict) -> str:
    """The report as Markdown."""
    groups = list(next(iter(report["tests"].values()), {}))
    lines = [f"{report['processor']}, Python {report['python']}. Cells: passed / failed / skipped.", ""]
    lines += ["| transformers, torch | " + " | ".join(groups) + " |", "|---" * (len(groups) + 1) + "|"]
    for name, row in report["tests"].items():
        cells = [f"{c['passed']} / {c['failed']} / {c['skipped']}" for c in row.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "| checkpoint written → loaded | " + " | ".join(report["variants"]) + " |"]
    lines.append("|---" * (len(report["variants"]) + 1) + "|")
    for name, row in report["exchange"].items():
        lines.append(f"| {name} | " + " | ".join(row.get(v, row.get("all", "")) for v in report["variants"]) + " |")
    lines += ["", "Largest difference of the logits; the greedy text, with a cache and without, is the same."]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transformers", nargs="+", default=sorted({*ENDS, version("transformers")}))
    parser.add_argument("--torch", help="a torch of its own for every environment")
    parser.add_argument("--groups", nargs="*", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--quick", action="store_true", help=f"the groups {', '.join(QUICK)} at the ends of the range")
    parser.add_argument("--output", type=Path, help="JSON file for the results; a .md file is written beside it")
    args = parser.parse_args()
    if args.quick:
        args.groups, args.transformers = QUICK, [v for v in ENDS if v != version("transformers")]
    pythons = {version: build_environment(version, args.torch) for version in args.transformers}
    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
    )
    report = {"processor": cpu, "python": sys.version.split()[0], "tests": {}, "exchange": {}}
    for name, python in pythons.items():
        row = report["tests"][f"{name}, {args.torch or version('torch')}"] = {}
        for group in args.groups:
            began = time.perf_counter()
            row[group] = run_group(python, GROUPS[group])
            print(f"{name} {group}: {row[group]} in {time.perf_counter() - began:.0f} s", flush=True)
    if version("transformers") not in pythons and not args.torch:
        pythons[version("transformers")] = Path(sys.executable)
    report["exchange"] = exchange(pythons)
    report["variants"] = sorted({variant for row in report["exchange"].values() for variant in row} - {"all"})
    print(tables(report))
    if args.output:
        args.output.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        args.output.with_suffix(".md").write_text(tables(report), encoding="utf-8")
    cells = [cell for row in report["tests"].values() for cell in row.values()]
    broken = any(cell["failed"] for cell in cells)
    broken |= any("FAILED" in cell for row in report["exchange"].values() for cell in row.values())
    # A closing line that says what was run, as pytest's does.
    print(", ".join(f"{sum(cell[kind] for cell in cells)} {kind}" for kind in ("passed", "failed", "skipped")))
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
