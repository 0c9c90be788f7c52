"""A tensor-parallel group in this process: a thread for each rank, gloo between them."""

from concurrent.futures import ThreadPoolExecutor

import torch

from gpu_worker.layers.ranks import join_group

CPU = torch.device("cpu")


def in_group(size, folder, work):
    """What `work(ranks)` returns on each rank."""

    def run(rank):
        return work(join_group(rank, size, CPU, folder / "store"))

    with ThreadPoolExecutor(size) as pool:
        results = [pool.submit(run, rank) for rank in range(size)]
        return [result.result() for result in results]
