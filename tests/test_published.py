"""Runs that others have published, reproduced to the digits that they print."""

from pathlib import Path

import numpy as np
import pytest
from conftest import EVERY

from robe.backend import select
from robe.bags import Bags
from robe.config import DataSpec, EmbeddingConfig, ModelConfig, OptimizerConfig, TrainConfig, resolve
from robe.model import build

# facebookresearch/dlrm, README: `dlrm_s_pytorch.py --mini-batch-size=2 --data-size=6 --debug-mode` prints the
# losses of its three steps, and the weights after them: tables, then the layers of both MLPs, (out, in).
LOSSES = ("0.451893", "0.402002", "0.275460")
WEIGHTS = (
    [[0.0543, -0.1112], [0.42513, 0.34167], [-0.14283, -0.45679], [-0.19532, -0.10197]],
    [[0.23667, 0.57199], [-0.1666, 0.30285], [0.10751, 0.22124]],
    [[-0.49338, -0.14301], [-0.36664, -0.22164]],
    [
        [0.51313, 0.66663, 0.10591, 0.1309],
        [0.32196, 0.66154, 0.84649, 0.55324],
        [0.85444, 0.38482, 0.31677, 0.35425],
    ],
    [0.17109, 0.82907, 0.33863],
    [[0.55238, 0.57857, 0.52154], [0.00265, 0.98825, 0.90528]],
    [0.20764, 0.29244],
    [
        [0.51996, 0.90184, 0.98368, 0.25752, 0.56436, 0.807, 0.39437, 0.73107],
        [0.16096, 0.60055, 0.86596, 0.98348, 0.07938, 0.42842, 0.20453, 0.45064],
        [0.5476, 0.0931, 0.29701, 0.92752, 0.56902, 0.45752, 0.75351, 0.74187],
        [0.04849, 0.70857, 0.83933, 0.1659, 0.78101, 0.2866, 0.30646, 0.66526],
    ],
    [0.11137, 0.66482, 0.88778, 0.69627],
    [[0.44029, 0.43816, 0.76502, 0.56561], [0.08485, 0.5826, 0.81474, 0.33702]],
    [0.92754, 0.75067],
    [[0.57379, 0.7514]],
    [0.07908],
)


@pytest.mark.parametrize("version", EVERY)
def test_the_debug_run_of_the_dlrm(version):
    """Bags pooled by sum, squared errors, SGD; its numbers come of NumPy's old generator, and so do these."""
    draws, sizes, rate = np.random.RandomState(123), (4, 3, 2), 0.01

    def bag(size):
        count = int(np.round(max(1, draws.random_sample() * size)))
        return np.unique(np.round(draws.random_sample(count) * (size - 1))).astype(np.uint32)

    inputs = []
    for _ in LOSSES:
        dense = draws.rand(2, 4).astype(np.float32)
        first, second = zip(*([bag(size), bag(size)] for size in sizes), strict=True)
        offsets = np.cumsum([0, *map(len, first + second)])
        inputs.append((dense, Bags(np.concatenate(first + second), offsets)))
    labels = [draws.rand(2).astype(np.float32) for _ in LOSSES]
    tables = [draws.uniform(-((1 / n) ** 0.5), (1 / n) ** 0.5, (n, 2)) for n in sizes]

    config = TrainConfig(
        embedding=EmbeddingConfig("full"),
        model=ModelConfig(width=2, bottom=(3,), top=(4, 2)),
        optimizer=OptimizerConfig("sgd", rate),
        batch=2,
        loss="mse",
    )
    data = DataSpec(4, sizes, "dictionary", "", "", pooling=("sum",) * len(sizes))
    model = build(resolve(config), data, select(version))
    model.embedding.memory[...] = np.concatenate(tables).ravel()
    for weights in model.parameters.values():  # (in, out), but drawn as (out, in)
        weights[...] = draws.rand(*weights.T.shape).T

    steps = zip(labels, inputs, strict=True)
    found = [model.step(label, dense, model.checked(bags, 2), rate).mean() for label, (dense, bags) in steps]
    assert tuple(f"{loss:.6f}" for loss in found) == LOSSES
    rows = np.split(model.embedding.memory.reshape(-1, 2), np.cumsum(sizes)[:-1])
    for weights, printed in zip([*rows, *(w.T for w in model.parameters.values())], WEIGHTS, strict=True):
        # Half of the last digit, and what float32 rounds away in three steps.
        np.testing.assert_allclose(weights, printed, rtol=0, atol=5.2e-6)


def from_seed_0() -> dict[str, np.ndarray]:
    """The weights and inputs of TorchRec's tests, which these draw from torch.manual_seed(0); matrices are
    (in, out), and of the tables there are the ten rows that are read."""
    with np.load(Path(__file__).with_name("golden_torchrec.npz")) as kept:
        return dict(kept)


@pytest.mark.parametrize("version", EVERY)
def test_the_logits_of_torchrec(version):
    """DLRMTest.test_basic of torchrec/models/tests/test_dlrm.py: bags of three features, two of one table."""
    kept = from_seed_0()
    config = TrainConfig(
        embedding=EmbeddingConfig("full"),
        model=ModelConfig(width=8, bottom=(20,), top=(5,)),
        optimizer=OptimizerConfig("sgd"),
        batch=2,
    )
    data = DataSpec(100, (10, 10, 10), "dictionary", "", "", pooling=("sum",) * 3)
    model = build(resolve(config), data, select(version))
    model.embedding.memory[...] = kept["tables"][[0, 0, 1]].ravel()
    for name, weights in model.parameters.items():
        weights[...] = kept[name]
    # TorchRec has the pairs row by row of the upper triangle, the DLRM of the lower one.
    upper, (high, low) = list(zip(*np.triu_indices(4, 1), strict=True)), np.tril_indices(4, -1)
    order = [8 + upper.index(pair) for pair in zip(low, high, strict=True)]
    model.parameters["top.0.weight"][8:] = kept["top.0.weight"][order]

    values = np.array([1, 2, 4, 3, 1, 2, 4, 5, 2, 9, 3], np.uint32)  # of row 0, then of row 1
    bags = Bags(values, np.array([0, 2, 4, 6, 8, 10, 11]))
    logits = model.predict(kept["dense"], model.checked(bags, 2))
    np.testing.assert_allclose(logits, [0.5805, 0.5909], rtol=1e-4, atol=1e-4)  # as TorchRec's test


@pytest.mark.parametrize("version", EVERY)
def test_the_low_rank_cross_network_of_torchrec(version):
    """TestLowRankCrossNet of torchrec/modules/tests/test_crossnet.py: two numbers, 20 layers of rank 10."""
    kept = from_seed_0()
    x, v, w = (kept[f"cross.{name}"] for name in "xvw")
    config = TrainConfig(
        embedding=EmbeddingConfig("full"),
        model=ModelConfig(width=1, interaction="cross", cross_layers=20, cross_rank=10),
        batch=3,
    )
    model = build(resolve(config), DataSpec(1, (3,), "dictionary", "", ""), select(version))
    for i in range(20):
        model.parameters[f"cross.{i}.v"][...] = v[i]
        model.parameters[f"cross.{i}.w"][...] = w[i]
    model.interaction.first(3)[...], model.embedding.memory[...] = x[:, :1], x[:, 1]
    out = model.interaction.forward(np.arange(3, dtype=np.uint32)[:, None])
    expected = [[-11.5, -3.4863], [-0.2742, -0.333], [249.6694, 117.3466]]
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)  # as TorchRec's test
