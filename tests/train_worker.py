# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""scripts.train as one process of several on CPUs, for tests/test_distributed.py.

accelerate launch --config_file configs/accelerate/fsdp2.yaml -m tests.train_worker fsdp2 --config ...
"""

import sys

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from experiments.command_line import run_main
from scripts import train


def main() -> None:
    strategy, *argv = sys.argv[1:]
    check_training = train.check_training

    def shard_on_cpus(args) -> None:
        check_training(args)
        if strategy == "fsdp2":  # see tests/distributed_worker.py
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    train.check_training = shard_on_cpus
    train.main(argv)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_main(main)
