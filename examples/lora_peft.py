# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""LoRA on attention and experts of a PathMoE, its routers trained in full, with PEFT; then merged into one checkpoint.

    python examples/lora_peft.py --model runs/quickstart/final --text runs/quickstart/data/validation.jsonl \
        --output_dir runs/lora --max_steps 20 --learning_rate 1e-3 --logging_steps 1

The adapter goes to OUTPUT_DIR and the merged model, which needs no PEFT, to OUTPUT_DIR/merged.
"""

from dataclasses import dataclass
from pathlib import Path

from datasets import load_dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from pathmoe import PathMoECallback  # importing it also registers PathMoE


@dataclass
class Arguments:
    """What to train, and on what.

    Args:
        model (`str`): Checkpoint to start from.
        text (`str`): A .jsonl file with a column `text`.
        max_length (`int`): Tokens of a document after which it is cut.
        rank (`int`): Rank of the adapters.
    """

    model: str
    text: str
    max_length: int = 512
    rank: int = 8


def main(argv: list[str] | None = None) -> Trainer:
    """Trains, saves the adapter, merges it and saves the model; gives the trainer."""
    args, training_args = HfArgumentParser((Arguments, TrainingArguments)).parse_args_into_dataclasses(argv)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = load_dataset("json", data_files=args.text, split="train")
    tokens = text.map(
        lambda rows: tokenizer(rows["text"], truncation=True, max_length=args.max_length),
        batched=True,
        remove_columns=text.column_names,
    )
    set_seed(training_args.seed)  # of the adapters' first weights
    model = AutoModelForCausalLM.from_pretrained(args.model)
    lora = LoraConfig(
        r=args.rank,
        lora_alpha=2 * args.rank,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        # The experts are 3-D parameters, not linear layers.
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        # Routers are small: they are trained whole. A bare "0" would name layer 0 as well.
        modules_to_save=[f"routers.{block}" for block in model.model.routers],
        task_type="CAUSAL_LM",
    )
    trainer = Trainer(
        get_peft_model(model, lora),
        training_args,
        train_dataset=tokens,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    trainer.add_callback(PathMoECallback(trainer))
    trainer.train()
    trainer.save_model()

    merged = AutoPeftModelForCausalLM.from_pretrained(training_args.output_dir).merge_and_unload()
    merged.save_pretrained(Path(training_args.output_dir) / "merged")
    tokenizer.save_pretrained(Path(training_args.output_dir) / "merged")
    return trainer


if __name__ == "__main__":
    main()
