# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Converts checkpoints: python -m modeling_pathmoe.convert COMMAND --help"""

import argparse
import signal
import sys

from .exporting import export_checkpoint


def parser() -> argparse.ArgumentParser:
    """The command line."""
    main_parser = argparse.ArgumentParser(prog="python -m modeling_pathmoe.convert", description=__doc__)
    commands = main_parser.add_subparsers(dest="command", required=True)

    def add(name, function, description, sources="SRC"):
        command = commands.add_parser(name, help=description, description=description)
        command.set_defaults(function=function)
        if sources == "SRC":
            command.add_argument("src", metavar="SRC", help="folder of a saved model")
        else:
            command.add_argument("sources", metavar="SRC", nargs="+", help="folders of saved models")
        command.add_argument("dst", metavar="DST", help="folder to write; must not exist")
        command.add_argument("--max-shard-size", default="1GB", help="largest size of a shard (1GB)")
        command.add_argument(
            "--no-verify",
            dest="verify",
            action="store_false",
            help="do not compare the logits of source and target: for models that do not fit in memory in float32",
        )
        return command

    export = add("export", export_checkpoint, "PathMoE to Qwen3-MoE or Mixtral, exactly")
    export.add_argument("--to", choices=["auto", "qwen3_moe", "mixtral"], default="auto")
    return main_parser


def main(argv: list[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv (`list[str]`, *optional*): Command-line arguments; the process's own when unset.

    Returns:
        `int`: The exit status: 0, or 1 after an error that says what to do.
    """
    arguments = vars(parser().parse_args(argv))
    command, function = arguments.pop("command"), arguments.pop("function")
    # Being terminated is an exception too, so that no partial target stays.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        result = function(**arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 1
    print(summary(arguments.get("dst"), result))
    return 0


def summary(dst: str, manifest: dict) -> str:
    """What the terminal is told of a conversion."""
    target, lines = manifest["target"], []
    lines.append(f"{dst}: {target['model_type']}, {target['bytes'] / 1e6:,.1f} MB in {target['shards']} file(s)")
    if checked := manifest["verified"]:
        lines.append(
            f"largest logit difference to the source on {checked['tokens']} tokens, float32: "
            f"{checked['largest_logit_difference']:.3g} (logits up to {checked['largest_logit']:.3g})"
        )
    else:
        lines.append("NOT VERIFIED: the logits of source and target were not compared (--no-verify).")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
