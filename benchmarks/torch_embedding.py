"""Peers of the look-up and its update in PyTorch: EmbeddingBags over a full table, and the published ROBE; on
a GPU also FBGEMM's batch of tables, where fbgemm_gpu is installed.

Run by peer.py in a process of its own.
"""

import importlib

import numpy as np
import torch

from benchmarks.measure import rotate
from benchmarks.torch_dlrm import main
from benchmarks.workload import Workload

RATE = 0.01


def tokens(work: Workload, ids: np.ndarray) -> np.ndarray:
    """ids (B, F) -> rows (B, F) int64 of one table that holds all tables one after the other."""
    return np.cumsum((0, *work.cardinalities[:-1])) + ids.astype(np.int64)


def update(optimizer: torch.optim.Optimizer, looked_up: torch.Tensor, gradient: torch.Tensor) -> None:
    """Backward from the gradient of what was looked up, and a step."""
    optimizer.zero_grad(set_to_none=True)
    looked_up.backward(gradient, retain_graph=True)
    optimizer.step()


class PublishedRobe:
    """The published formulation: an index tensor of every element, gather, scatter_add_ to a dense gradient.

    memory (M,); Z divides D; no sign, not circular, with the coefficients of the published code.
    """

    def __init__(self, memory: torch.Tensor, width: int, block: int):
        c, b, a = np.random.RandomState(1024).randint(0, 2038074743, 50)[:3]
        self.a, self.b, self.c = int(a), int(b), int(c)
        self.memory = memory.requires_grad_()
        self.starts = len(memory) - block + 1
        self.chunks = torch.arange(width // block, device=memory.device)
        self.offsets = torch.arange(block, device=memory.device)
        self.optimizer = torch.optim.SGD([self.memory], RATE, fused=True)

    def slots(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (N,) -> (N * D,)"""
        start = (tokens[:, None] * self.a + self.chunks * self.b + self.c) % 2038074743 % self.starts
        return (start[:, :, None] + self.offsets).flatten()

    def lookup(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.memory.gather(0, self.slots(tokens))


class Bags:
    """EmbeddingBags over the pieces of one table, one bag per id, their outputs stacked; SGD."""

    def __init__(self, tables: list[torch.Tensor], sparse: bool):
        make = torch.nn.EmbeddingBag.from_pretrained
        self.bags = torch.nn.ModuleList(make(t, freeze=False, mode="sum", sparse=sparse) for t in tables)
        # `fused` takes no sparse gradients.
        self.optimizer = torch.optim.SGD(self.bags.parameters(), RATE, fused=not sparse)

    def lookup(self, columns: list[torch.Tensor], offsets: torch.Tensor) -> torch.Tensor:
        """columns: the rows each table is asked for; one bag's output needs no stack."""
        found = [bag(rows, offsets) for bag, rows in zip(self.bags, columns, strict=True)]
        return torch.stack(found, dim=1) if len(found) > 1 else found[0]


def fbgemm(device: str) -> bool:
    """Whether FBGEMM's kernels can be measured: on a GPU, if it is of a build that loads."""
    try:
        return device == "cuda" and importlib.import_module("fbgemm_gpu") is not None
    except Exception:  # of whatever library it misses
        return False


class Fbgemm:
    """Tables of FBGEMM, looked up by one kernel and stepped by another in the backward pass; SGD.

    weights: of all tables, one after the other.
    """

    def __init__(self, cardinalities: tuple[int, ...], width: int):
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )

        where = EmbeddingLocation.DEVICE, ComputeDevice.CUDA
        self.tables = SplitTableBatchedEmbeddingBagsCodegen(
            [(rows, width, *where) for rows in cardinalities],
            optimizer=EmbOptimType.EXACT_SGD,
            learning_rate=RATE,
        )
        self.weights = self.tables.weights_dev.detach()
        self.weights.uniform_(-0.01, 0.01)
        self.optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], RATE)  # has nothing left to do

    @staticmethod
    def arguments(columns: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of each table -> all of them, table by table, and where each bag of one begins."""
        rows = torch.cat(list(columns))
        return rows, torch.arange(rows.numel() + 1, device=rows.device)

    def lookup(self, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """-> (B, F * D)"""
        return self.tables(rows, offsets)


def jobs(tables: str, table_bytes: float, rows: int, arrays: list, device: str) -> dict:
    """Name -> a call on one batch after the other. arrays: (megabytes, block) of the published ROBE."""
    work, small = Workload(tables, table_bytes), Workload(tables, table_bytes / 10)
    batches = [batch.ids for batch in work.draw(rows)]
    flat = [to_device(tokens(work, ids).ravel(), device) for ids in batches]
    small_flat = [to_device(tokens(small, batch.ids).ravel(), device) for batch in small.draw(rows)]
    columns = [[to_device(column.astype(np.int64), device) for column in ids.T] for ids in batches]
    every, offsets = (torch.arange(count, device=device) for count in (flat[0].numel(), rows))
    gradient = torch.randn(rows, len(columns[0]), work.width, device=device)
    table = torch.empty(sum(work.cardinalities), work.width, device=device).uniform_(-0.01, 0.01)
    # A dense gradient is as large as its table, so that table is a tenth.
    few = torch.empty(sum(small.cardinalities), work.width, device=device).uniform_(-0.01, 0.01)
    calls = {}

    def add(name: str, subject, rotation: list[tuple], d_looked_up: torch.Tensor) -> None:
        kept = [subject.lookup(*arguments) for arguments in rotation[:2]]
        lookup = torch.inference_mode()(subject.lookup)
        calls[f"{name} lookup"] = rotate(lambda arguments: lookup(*arguments), rotation)
        calls[f"{name} update"] = rotate(
            lambda looked_up: update(subject.optimizer, looked_up, d_looked_up), kept
        )

    one, few = Bags([table], sparse=True), Bags([few], sparse=False)
    add("one EmbeddingBag", one, [([f], every) for f in flat], gradient.flatten(0, 1))
    add("one EmbeddingBag, dense gradient", few, [([f], every) for f in small_flat], gradient.flatten(0, 1))
    bags = Bags(table.split(work.cardinalities), sparse=True)
    add("26 EmbeddingBags", bags, [(c, offsets) for c in columns], gradient)
    if fbgemm(device):
        tbe = Fbgemm(work.cardinalities, work.width)
        add("FBGEMM TBE", tbe, [tbe.arguments(c) for c in columns], gradient.flatten(1))
    for megabytes, block in arrays:
        robe = PublishedRobe(torch.randn(int(megabytes * 1e6 / 4), device=device), work.width, block)
        name = f"published ROBE {megabytes:g} MB Z={block}"
        add(name, robe, [(f,) for f in flat], gradient.flatten())
    return calls


def to_device(array: np.ndarray, device: str) -> torch.Tensor:
    return torch.from_numpy(array).to(device)


if __name__ == "__main__":
    main(jobs)
