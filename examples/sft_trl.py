# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Supervised fine-tuning of a PathMoE on conversations with TRL's SFTTrainer.

    python examples/sft_trl.py --model runs/quickstart/final --conversations chats.jsonl --output_dir runs/sft \
        --packing true --max_length 512 --max_steps 20 --logging_steps 1

A line of the file is `{"prompt": [{"role": "user", "content": "…"}], "completion": [{"role": "assistant", …}]}`: the
loss is that of the completion alone. All options of `SFTConfig` are options here. A tokenizer without a chat template
gets ChatML, which is saved with the model.

TRL computes the loss itself. Where an auxiliary loss is asked for (`--router_aux_loss_coef`), it is that of
transformers, which pools the layers; checkpoints with a router z-loss, which TRL would leave out, are refused. The
callback updates a selection bias and adds the routing to the logs.
"""

from dataclasses import dataclass

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import SFTConfig, SFTTrainer

from pathmoe import PathMoECallback  # importing it also registers PathMoE


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class Arguments:
    """What to train, and on what.

    Args:
        model (`str`): Checkpoint to start from.
        conversations (`str`): A .jsonl file with the columns `prompt` and `completion`, or `messages`.
    """

    model: str
    conversations: str


def main(argv: list[str] | None = None) -> SFTTrainer:
    """Trains and saves; gives the trainer."""
    args, config = HfArgumentParser((Arguments, SFTConfig)).parse_args_into_dataclasses(argv)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.chat_template = tokenizer.chat_template or CHATML
    model = AutoModelForCausalLM.from_pretrained(args.model)
    if model.config.router_z_loss_coef:
        raise ValueError(
            f"router_z_loss_coef={model.config.router_z_loss_coef}: TRL computes the loss without the model's own and "
            "would leave it out. Set it to 0 in config.json, or train with finetune_trainer.py or train_accelerate.py."
        )
    trainer = SFTTrainer(
        model,
        config,
        train_dataset=load_dataset("json", data_files=args.conversations, split="train"),
        processing_class=tokenizer,
    )
    trainer.add_callback(PathMoECallback(trainer))
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
