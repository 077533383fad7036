# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""The command `pathmoe`, which trains, evaluates, inspects and converts models."""

import difflib
import os
import signal
import sys
from importlib import import_module
from typing import NamedTuple

from . import __version__
from .command import UserError, run_command


class Command(NamedTuple):
    """A sub-command.

    Args:
        module (`str`): The module with the program. It is only imported when the command runs, as torch takes seconds.
        function (`str`): The function of `module` that reads `sys.argv`. If it returns an integer, that is the exit
            status.
        summary (`str`): A description of the command.
        example (`str`): The arguments of an example call.
        extra (`str`, *optional*): The extra of the distribution that installs the packages that the program needs.
        interrupted (`int`, defaults to 130): The exit status after Ctrl-C.
    """

    module: str
    function: str
    summary: str
    example: str
    extra: str | None = None
    interrupted: int = 130


RESUMABLE = 75  # `INTERRUPTED` of `pathmoe.train.main`, which would take seconds to import
COMMANDS = {
    "train": Command(
        "pathmoe.train.main", "command", "train a model from a recipe, or resume a run",
        "--config quickstart --output_dir runs/mine --learning_rate 1e-3", "train", RESUMABLE,
    ),
    "plan": Command(
        "pathmoe.train.main", "command", "show how much memory a recipe takes on each GPU",
        "--config paper-16b --gpus 8 64", "train", RESUMABLE,
    ),
    "plot": Command(
        "pathmoe.train.main", "command", "plot the metrics of one or several runs",
        "runs/mine runs/other --output curves.png", "train", RESUMABLE,
    ),
    "eval": Command(
        "pathmoe.evaluate.run_lm_eval", "main", "run lm-eval's tasks on a model",
        "--model runs/mine/final --suite pathmoe_paper_0.9b_offline --output runs/mine/lm_eval", "eval",
    ),
    "perplexity": Command(
        "pathmoe.evaluate.perplexity", "main", "measure the perplexity of a model on text",
        "--model runs/mine/final --data validation.jsonl --output runs/mine/perplexity.json", "eval",
    ),
    "compare": Command(
        "pathmoe.evaluate.compare", "main", "compare evaluations item by item",
        "runs/mine/lm_eval runs/other/lm_eval --names mine other --output comparison", "eval",
    ),
    "paths": Command(
        "pathmoe.evaluate.path_report", "main", "show the expert paths of one or two models on a page",
        "--model runs/mine/final --data validation.jsonl --output paths", "paths",
    ),
    "convert": Command(
        "pathmoe.convert.__main__", "main", "convert checkpoints to and from Qwen3-MoE, Mixtral and dense models",
        "export runs/mine/final out/qwen3_moe --to qwen3_moe", "convert",
    ),
    "presets": Command(
        "pathmoe.presets", "main", "list the shipped recipes and model configurations, or print one",
        "train/quickstart > mine.yaml",
    ),
}  # fmt: skip


def overview() -> str:
    """Returns the text that `pathmoe --help` prints."""
    lines = ["usage: pathmoe COMMAND …", "", "Path-Constrained Mixture-of-Experts for Hugging Face Transformers.", ""]
    lines += [f"  {name:<11} {command.summary}" for name, command in COMMANDS.items()]
    lines += ["", "pathmoe COMMAND --help describes a command; pathmoe --version prints the version. For example:", ""]
    return "\n".join(lines + [f"  pathmoe {name} {command.example}" for name, command in COMMANDS.items()])


def run(name: str, arguments: list[str]) -> object:
    """Imports the program of a sub-command and runs it.

    Args:
        name (`str`): A key of `COMMANDS`.
        arguments (`list[str]`): The arguments of the sub-command.

    Returns:
        `object`: The result of the program. If it is an integer, it is the exit status.

    Raises:
        UserError: If the command is unknown or needs a package that is not installed.
    """
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        fix = f"did you mean {close[0]}?" if close else f"choose from {', '.join(COMMANDS)}."
        raise UserError(f"{name or repr(name)} is not a command: {fix}")
    command = COMMANDS[name]
    if "--help" in arguments or "-h" in arguments:
        print(f"example: pathmoe {name} {command.example}\n", flush=True)
    # A program shows the first argument as its name. `train`, `plan` and `plot` are the same program.
    sys.argv = ["pathmoe", name, *arguments] if name in ("plan", "plot") else [f"pathmoe {name}", *arguments]
    try:
        if command.extra is not None:
            import_module("pathmoe.experts")  # registers the model and the fast experts
        program = getattr(import_module(command.module), command.function)
    except ModuleNotFoundError as error:
        if (error.name or "pathmoe").startswith(("pathmoe", "modeling_pathmoe")):
            raise
        fix = f"pip install 'pathmoe[{command.extra}]'"
        raise UserError(f"pathmoe {name} needs the package {error.name}: {fix}") from error
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return program()


def main():
    """Runs the command line and exits with the status of the command."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if hasattr(signal, "SIGPIPE") and name in ("--help", "-h", "presets"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly when piped into `head`
    if name in ("--help", "-h"):
        print(overview())
    elif name == "--version":
        print(f"pathmoe {__version__}")
    else:
        interrupted = COMMANDS[name].interrupted if name in COMMANDS else 130
        signal.signal(signal.SIGINT, lambda *_: os._exit(interrupted))  # the libraries take seconds to load
        if interrupted == RESUMABLE:
            # Set before torch is imported, which reads it. Threads that spin while they wait slow a busy machine down.
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        run_command(lambda: run(name, arguments), interrupted=interrupted)
