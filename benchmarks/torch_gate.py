"""Whether the peers compute what we compute: the same weights, the same answers.

    python -m benchmarks.torch_gate [cpu | cuda]

Raises BenchmarkError if not. Runs in a process of its own, since it loads both.
"""

import sys

import numpy as np
import torch

from benchmarks.measure import agree
from benchmarks.torch_dlrm import TorchDLRM, tensors, trainer
from benchmarks.torch_embedding import RATE, Bags, Fbgemm, PublishedRobe, fbgemm, to_device, tokens, update
from benchmarks.workload import Workload
from robe.backend import Backend, select
from robe.config import EmbeddingConfig, ModelConfig, TrainConfig, resolve
from robe.embeddings import ArrayEmbedding, create
from robe.model import DLRM, build

# Some thousands of rows, and a batch with repeated ids.
SMALL = Workload("kaggle", 1e6)
ROWS = 64


def config(embedding: EmbeddingConfig) -> TrainConfig:
    return resolve(TrainConfig(model=ModelConfig(SMALL.preset), embedding=embedding, batch=ROWS))


def copy_weights(model: DLRM, peer: TorchDLRM) -> None:
    """Give a peer the weights of a model with full tables."""
    state = {name: torch.from_numpy(array) for name, array in host_state(model).items()}
    with torch.no_grad():
        for part in ("bottom", "top"):
            layers = [layer for layer in getattr(peer, part) if isinstance(layer, torch.nn.Linear)]
            for i, layer in enumerate(layers):
                layer.weight.copy_(state[f"{part}.{i}.weight"].T)
                layer.bias.copy_(state[f"{part}.{i}.bias"])
        tables = state["embedding.memory"].view(-1, SMALL.width).split(SMALL.cardinalities)
        for bag, table in zip(peer.bags, tables, strict=True):
            bag.weight.copy_(table)


def host_state(model: DLRM) -> dict[str, np.ndarray]:
    return {name: model.backend.to_host(array).copy() for name, array in model.state().items()}


def whole_model(backend: Backend, device: str, how: str) -> None:
    """Logits, loss, and all weights after a step."""
    model, peer = build(config(EmbeddingConfig("full")), SMALL.data(), backend), TorchDLRM(SMALL, device)
    copy_weights(model, peer)
    rate = 0.1
    batch = SMALL.draw(ROWS)[0]
    ours, theirs = tuple(map(backend.to_device, batch)), tensors(batch, device)
    stepping = trainer(peer, rate, device, how, "fp32")
    stepping.step(*theirs)  # some steps are taken until there is a graph
    copy_weights(model, peer)
    logits = backend.to_host(model.predict(*ours[1:]))
    agree("PyTorch DLRM: logits", stepping.predict(*theirs).cpu().numpy(), logits, 1e-5)
    loss = backend.to_host(model.step(*ours, rate)).mean()
    agree("PyTorch DLRM: loss", stepping.step(*theirs).detach().cpu().numpy(), loss, 1e-5)
    copy_weights(model, stepped := TorchDLRM(SMALL, device))
    for (name, found), expected in zip(peer.state_dict().items(), stepped.state_dict().values(), strict=True):
        agree(f"PyTorch DLRM: {name} after a step", found.cpu().numpy(), expected.cpu().numpy(), 1e-5)


def look_ups(backend: Backend, device: str) -> None:
    """Vectors and updated weights of the bags and of the published ROBE."""
    ids = SMALL.draw(ROWS)[0].ids
    gradient = np.random.default_rng(0).standard_normal((*ids.shape, SMALL.width), np.float32)
    rows, d = to_device(tokens(SMALL, ids), device), to_device(gradient, device)
    columns = [to_device(column.astype(np.int64), device) for column in ids.T]
    every, offsets = (torch.arange(count, device=device) for count in (ids.size, ROWS))

    def embedding(settings: EmbeddingConfig) -> tuple[ArrayEmbedding, torch.Tensor]:
        subject = create(config(settings), SMALL.data(), backend)
        return subject, to_device(backend.to_host(subject.memory).copy(), device)

    def compare(
        what: str, subject: ArrayEmbedding, peer, memory: torch.Tensor, arguments, d_looked_up
    ) -> None:
        out = backend.to_device(np.empty_like(gradient))
        subject.lookup(backend.to_device(ids), out)
        looked_up = peer.lookup(*arguments)
        found = looked_up.detach().cpu().numpy().reshape(gradient.shape)
        agree(f"{what}: look-up", found, backend.to_host(out), 0)
        update(peer.optimizer, looked_up, d_looked_up)
        subject.update(backend.to_device(ids), backend.to_device(gradient), RATE)
        agree(f"{what}: update", memory.detach().cpu().numpy(), backend.to_host(subject.memory), 1e-6)

    for sparse in (True, False):
        full, memory = embedding(EmbeddingConfig("full"))
        one = Bags([memory.view(-1, SMALL.width)], sparse)
        compare("one EmbeddingBag", full, one, memory, ([rows.flatten()], every), d.flatten(0, 1))
        full, memory = embedding(EmbeddingConfig("full"))
        bags = Bags(memory.view(-1, SMALL.width).split(SMALL.cardinalities), sparse)
        compare("26 EmbeddingBags", full, bags, memory, (columns, offsets), d)
    if fbgemm(device):
        full, memory = embedding(EmbeddingConfig("full"))
        tbe = Fbgemm(SMALL.cardinalities, SMALL.width)
        tbe.weights.copy_(memory)
        compare("FBGEMM TBE", full, tbe, tbe.weights, tbe.arguments(columns), d.flatten(1))
    published = EmbeddingConfig(weights=1000, block=8, hash="affine", sign=False, hash_seed=1024)
    array, memory = embedding(published)
    robe = PublishedRobe(memory, SMALL.width, published.block)
    compare("published ROBE", array, robe, memory, (rows.flatten(),), d.flatten())


def main(device: str = "cpu") -> None:
    backend = select(device)
    for how in ("eager", "graph"):
        whole_model(backend, device, how)
    look_ups(backend, device)


if __name__ == "__main__":
    main(*sys.argv[1:])
