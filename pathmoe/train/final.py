# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Saves the result of a run as a folder that is ready for the Hub."""

import html
import json
import math
import shutil
from pathlib import Path

import yaml
from accelerate import Accelerator
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from pathmoe.accounting import count_parameters
from pathmoe.files import follow_umask
from pathmoe.train.log import read_metrics
from pathmoe.train.output import set_aside
from pathmoe.train.recipe import Recipe, published


def save_final(
    recipe: Recipe, accelerator: Accelerator, model, tokenizer: PreTrainedTokenizerBase, changes: list[dict]
) -> Path:
    """Writes weights, code, tokenizer, recipe and model card, and replaces `final` when all files are complete.

    Args:
        recipe (`Recipe`): The recipe.
        accelerator (`Accelerator`): The engine.
        model: The trained model, as returned by `prepare`.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        changes (`list[dict]`): The changes of the recipe and of input files on resume, which the model card lists.

    Returns:
        `Path`: The folder `final`.
    """
    folder = Path(recipe.output_dir) / "final"
    partial = folder.with_name(".final.partial")
    if accelerator.is_main_process and partial.exists():
        if (partial / "config.json").is_file():  # a run that was killed wrote this folder, starting with this file
            shutil.rmtree(partial)
        else:
            set_aside(partial)
    accelerator.wait_for_everyone()
    unwrapped = accelerator.unwrap_model(model)
    if recipe.ep_size > 1:
        unwrapped.save_pretrained(partial)
    else:
        state_dict = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            # A tied weight is saved once.
            own = dict(unwrapped.named_parameters()) | dict(unwrapped.named_buffers())
            state_dict = {name: tensor for name, tensor in state_dict.items() if name in own}
            unwrapped.save_pretrained(partial, state_dict=state_dict)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        tokenizer.save_pretrained(partial)
        drop_foreign_code(partial)
        recipe_text = yaml.safe_dump(published(vars(recipe)), sort_keys=False)
        (partial / "recipe.yaml").write_text(recipe_text, encoding="utf-8")
        (partial / "README.md").write_text(model_card(recipe, unwrapped.config, changes), encoding="utf-8")
        follow_umask([file for file in partial.rglob("*") if file.is_file()])
        replace_final(folder, partial)
    accelerator.wait_for_everyone()
    return folder


def replace_final(folder: Path, partial: Path):
    """Replaces the previous result. If the user has edited or added files in it, it is renamed and kept."""
    if not folder.exists():
        partial.rename(folder)
        return
    written = {file.name for file in partial.iterdir()}
    # `save_final` writes the model card right after recipe.yaml, and all other files before it.
    saved = (folder / "recipe.yaml").stat().st_mtime if (folder / "recipe.yaml").exists() else 0
    foreign = [
        file
        for file in folder.iterdir()
        if file.stat().st_mtime > saved + 2 or (file.name not in written and ".safetensors" not in file.name)
    ]
    old = set_aside(folder)
    partial.rename(folder)
    if not foreign:
        shutil.rmtree(old)


def drop_foreign_code(folder: Path):
    """Removes references to code outside the folder, such as a tokenizer's `auto_map`.

    Users who trust this folder with `trust_remote_code` must not run code from elsewhere.
    """
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        file = folder / name
        fields = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        foreign = {"custom_generate"} & set(fields)
        own = {
            key: value
            for key, value in fields.get("auto_map", {}).items()
            if isinstance(value, str) and (folder / f"{value.split('.')[0]}.py").is_file()
        }
        if foreign or own != fields.get("auto_map", {}):
            kept = {key: value for key, value in fields.items() if key not in foreign | {"auto_map"}}
            kept |= {"auto_map": own} if own else {}
            file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def model_card(recipe: Recipe, config: PreTrainedConfig, changes: list[dict], evaluated: str = "") -> str:
    """Formats the model card: how to load the model, how it was trained, and its metrics.

    Args:
        recipe (`Recipe`): The recipe.
        config (`PreTrainedConfig`): The model's configuration.
        changes (`list[dict]`): The changes of the recipe and of input files on resume.
        evaluated (`str`, defaults to `""`): A table of the results of evaluations after the training.
    """
    metrics = read_metrics(Path(recipe.output_dir) / "metrics.jsonl")
    trained = ([m for m in metrics if "loss" in m] or [{"tokens": 0, "loss": math.nan}])[-1]
    last = [m for m in metrics if "eval_loss" in m][-1]
    count = count_parameters(config)
    ours = config.model_type == "pathmoe"
    blocks = f", router block size {config.router_block_size}" if ours else ""
    trust = ", trust_remote_code=True" if ours else ""
    note = "With the `pathmoe` package imported, `trust_remote_code` is not needed.\n\n" if ours else ""
    changed = "".join(
        f"- from step {change['step'] + 1}: {change['field']} = {change['after']!r} (before: {change['before']!r})\n"
        for change in published({"changes": changes})["changes"]
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [{config.model_type}, mixture-of-experts]
---
# {html.escape(" ".join(Path(recipe.output_dir).resolve().name.split()))}

A {config.model_type} language model ({count["total"]:,} parameters, {count["active"]:,} active per token{blocks}).

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER_OR_REPOSITORY"{trust})
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER_OR_REPOSITORY")
```

{note}| measured | |
|---|---|
| tokens trained on | {trained["tokens"]:,} |
| training loss, last step | {trained["loss"]:.4f} |
| validation loss | {last["eval_loss"]:.4f} |
| validation perplexity (per token) | {last["eval_perplexity"]:.2f} |

{evaluated and f"{evaluated}{chr(10) * 2}"}Trained with this recipe (`recipe.yaml`):

```yaml
{yaml.safe_dump(published(vars(recipe)), sort_keys=False).strip()}
```
{f"{chr(10)}Changed when the run was resumed:{chr(10)}{chr(10)}{changed}" if changed else ""}"""
