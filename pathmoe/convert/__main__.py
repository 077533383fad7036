# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Converts checkpoints: pathmoe convert COMMAND --help"""

import argparse

from transformers.utils import logging

from ..command import ArgumentParser, run_command
from .exporting import export_checkpoint
from .importing import import_checkpoint
from .inspection import inspect_checkpoint
from .merging import average_checkpoints, prune_experts
from .shapes import PER_EXPERT
from .upcycling import upcycle


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    main_parser = ArgumentParser(prog="pathmoe convert", description=__doc__)
    commands = main_parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

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

    def add_text(command, required=False):
        command.add_argument(
            "--text", required=required, help="text or JSON file (column text) that resembles the model's use"
        )
        command.add_argument(
            "--tokens", dest="num_tokens", type=int, default=8192, help="number of its tokens to use (8192)"
        )

    export = add("export", export_checkpoint, "convert PathMoE to Qwen3-MoE, Mixtral or OLMoE, exactly")
    export.add_argument("--to", choices=["auto", *PER_EXPERT], default="auto")

    importer = add("import", import_checkpoint, "convert Qwen3-MoE, Mixtral or OLMoE to PathMoE")
    importer.add_argument("--block-size", type=int, default=1, help="layers that share a router (1: exact)")
    add_text(importer)

    cycle = add("upcycle", upcycle, "convert a dense Llama, Mistral or Qwen3 to PathMoE")
    cycle.add_argument("--experts", dest="num_experts", type=int, required=True)
    cycle.add_argument("--top-k", dest="num_experts_per_tok", type=int, required=True)
    cycle.add_argument("--block-size", type=int, default=4, help="layers that share a router (4)")
    cycle.add_argument(
        "--noise", type=float, default=0.0, help="noise added to the experts, in standard deviations; not exact"
    )
    cycle.add_argument("--drop", type=float, default=0.0, help="share of neurons to redraw at random; not exact")
    cycle.add_argument("--granularity", type=int, default=1, help="number of experts to split one network into")
    cycle.add_argument("--seed", type=int, default=0)

    average = add("average", average_checkpoints, "average PathMoE checkpoints", sources="SRC...")
    average.add_argument("--weights", type=float, nargs="+", help="one per source, summing to 1; equal when unset")

    prune = add("prune", prune_experts, "remove the experts of a PathMoE that paths use least")
    prune.add_argument("--experts", dest="num_experts", type=int, required=True, help="number to keep in each layer")
    add_text(prune, required=True)

    inspect = commands.add_parser("inspect", help="describe a checkpoint without loading it")
    inspect.set_defaults(function=inspect_checkpoint)
    inspect.add_argument("src", metavar="SRC", help="folder of a saved model")
    return main_parser


def main(argv: list[str] | None = None):
    """Runs a command.

    Args:
        argv (`list[str]`, *optional*): Command-line arguments; the process's own when unset.

    Raises:
        UserError: If an input cannot be used; the message contains the fix.
    """
    arguments = vars(parser().parse_args(argv))
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    command, function = arguments.pop("command"), arguments.pop("function")
    result = function(**arguments)
    print(description(result) if command == "inspect" else summary(arguments["dst"], result))


def summary(dst: str, manifest: dict) -> str:
    """Returns the report of a conversion for the terminal."""
    target, lines = manifest["target"], []
    lines.append(f"{dst}: {target['model_type']}, {target['bytes'] / 1e6:,.1f} MB in {target['shards']} file(s)")
    if checked := manifest["verified"]:
        lines.append(
            f"largest logit difference to the source on {checked['tokens']} tokens, float32: "
            f"{checked['largest_logit_difference']:.3g} (logits up to {checked['largest_logit']:.3g})"
        )
    else:
        lines.append("NOT VERIFIED: the logits of source and target were not compared (--no-verify).")
    if agreement := manifest.get("agreement"):
        lines.append(f"experts that the shared routers keep, by block: {_percent(agreement['of_blocks'])}")
        lines.append(f"experts that chance would keep: {agreement['by_chance']:.1%}")
    if "choices_kept" in manifest:
        lines.append(f"choices that fell on the kept experts, by block: {_percent(manifest['choices_kept'])}")
        lines.append(f"tokens whose whole path is kept: {manifest['paths_kept']:.1%}")
    if perplexity := manifest.get("perplexity"):
        text = "perplexity of {tokens} held-out tokens: {before:.4g} before, {after:.4g} after"
        lines.append(text.format(**perplexity))
    if "note" in manifest:
        lines.append(manifest["note"])
    return "\n".join(lines)


def _percent(shares: list[float]) -> str:
    return ", ".join(f"{share:.1%}" for share in shares)


def description(found: dict) -> str:
    """Returns the description of a checkpoint for the terminal."""
    blocks = found.pop("blocks", None)
    lines = [f"{name:14} {f'{value:,}' if isinstance(value, int) else value}" for name, value in found.items()]
    if blocks:
        runs = [f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0]) for layers in blocks]
        lines.append(f"{'shared routers':14} layers {', '.join(runs)}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
