# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Starts the ranks of transformers' distributed mixins: the module of this name is not in its source distribution.

Every rank is a process of its own with a gloo process group on the CPU. Ranks may outnumber the cores.
"""

import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_distributed_backend() -> str:
    return "gloo"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int):
    """A CPU rank has no device of its own to select."""


def _start_rank_processes(fn, args: tuple, nprocs: int):
    """Runs `fn(rank, *args)` in `nprocs` processes; raises what a rank raised."""
    mp.spawn(_one_thread, args=(fn, args), nprocs=nprocs)


def _one_thread(rank, fn, args):
    torch.set_num_threads(1)
    fn(rank, *args)


def run_distributed(world_size: int):
    """Returns a function that runs `fn(rank, *args)` on every rank of a gloo process group.

    Args:
        world_size (`int`): Number of ranks.
    """

    def decorate(fn):
        def run(*args):
            # The parent holds the rendezvous server, so no other run can claim its port while the ranks start.
            store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
            _start_rank_processes(_in_process_group, (fn, args, world_size, store.host, store.port), world_size)

        return run

    return decorate


def _in_process_group(rank, fn, args, world_size, host, port):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR=host, MASTER_PORT=str(port)
    )
    store = dist.TCPStore(host, port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        fn(rank, *args)
    finally:
        dist.destroy_process_group()
