"""The peer of benchmarks/ranks.py: the DLRM of torch_dlrm.py under DistributedDataParallel, by gloo.

    tables           full tables in one; their gradients are gathered with their rows, which are then
                     stepped in place
    published ROBE   the array of torch_embedding.py, whose dense gradient is added up with the others

Sparse gradients of EmbeddingBags, which it exchanges table by table, are not measured: processes of torch
2.13 crashed in them. Dense ones would be as large as the tables.

Run by ranks.py, one process for each rank, or one without any exchange. It speaks the protocol of peer.py.
"""

import json
import sys
import time
from datetime import timedelta

import torch
from torch.nn.parallel import DistributedDataParallel

from benchmarks.torch_dlrm import RATE, TorchDLRM, tensors
from benchmarks.torch_embedding import PublishedRobe
from benchmarks.workload import Batch, Workload

PATIENCE = timedelta(minutes=10)  # in which a rank may wait for the others


class OfVectors(TorchDLRM):
    """The DLRM without tables, from vectors that were looked up."""

    def __init__(self, work: Workload):
        super().__init__(Workload(work.tables, 1e6), "cpu")
        del self.bags, self.table
        self.base = torch.tensor((0, *work.cardinalities[:-1])).cumsum(0)

    def rows(self, ids):
        """ids (F, B) -> (B * F,) rows of one table that holds all tables one after the other."""
        return (ids + self.base[:, None]).T.flatten()

    def forward(self, dense, vectors):
        return self.of_vectors(dense, vectors)


class OfArray(OfVectors):
    """The same, with vectors from an array."""

    def __init__(self, work: Workload, weights: int, block: int):
        super().__init__(work)
        bound = (len(work.cardinalities) / sum(work.cardinalities)) ** 0.5  # as ours begins
        self.memory = torch.nn.Parameter(torch.empty(weights).uniform_(-bound, bound))
        self.robe, self.width = PublishedRobe(self.memory, work.width, block), work.width

    def forward(self, dense, ids):
        vectors = self.robe.lookup(self.rows(ids))
        return self.of_vectors(dense, vectors.view(len(dense), -1, self.width))


def shared(model: torch.nn.Module, ranks: int) -> torch.nn.Module:
    return DistributedDataParallel(model) if ranks > 1 else model


def by_array(work: Workload, weights: int, block: int, ranks: int):
    """Forward and backward pass of a batch, and the dense parameters."""
    model, loss = OfArray(work, weights, block), torch.nn.BCEWithLogitsLoss()
    call = shared(model, ranks)

    def gradients(label, dense, ids, offsets) -> None:
        loss(call(dense, ids), label).backward()

    return gradients, model.parameters()


def by_tables(work: Workload, ranks: int):
    """The same, with a step of the tables."""
    model, loss = OfVectors(work), torch.nn.BCEWithLogitsLoss()
    call, table = shared(model, ranks), torch.empty(sum(work.cardinalities), work.width)
    table.uniform_(-0.01, 0.01)

    def gradients(label, dense, ids, offsets) -> None:
        rows = model.rows(ids)
        vectors = table.index_select(0, rows).requires_grad_()
        loss(call(dense, vectors.view(len(dense), -1, work.width)), label).backward()
        own = rows, vectors.grad
        for touched, gradient in zip(*map(gathered, own), strict=True) if ranks > 1 else [own]:
            table.index_add_(0, touched, gradient, alpha=-RATE / ranks)

    return gradients, model.parameters()


def gathered(tensor: torch.Tensor) -> list[torch.Tensor]:
    """That of each rank."""
    found = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(found, tensor)
    return found


def steps(gradients, parameters, batches: list, count: int, ranks: int):
    """A call that makes a step unmeasured and then `count`; it returns the seconds of one."""
    optimizer, turns = torch.optim.SGD(parameters, RATE, fused=True), 0

    def turn() -> float:
        nonlocal turns
        for number in range(1 + count):
            if number == 1:
                if ranks > 1:
                    torch.distributed.barrier()
                start = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            gradients(*batches[turns % len(batches)])
            optimizer.step()
            turns += 1
        if ranks > 1:
            torch.distributed.barrier()
        return (time.perf_counter() - start) / count

    return turn


def main(settings: str) -> None:
    told = json.loads(settings)
    rank, ranks, count, batch = (told[name] for name in ("rank", "ranks", "count", "batch"))
    torch.set_num_threads(1)
    if ranks > 1:
        where = f"tcp://127.0.0.1:{told['port']}"
        torch.distributed.init_process_group("gloo", where, rank=rank, world_size=ranks, timeout=PATIENCE)
    torch.manual_seed(0)

    def drawn(work: Workload) -> list:
        part = slice(batch * rank // ranks, batch * (rank + 1) // ranks)
        return [tensors(Batch(*(array[part] for array in each)), "cpu") for each in work.draw(batch)]

    tables, whole = (Workload(told["preset"], told[name]) for name in ("peer_bytes", "table_bytes"))
    array = by_array(whole, int(told["megabytes"] * 1e6 / 4), told["block"], ranks)
    calls = {
        "tables": steps(*by_tables(tables, ranks), drawn(tables), count, ranks),
        "published ROBE": steps(*array, drawn(whole), 1, ranks),
    }
    print(json.dumps(list(calls)), flush=True)
    for line in sys.stdin:
        print(json.dumps(calls[line.strip()]()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
