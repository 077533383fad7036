# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from pathmoe import PathMoEConfig, PathMoEForCausalLM


@pytest.fixture(scope="session")
def texts():
    """Documents of different lengths, with what trips tokenizers and counters up."""
    return [
        "Short.",
        "  Leading spaces, a tab\t, two\n\nbreaks and trailing space ",
        "Naïve café — 東京 costs 3€.",
        "The quick brown fox jumps over the lazy dog while the other dogs sleep in the warm sun. " * 3,
    ]


@pytest.fixture(scope="session")
def tokenizer(texts):
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size=300, special_tokens=["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def model(tokenizer):
    """A tiny PathMoE whose weights are large enough to make its predictions depend on the context."""
    torch.manual_seed(0)
    config = PathMoEConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        router_block_size=2,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return PathMoEForCausalLM(config).eval()


@pytest.fixture(scope="session")
def model_folder(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
