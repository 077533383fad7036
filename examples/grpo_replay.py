# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Reinforcement learning with TRL's GRPO, in which the trainer replays the routing of the sampler.

    python examples/grpo_replay.py --model runs/quickstart/final --prompts prompts.jsonl --output_dir runs/grpo \
        --max_steps 10 --per_device_train_batch_size 8 --num_generations 4 --max_completion_length 32 --logging_steps 1

A server samples in a lower precision, or with other kernels, than the trainer computes in. Near a tie, a router then
chooses other experts, and the probability of a token jumps. If the trainer replays the experts that the sampler has
recorded, what is left is the difference in arithmetic. Routers still get gradients, through the weights of these
experts. In the logs, `replay/logp_difference` is the mean of |log p of the trainer - log p of the sampler| over the
sampled tokens, with replay (`--replay true`, the default) or without.

The sampler here is a copy of the model in `--sampler_dtype`. For a server, call `PathTrace.from_experts` on what it
returns, such as vLLM's `routed_experts`. A line of the file of prompts is `{"prompt": "…"}`. The reward is a toy: the
share of the letter e. All options of `GRPOConfig` are options here.
"""

import copy
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import GRPOConfig, GRPOTrainer

from pathmoe import PathMoECallback, PathTrace, record_paths, replay_paths


@dataclass
class Arguments:
    """What to train, and on what.

    Args:
        model (`str`): Checkpoint to start from.
        prompts (`str`): A .jsonl file with a column `prompt`.
        replay (`bool`): Whether the trainer uses the experts that the sampler has chosen.
        sampler_dtype (`str`): Precision of the sampler.
    """

    model: str
    prompts: str
    replay: bool = True
    sampler_dtype: str = "bfloat16"


class ReplayGRPOTrainer(GRPOTrainer):
    """GRPO whose samples come from a copy of the model, with the routing of the copy.

    Args:
        replay (`bool`): Whether to replay the routing in training.
        sampler_dtype (`torch.dtype`): Precision of the copy.
    """

    def __init__(self, model, *, replay: bool, sampler_dtype: torch.dtype, **kwargs):
        self.replay, self.sampler = replay, copy.deepcopy(model).to(sampler_dtype)  # before TRL wraps the model
        self.recorded: dict[tuple[int, ...], torch.Tensor] = {}  # experts (T, L, k) by the tokens of a sample
        super().__init__(model, rollout_func=self.sample, **kwargs)

    @torch.no_grad()
    def sample(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, list]:
        """Samples a completion for each prompt and records its routing."""
        self.sampler.load_state_dict(self.model.state_dict())
        inputs = self.processing_class(prompts, return_tensors="pt", padding=True, padding_side="left")
        with record_paths(self.sampler.eval()) as trace:
            output = self.sampler.generate(
                **inputs.to(self.sampler.device),
                max_new_tokens=self.max_completion_length,
                do_sample=True,
                temperature=self.temperature,
                top_k=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        logps = (torch.stack(output.logits, dim=1).float() / self.temperature).log_softmax(dim=-1)
        chosen = output.sequences[:, inputs.input_ids.shape[1] :]
        logps = logps.gather(-1, chosen[:, :, None])[:, :, 0]
        result: dict[str, list] = {"prompt_ids": [], "completion_ids": [], "logprobs": []}
        recorded, sequence_ids = trace.experts, trace.sequence_ids
        self.recorded.clear()
        for row, tokens in enumerate(chosen.tolist()):
            end = self.processing_class.eos_token_id
            length = tokens.index(end) + 1 if end in tokens else len(tokens)
            prompt = inputs.input_ids[row][inputs.attention_mask[row] == 1].tolist()
            result["prompt_ids"].append(prompt)
            result["completion_ids"].append(tokens[:length])
            result["logprobs"].append(logps[row, :length].tolist())
            experts = recorded[sequence_ids == row][: len(prompt) + length]
            if len(experts) < len(prompt) + length:  # the last token passed through no layer, and nothing follows it
                experts = torch.cat([experts, torch.arange(experts.shape[2]).expand_as(experts[:1]).to(experts)])
            self.recorded[tuple(prompt + tokens[:length])] = experts
        return result

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, *args, **kwargs):
        replaying = nullcontext()
        if self.replay and model is not self.ref_model:
            rows = [row[mask == 1].tolist() for row, mask in zip(input_ids, attention_mask)]
            trace = PathTrace.from_experts([self.recorded[tuple(row)] for row in rows], rows, self.model)
            replaying = replay_paths(self.model, trace, check_routers=False)
        with replaying:
            result = super()._get_per_token_logps_and_entropies(model, input_ids, attention_mask, *args, **kwargs)
        self.logps = result[0].detach()
        return result

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        differences = (self.logps - inputs["sampling_per_token_logps"]).abs()[inputs["completion_mask"] == 1]
        self._metrics["train"]["replay/logp_difference"].append(differences.mean().item())
        self._metrics["train"]["replay/logp_difference_max"].append(differences.max().item())
        return loss


def share_of_e(completions: list[str], **kwargs) -> list[float]:
    return [text.count("e") / max(len(text), 1) for text in completions]


def main(argv: list[str] | None = None) -> ReplayGRPOTrainer:
    """Trains and saves; gives the trainer."""
    args, config = HfArgumentParser((Arguments, GRPOConfig)).parse_args_into_dataclasses(argv)
    trainer = ReplayGRPOTrainer(
        AutoModelForCausalLM.from_pretrained(args.model),
        replay=args.replay,
        sampler_dtype=getattr(torch, args.sampler_dtype),
        reward_funcs=share_of_e,
        args=config,
        train_dataset=load_dataset("json", data_files=args.prompts, split="train"),
        processing_class=AutoTokenizer.from_pretrained(args.model),
    )
    trainer.add_callback(PathMoECallback(trainer))
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
