# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Checks shell commands of the documentation without running them: each is parsed by the parser of its own program.

python tests/docs_commands.py < blocks.json     a list of shell blocks; prints a list of [command, what is wrong]
"""

import argparse
import contextlib
import io
import json
import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path

from accelerate.commands.launch import launch_command_parser

from pathmoe.train.recipe import parse_recipe


ROOT = Path(__file__).parents[1]
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
NOT_OURS = {"source", "export", "vllm", "scontrol", "[", "pre-commit"}
parse_known_args = argparse.ArgumentParser.parse_known_args


class Parsed(BaseException):
    """A program has read its arguments. What comes next would do the work."""


def parse_and_stop(parser, args=None, namespace=None):
    """Takes the place of `parse_known_args`: stops the program when the outermost parser is done."""
    argparse.ArgumentParser.parse_known_args = parse_known_args  # parsers of subcommands are called from within
    try:
        _, rest = parse_known_args(parser, args, namespace)
    finally:
        argparse.ArgumentParser.parse_known_args = parse_and_stop
    raise Parsed(rest)


def commands_of(block: str) -> list[list[str]]:
    """The commands of a shell block, as words; variables become the number 1."""
    block = re.sub(r" > \S+", " ", block.replace("$(pathmoe presets --folder)", "configuration"))
    block = re.sub(r"\$\(\([^)]*\)\)|\$\([^)]*\)|\$\w+", "1", block.replace("\\\n", " "))
    commands, words = [], []
    for line in block.splitlines() or [""]:
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        for word in [*lexer, ";"]:
            if set(word) <= set("&|;"):
                commands, words = [*commands, words], []
            else:
                words.append(word)
    return [words for words in commands if words]


def check(words: list[str]):
    """Raises an error that says what is wrong with a command."""
    program, rest = words[0], words[1:]
    if program == "srun":
        [command] = commands_of(rest[-1])
        check(command)
    elif program == "make":
        unknown = [word for word in rest if "=" not in word and word not in TARGETS]
        assert rest and not unknown, f"no make target {unknown}"
    elif program == "pip":
        check_pip(rest)
    elif program == "accelerate":
        options, _ = parse_known_args(launch_command_parser(), rest[1:])
        assert Path(options.config_file or ROOT).exists(), f"{options.config_file} does not exist"
        program = [options.training_script] if options.module else ["python", options.training_script]
        check([*program, *options.training_script_args])
    elif words[:2] in (["pathmoe", "train"], ["python", "train_accelerate.py"]):
        parse_recipe(rest[1:])
    elif program == "pathmoe":
        run(["-m", "pathmoe", *rest])
    elif program in ("python", "python3.11", ".venv/bin/python") and rest[:2] not in (
        ["-m", "venv"],
        ["-m", "pytest"],
    ):
        run(rest)
    else:
        assert program in NOT_OURS or rest[:1] == ["-m"], f"{program} is not known to this check"


def check_pip(rest: list[str]):
    for option, value in zip(rest, rest[1:]):
        assert option not in ("-r", "-c") or Path(value).exists(), f"{value} does not exist"
    for extra in re.findall(r"\.\[([\w,]+)\]", " ".join(rest)):
        assert set(extra.split(",")) <= set(EXTRAS), f"there are no such extras: {extra}"


def run(words: list[str]):
    """Starts a Python program until it has read its arguments. What `plan` leaves over must be fields of a recipe."""
    module = words[0] == "-m"
    sys.argv = words[1:] if module else words
    try:
        if module:
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    except Parsed as parsed:
        rest = parsed.args[0]
        assert not rest or "plan" in words, f"unrecognized arguments: {rest}"
        if rest:
            parse_recipe(rest)
    except SystemExit as stop:
        assert not stop.code, stop.code


def main():
    argparse.ArgumentParser.parse_known_args = parse_and_stop
    failures = []
    for command in [command for block in json.load(sys.stdin) for command in commands_of(block)]:
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                check(command)
        except Exception as error:
            failures.append([" ".join(command), f"{type(error).__name__}: {error} {said.getvalue()[-500:]}"])
    print(json.dumps(failures))


if __name__ == "__main__":
    main()
