# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""One process of a parallel training, which tests/test_distributed.py compares with the same training alone.

    accelerate launch --config_file configs/accelerate/ddp.yaml -m tests.distributed_worker ddp FOLDER

The folder holds a model and rows.pt, and gets STRATEGY.pt: losses, norms of the gradients, weights.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import stackformer  # noqa: F401  (importing it registers the Auto classes)
from stackformer.training.long_context_trainer import LongContextArguments, LongContextTrainer
from stackformer.training.trainer import StackformerTrainer


def train(folder: Path, strategy: str, batch_size: int, **arguments) -> dict[str, Any]:
    """Train the model in `folder` on its rows, in their order, and return what happened."""
    defaults = {
        "output_dir": str(folder / strategy),
        "max_steps": 4,
        "train_sampling_strategy": "sequential",
        "optim": "sgd",  # its steps are the gradients: Adam's would hide a wrong factor
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "save_only_model": strategy == "native",  # transformers demands it
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    resume = arguments.pop("resume_from_checkpoint", None)
    evaluate_first = arguments.pop("evaluate_first", False)
    ours = arguments.pop("stackformer_trainer", False)
    trainer_class, arguments_class = StackformerTrainer if ours else Trainer, TrainingArguments
    if "context_length" in arguments:
        trainer_class, arguments_class = LongContextTrainer, LongContextArguments
    args = arguments_class(**(defaults | {"per_device_train_batch_size": batch_size} | arguments))
    options = {}
    if strategy == "fsdp2":
        # Accelerate shards only where it found GPUs (AcceleratorState.__init__), though the code behind that
        # runs on CPUs as well.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    elif strategy == "native":
        from transformers.distributed import DistributedConfig  # not in every transformers that is supported

        options["distributed_config"] = DistributedConfig(fsdp_size=2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options)
    documents = torch.load(folder / "rows.pt")
    trainer = trainer_class(model, args, train_dataset=documents)
    if evaluate_first:
        trainer.evaluate(documents)
    trainer.train(resume_from_checkpoint=resume)
    if strategy == "native":
        trainer.save_model(str(folder / "saved"))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    return {
        "losses": [entry["loss"] for entry in logs],
        "grad_norms": [entry["grad_norm"] for entry in logs],
        "weights": get_model_state_dict(
            model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        ),
        "sharded": sum(type(module).__name__ == "FSDPStackformerCoreLayer" for module in model.modules()),
        "processes": trainer.accelerator.num_processes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("strategy", choices=["ddp", "fsdp2", "native", "deepspeed"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arguments", type=json.loads, default={}, help="more TrainingArguments, as JSON")
    options = parser.parse_args()
    result = train(options.folder, options.strategy, **{"batch_size": 2, **options.arguments})
    if torch.distributed.get_rank() == 0:
        torch.save(result, options.folder / f"{options.strategy}.pt")
    torch.distributed.barrier()  # a process that leaves while the other still talks to it may abort
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
