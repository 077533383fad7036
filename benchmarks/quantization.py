# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Measures memory and perplexity of a checkpoint whose experts torchao loads with 8 bits per weight.

    pip install torchao
    python -m benchmarks.quantization --model runs/quickstart/final --data runs/quickstart/data/validation.jsonl

Writes the results to `benchmarks/quantization.json` (`--json`).
"""

import argparse
import json
import math
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

import pathmoe  # noqa: F401  registers PathMoE with the Auto classes
from benchmarks.options import check_options
from pathmoe.command import ArgumentParser, run_command
from pathmoe.evaluate.perplexity import load_documents
from pathmoe.evaluate.scoring import perplexity
from pathmoe.files import write_text


try:
    from torchao.quantization import Float8WeightOnlyConfig, FqnToConfig, Int8WeightOnlyConfig
except ModuleNotFoundError:
    raise SystemExit("error: this benchmark needs the package torchao: pip install torchao") from None

SCHEMES = {"bfloat16": None, "int8": Int8WeightOnlyConfig(version=2), "float8": Float8WeightOnlyConfig()}


def megabytes(tensor: torch.Tensor) -> float:
    """Returns the memory of a tensor; for a quantised tensor, that of its parts."""
    if hasattr(tensor, "__tensor_flatten__") and type(tensor) is not torch.nn.Parameter:
        return sum(megabytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size() / 1e6


def load(folder: str, scheme: str, implementation: str):
    """Loads the model and quantises its experts while it is loaded."""
    quantized = SCHEMES[scheme]
    config = quantized and TorchAoConfig(FqnToConfig({r"re:.*experts\.(gate_up|down)_proj": quantized}))
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, experts_implementation=implementation, quantization_config=config
    )


def main(argv: list[str] | None = None):
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a saved model and its tokenizer")
    parser.add_argument("--data", required=True, help="text, as for eval/perplexity.py")
    parser.add_argument("--limit", type=int, default=8, help="documents (8)")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args(argv)
    check_options(args, {"limit": 1}, json='"megabytes"')
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = list(load_documents(args.data, ["text"], limit=args.limit)["text"])
    results = {}
    for scheme in SCHEMES:
        for implementation in ("eager", "grouped_mm"):
            model = load(args.model, scheme, implementation)
            result = {"megabytes": sum(megabytes(parameter.data) for parameter in model.parameters())}
            try:
                measured = perplexity(model, tokenizer, texts, max_length=256, stride=256, batch_size=1)
                result["perplexity"] = measured["token_perplexity"]
                if not math.isfinite(result["perplexity"]):
                    raise ArithmeticError(f"perplexity is {result['perplexity']}")
            except (NotImplementedError, RuntimeError, TypeError, ArithmeticError) as error:
                result["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
            results[f"{scheme} {implementation}"] = result
            print(scheme, implementation, result, flush=True)
    report = {"versions": {name: version(name) for name in ("torch", "torchao", "transformers")}, "results": results}
    write_text(args.json, json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main)
