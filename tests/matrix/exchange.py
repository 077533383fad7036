# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Writes tiny checkpoints with their logits and text, or loads such checkpoints and compares; run by `run.py`.

python exchange.py write FOLDER
python exchange.py read package|code FOLDER [FOLDER …]
"""

import json
import sys
from pathlib import Path

import torch


SIZES = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2,
    "max_position_embeddings": 128, "router_block_size": 2, "initializer_range": 0.2,
}  # fmt: skip
VARIANTS = {
    "linear": {},
    "cosine": {"router_type": "cosine"},
    "recurrent": {"router_type": "recurrent"},
    "low rank": {"router_type": "low_rank"},
    "decision": {"router_sharing": "decision"},
    "Llama attention": {"qk_norm": False},
    "OLMoE attention": {"qk_norm": "full"},
    "tied": {"tie_word_embeddings": True},
    "selection bias": {"router_bias_update_rate": 0.1},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                                 "original_max_position_embeddings": 32}},
}  # fmt: skip
IDS = torch.arange(24).view(2, 12) * 7 % 97 + 1
GREEDY = {"do_sample": False, "max_new_tokens": 16, "pad_token_id": 0}


@torch.no_grad()
def results(model) -> dict[str, torch.Tensor]:
    """Logits and greedy text of a model, the text with a cache and without."""
    return {
        "logits": model(IDS, use_cache=False).logits,
        "text": model.generate(IDS, **GREEDY),
        "text without cache": model.generate(IDS, use_cache=False, **GREEDY),
    }


def write(folder: Path):
    from modeling_pathmoe import PathMoEConfig, PathMoEForCausalLM

    for name, fields in VARIANTS.items():
        torch.manual_seed(0)
        model = PathMoEForCausalLM(PathMoEConfig(**SIZES | fields)).eval()
        for router in model.model.routers.values():
            if router.selection_bias is not None:
                router.selection_bias.normal_()
        model.save_pretrained(folder / name)
        torch.save(results(model), folder / name / "results.pt")


def read(folder: Path, **kwargs) -> dict[str, str]:
    """For each variant, the largest difference of the logits, or what is wrong."""
    from transformers import AutoModelForCausalLM

    found = {}
    for name in VARIANTS:
        expected = torch.load(folder / name / "results.pt")
        try:
            actual = results(AutoModelForCausalLM.from_pretrained(folder / name, **kwargs).eval())
        except Exception as error:  # whatever goes wrong is a result
            found[name] = f"FAILED: {type(error).__name__}: {error}"
            continue
        difference = (actual["logits"] - expected["logits"]).abs().max().item()
        texts = [run[key] for run in (actual, expected) for key in ("text", "text without cache")]
        same = all(torch.equal(text, texts[0]) for text in texts)
        # float32, some hundred terms
        right = same and difference <= 1e-5 * expected["logits"].abs().max().item()
        found[name] = f"{difference:.0e}" if right else f"FAILED: logits {difference:.0e}, same text: {same}"
    return found


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]))
    elif sys.argv[2] == "package":
        import pathmoe  # noqa: F401

        print(json.dumps({folder: read(Path(folder)) for folder in sys.argv[3:]}))
    else:
        sys.modules["modeling_pathmoe"] = sys.modules["pathmoe"] = None  # as if it were not installed
        print(json.dumps({folder: read(Path(folder), trust_remote_code=True) for folder in sys.argv[3:]}))
