"""The peer: the DLRM of facebookresearch/dlrm in PyTorch, with full tables.

Bottom MLP, one EmbeddingBag per feature with sparse gradients, dot interaction, top MLP, and one SGD over all
of it. On a GPU also with a CUDA graph of the whole step, for which rows are stepped in place. Run by peer.py
in a process of its own.
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


def bags(table: torch.Tensor, cardinalities: tuple[int, ...]) -> torch.nn.ModuleList:
    """One EmbeddingBag per feature, of the rows of one table, with the DLRM's initial weights."""
    return torch.nn.ModuleList(
        torch.nn.EmbeddingBag.from_pretrained(
            rows.uniform_(-(len(rows) ** -0.5), len(rows) ** -0.5), freeze=False, mode="sum", sparse=True
        )
        for rows in table.split(cardinalities)
    )


class TorchDLRM(torch.nn.Module):
    def __init__(self, work: Workload, device: str):
        super().__init__()
        preset, width, n = PRESETS[work.preset], work.width, 1 + len(work.cardinalities)
        self.bottom = mlp([DENSE, *preset.bottom, width], linear_end=False).to(device)
        self.top = mlp([width + n * (n - 1) // 2, *preset.top, 1], linear_end=True).to(device)
        self.table = torch.empty(sum(work.cardinalities), width, device=device)
        self.bags = bags(self.table, work.cardinalities)
        self.base = torch.tensor((0, *work.cardinalities[:-1]), device=device).cumsum(0)
        i, j = torch.tril_indices(n, n, -1, device=device)
        self.pairs = i * n + j

    def lookup(self, ids, offsets) -> list[torch.Tensor]:
        return [bag(column, offsets) for bag, column in zip(self.bags, ids, strict=True)]

    def forward(self, dense, ids, offsets):
        """dense (B, 13), ids F times (B,), offsets (B,): every bag holds one id -> logits (B,)."""
        x = self.bottom(dense)
        return self.interact(x, torch.stack([x, *self.lookup(ids, offsets)], dim=1))

    def of_vectors(self, dense, vectors):
        """dense (B, 13), vectors (B, F, D) that were looked up -> logits (B,)."""
        x = self.bottom(dense)
        return self.interact(x, torch.cat([x[:, None], vectors], dim=1))

    def interact(self, x, vectors):
        products = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1)
        # The original indexes with two arrays, [:, i, j]; one index makes the gradient faster.
        pairs = products.index_select(1, self.pairs)
        return self.top(torch.cat([x, pairs], dim=1))[:, 0]


class Trainer:
    """A model with its optimizers, eager or compiled, at a precision: fp32, tf32 or amp (bfloat16)."""

    def __init__(self, model: TorchDLRM, rate: float, device: str, how="eager", precision="fp32"):
        self.model, self.device, self.precision = model, device, precision
        self.call = torch.compile(model) if how == "compiled" else model
        dense = [*model.bottom.parameters(), *model.top.parameters()]
        self.optimizers = [
            torch.optim.SGD(dense, rate, fused=True),
            torch.optim.SGD(model.bags.parameters(), rate),  # `fused` takes no sparse gradients
        ]
        self.loss = torch.nn.BCEWithLogitsLoss()

    def logits(self, *batch):
        torch.set_float32_matmul_precision("high" if self.precision == "tf32" else "highest")
        with torch.autocast(
            self.device, torch.bfloat16, enabled=self.precision == "amp", cache_enabled=False
        ):
            return self.call(*batch).float()

    def step(self, label, dense, ids, offsets):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.logits(dense, ids, offsets), label)
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


class InPlaceTrainer(Trainer):
    """The same SGD with one look-up in all tables, whose rows are stepped by the gradients of the vectors.

    So nothing is sparse, nothing has a size that the data decide, and no gradient is as large as a table: a
    GPU can be given the whole step as one CUDA graph, captured at the first call; so can the compiler.
    """

    def __init__(self, model: TorchDLRM, rate: float, device: str, how="graph", precision="fp32"):
        super().__init__(model, rate, device, precision=precision)
        compiled = how == "compiled graph"
        self.call = torch.compile(model.of_vectors, dynamic=False) if compiled else model.of_vectors
        self.dense, self.rate = [*model.bottom.parameters(), *model.top.parameters()], rate
        # The embedding bags share the memory, so that this is of the same weights.
        self.table = model.table.detach()
        captured = Captured if device == "cuda" else lambda call: call
        self.step, self.predict = captured(self._step), captured(self._predict)

    def _step(self, label, dense, ids, offsets):
        rows = (ids + self.model.base[:, None]).flatten()
        vectors = self.table.index_select(0, rows).view(*ids.shape, -1).transpose(0, 1).requires_grad_()
        loss = self.loss(self.logits(dense, vectors), label)
        d_vectors, *d_dense = torch.autograd.grad(loss, [vectors, *self.dense])
        with torch.no_grad():
            gradients = d_vectors.transpose(0, 1).flatten(0, 1)
            self.table.index_add_(0, rows, gradients, alpha=-self.rate)
            torch._foreach_add_(self.dense, d_dense, alpha=-self.rate)
        return loss

    @torch.no_grad()
    def _predict(self, label, dense, ids, offsets):
        rows = (ids + self.model.base[:, None]).flatten()
        return self.logits(dense, self.table.index_select(0, rows).view(*ids.shape, -1).transpose(0, 1))


class Captured:
    """A call as one CUDA graph; each batch is copied to where the graph reads."""

    def __init__(self, call):
        self.call, self.graph = call, None

    def __call__(self, *batch):
        if self.graph is None:
            self.inputs = [tensor.clone() for tensor in batch]
            apart = torch.cuda.Stream()
            apart.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(apart):
                for _ in range(3):  # what is compiled or chosen at first is not for the graph
                    self.call(*self.inputs)
            torch.cuda.current_stream().wait_stream(apart)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.result = self.call(*self.inputs)
            self.graph = graph
        for own, tensor in zip(self.inputs, batch, strict=True):
            own.copy_(tensor)
        self.graph.replay()
        return self.result


def trainer(model: TorchDLRM, rate: float, device: str, how: str, precision: str) -> Trainer:
    """how: `eager`, `compiled`, `graph` or `compiled graph`."""
    if "compiled" in how:
        import torch._dynamo

        torch._dynamo.config.recompile_limit = (
            64  # of sizes and modes; beyond it would not compile, in silence
        )
    kind = InPlaceTrainer if "graph" in how else Trainer
    return kind(model, rate, device, how, precision)


def tensors(batch: Batch, device: str) -> tuple:
    """label, dense, ids (F, B) and offsets as the DLRM takes them."""
    ids = torch.from_numpy(np.ascontiguousarray(batch.ids.T, np.int64)).to(device)
    label, dense = (torch.from_numpy(part).to(device) for part in batch[:2])
    return label, dense, ids, torch.arange(len(label), device=device)


def jobs(tables: str, table_bytes: float, batches: list[int], variants: list, device: str) -> dict:
    """`BATCH: PyTorch VARIANT: VERB` -> a call on one batch after the other."""
    work = Workload(tables, table_bytes)
    model, calls = TorchDLRM(work, device), {}
    for rows in batches:
        drawn = list(zip(*(tensors(batch, device) for batch in work.draw(rows)), strict=True))
        for how, precision in variants:
            subject = trainer(model, RATE, device, how, precision)
            calls[f"{rows}: PyTorch {how} {precision}: training step"] = rotate(subject.step, *drawn)
            calls[f"{rows}: PyTorch {how} {precision}: inference"] = rotate(subject.predict, *drawn)
        calls[f"{rows}: PyTorch: embedding part"] = rotate(subject.lookup, *drawn)
    return calls


def main(jobs) -> None:
    """What a peer's process does: tell the names of its jobs, then answer each with the seconds of a turn.

    A job that fails is answered by what it said, in a line.
    """
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings.pop("threads"))
    seconds, on_gpu = settings.pop("seconds"), settings["device"] == "cuda"
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    calls = jobs(**settings)
    print(json.dumps(list(calls)), flush=True)
    for line in sys.stdin:
        try:
            answer = turn(calls[line.strip()], seconds, synchronize)
        except Exception as error:  # of PyTorch's compiler, say, or for want of memory
            answer = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(jobs)
