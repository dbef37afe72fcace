"""The peer: the DLRM of facebookresearch/dlrm in PyTorch, with full tables.

Bottom MLP, one EmbeddingBag per feature with sparse gradients, dot interaction, top MLP, and one SGD over all
of it. Run by peer.py in a process of its own.
"""

import json
import sys
from itertools import pairwise

import numpy as np
import torch

from benchmarks.measure import rotate, turn
from benchmarks.workload import DENSE, Batch, Workload
from robe.config import PRESETS

# It does not matter to a time, and keeps the weights finite with labels that mean nothing.
RATE = 0.01


def mlp(widths: list[int], linear_end: bool) -> torch.nn.Sequential:
    layers = []
    for n_in, n_out in pairwise(widths):
        layers += [torch.nn.Linear(n_in, n_out), torch.nn.ReLU(inplace=True)]
    return torch.nn.Sequential(*(layers[:-1] if linear_end else layers))


def bags(cardinalities: tuple[int, ...], width: int, device: str) -> torch.nn.ModuleList:
    """One EmbeddingBag per feature, with the DLRM's initial weights."""
    tables = (torch.empty(n, width, device=device).uniform_(-(n**-0.5), n**-0.5) for n in cardinalities)
    return torch.nn.ModuleList(
        torch.nn.EmbeddingBag.from_pretrained(table, freeze=False, mode="sum", sparse=True)
        for table in tables
    )


class TorchDLRM(torch.nn.Module):
    def __init__(self, work: Workload, device: str):
        super().__init__()
        preset, width, n = PRESETS[work.preset], work.width, 1 + len(work.cardinalities)
        self.bottom = mlp([DENSE, *preset.bottom, width], linear_end=False).to(device)
        self.top = mlp([width + n * (n - 1) // 2, *preset.top, 1], linear_end=True).to(device)
        self.bags = bags(work.cardinalities, width, device)
        i, j = torch.tril_indices(n, n, -1, device=device)
        self.pairs = i * n + j

    def lookup(self, ids, offsets) -> list[torch.Tensor]:
        return [bag(column, offsets) for bag, column in zip(self.bags, ids, strict=True)]

    def forward(self, dense, ids, offsets):
        """dense (B, 13), ids F times (B,), offsets (B,): every bag holds one id -> logits (B,)."""
        x = self.bottom(dense)
        vectors = torch.stack([x, *self.lookup(ids, offsets)], dim=1)
        products = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1)
        # The original indexes with two arrays, [:, i, j]; one index makes the gradient faster.
        pairs = products.index_select(1, self.pairs)
        return self.top(torch.cat([x, pairs], dim=1))[:, 0]


class Trainer:
    """A model with its optimizers, eager or compiled, at a precision: fp32, tf32 or amp (bfloat16)."""

    def __init__(self, model: TorchDLRM, rate: float, device: str, compiled=False, precision="fp32"):
        self.model, self.device, self.precision = model, device, precision
        self.call = torch.compile(model) if compiled else model
        dense = [*model.bottom.parameters(), *model.top.parameters()]
        self.optimizers = [
            torch.optim.SGD(dense, rate, fused=True),
            torch.optim.SGD(model.bags.parameters(), rate),  # `fused` takes no sparse gradients
        ]
        self.loss = torch.nn.BCEWithLogitsLoss()

    def logits(self, dense, ids, offsets):
        torch.set_float32_matmul_precision("high" if self.precision == "tf32" else "highest")
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "amp"):
            return self.call(dense, ids, offsets)

    def step(self, label, dense, ids, offsets):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.logits(dense, ids, offsets).float(), label)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    @torch.inference_mode()
    def predict(self, label, dense, ids, offsets):
        return self.logits(dense, ids, offsets)

    @torch.inference_mode()
    def lookup(self, label, dense, ids, offsets):
        return torch.stack(self.model.lookup(ids, offsets), dim=1)


def tensors(batch: Batch, device: str) -> tuple:
    """label, dense, ids and offsets as the DLRM takes them."""
    ids = [torch.from_numpy(column.astype(np.int64)).to(device) for column in batch.ids.T]
    label, dense = (torch.from_numpy(part).to(device) for part in batch[:2])
    return label, dense, ids, torch.arange(len(label), device=device)


def jobs(tables: str, table_bytes: float, batches: list[int], variants: list, device: str) -> dict:
    """`BATCH: PyTorch VARIANT: VERB` -> a call on one batch after the other."""
    work = Workload(tables, table_bytes)
    model, calls = TorchDLRM(work, device), {}
    for rows in batches:
        drawn = list(zip(*(tensors(batch, device) for batch in work.draw(rows)), strict=True))
        for compiled, precision in variants:
            trainer = Trainer(model, RATE, device, compiled, precision)
            name = f"{rows}: PyTorch {'compiled' if compiled else 'eager'} {precision}"
            calls[f"{name}: training step"] = rotate(trainer.step, *drawn)
            calls[f"{name}: inference"] = rotate(trainer.predict, *drawn)
        calls[f"{rows}: PyTorch: embedding part"] = rotate(trainer.lookup, *drawn)
    return calls


def main(jobs) -> None:
    """What a peer's process does: tell the names of its jobs, then answer each with the seconds of a turn."""
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings.pop("threads"))
    seconds, on_gpu = settings.pop("seconds"), settings["device"] == "cuda"
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    calls = jobs(**settings)
    print(json.dumps(list(calls)), flush=True)
    for line in sys.stdin:
        print(turn(calls[line.strip()], seconds, synchronize), flush=True)


if __name__ == "__main__":
    main(jobs)
