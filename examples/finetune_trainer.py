# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Trains all weights of a PathMoE on text with transformers' Trainer.

    python examples/finetune_trainer.py --model runs/quickstart/final --text runs/quickstart/data/validation.jsonl \
        --output_dir runs/finetuned --max_steps 20 --learning_rate 1e-3 --logging_steps 1

All options of `TrainingArguments` are options here, and the logs include the routing. No auxiliary loss is added
unless the checkpoint's configuration has a coefficient for one.
"""

from dataclasses import dataclass

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

from pathmoe import PathMoECallback  # importing it also registers PathMoE


@dataclass
class Arguments:
    """What to train, and on what.

    Args:
        model (`str`): Checkpoint to start from.
        text (`str`): A .jsonl file with a column `text`.
        max_length (`int`): Tokens of a document after which it is cut.
    """

    model: str
    text: str
    max_length: int = 512


def main(argv: list[str] | None = None) -> Trainer:
    """Trains and saves; gives the trainer."""
    args, training_args = HfArgumentParser((Arguments, TrainingArguments)).parse_args_into_dataclasses(argv)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = load_dataset("json", data_files=args.text, split="train")
    tokens = text.map(
        lambda rows: tokenizer(rows["text"], truncation=True, max_length=args.max_length),
        batched=True,
        remove_columns=text.column_names,
    )
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(args.model),
        training_args,
        train_dataset=tokens,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    trainer.add_callback(PathMoECallback(trainer))
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
