"""Ranks that step rows of a table apart: when these are exchanged, and what comes of it."""

import dataclasses
from unittest import mock

import numpy as np
import pytest
from conftest import resolved, without_simulator
from test_ranks import BAGS, CASES, small_evaluations, together, trained  # noqa: F401

from robe.backend import among, select
from robe.config import ConfigError, DataSpec, EmbeddingConfig, OptimizerConfig, TrainConfig, resolve
from robe.embeddings import create
from robe.stale import Stale


def table(ranks, rows, width, staleness, optimizer):
    """The table of one feature, stepped by this rank and others; its weights are 0."""
    settings = {"width": width}, {"method": "full"}, {"optimizer": optimizer, "lr": 1.0}
    config = resolved(*settings, staleness=staleness)
    backend = among(select("reference"), ranks)
    made = create(config, DataSpec(0, (rows,), "dictionary", "", "test"), backend)
    made.memory[...] = 0
    return Stale(made, backend, staleness)


def step(stale, rows, gradients):
    """Read rows (n,), and step them by gradients (n, D), by a rate of 1; returns what was read."""
    ids, width = np.array(rows, np.uint32).reshape(-1, 1), stale.table.width
    stale.ready(ids)
    read = np.empty((len(ids), 1, width), np.float32)
    stale.table.lookup(ids, read)
    stale.update(ids, np.array(gradients, np.float32).reshape(-1, 1, width), 1.0)
    return read[:, 0]


def test_a_gpu_is_refused():
    backend = dataclasses.replace(select("reference"), xp=mock.Mock())
    with pytest.raises(ConfigError, match=r"^--staleness .* add --backend cpu$"):
        Stale(mock.Mock(), backend, 1)


def test_steps_by_hand():
    """Two ranks, three rows of one weight, S = 1."""
    # What rank 0 reads, sees there, and steps by; and what rank 1 does.
    steps = [
        (([0], [0], [1]), ([0, 1], [0, 0], [2, 1])),
        # Row 0 lacks one step of rank 1, and row 1 too: no more than S.
        (([0, 1], [-1, 0], [1, 2]), ([2], [0], [4])),
        # Rank 1 lacks two steps of row 0, 1 + 1: it comes to -2 - 2. Row 1 lacks one, and has one of its own.
        (([1], [-2], [4]), ([0, 0], [-4, -4], [3, 5])),
        # Row 1 has two steps of rank 0 that are not sent, 2 + 4, and one of rank 1: -6 - 1.
        (([1], [-7], [16]), ([], [], [])),
    ]

    def taken(ranks):
        stale = table(ranks, 3, 1, 1, "sgd")
        for both in steps:
            rows, seen, gradients = both[ranks.rank]
            assert step(stale, rows, gradients)[:, 0].tolist() == seen
        told, moved = 4 * (3 + 3 + 2 + 1), 4 * (2 + 2)
        assert ranks.moved == (told + moved) / 2  # half of it is a rank's own
        before = stale.table.memory.tolist()
        stale.settle()
        assert ranks.moved == (told + moved + 4 * 3) / 2
        assert stale.ways == {"moves": 4}
        assert not stale.clocks.any()
        return before, stale.table.memory.tolist()

    (first, found), (second, other) = together(2, taken)
    assert (first, second) == ([-4, -23, 0], [-12, -7, -4])
    assert found == other == [-12, -23, -4]


@pytest.mark.parametrize("optimizer", ["adagrad", "rowwise_adagrad"])
def test_sums_of_squares_add_up(optimizer):
    """Each rank steps by what it knows of them."""

    def taken(ranks):
        stale = table(ranks, 2, 1, 1, optimizer)
        step(stale, [1], [(3.0, 4.0)[ranks.rank]])  # by 3 / 3, and by 4 / 4
        stale.settle()
        step(stale, [1], [(12.0, 0.0)[ranks.rank]])  # by 12 / sqrt(3^2 + 4^2 + 12^2)
        stale.settle()
        return stale.table.memory.tolist(), stale.table.accumulator.tolist()

    for memory, sums in together(2, taken):
        assert sums == [0, 169]
        assert memory == [0, pytest.approx(-2 - 12 / 13, rel=1e-6)]


@pytest.mark.parametrize(("size", "most"), [(2, 1), (2, 7), (3, 3), (4, 10)])
def test_nobody_reads_a_row_that_lacks_more(size, most):
    """Rows count the steps of each rank, and a model of loops says what is to be seen of them."""
    rng, rows = np.random.default_rng(most), 12
    law = 1 / np.arange(1, rows + 1)
    steps = [
        [rng.choice(rows, rng.integers(0, 6), False, law / law.sum()).tolist() for _ in range(size)]
        for _ in range(60)
    ]

    def taken(ranks):
        stale, own = table(ranks, rows, size, most, "sgd"), [parts[ranks.rank] for parts in steps]
        one = -np.eye(size)[ranks.rank]
        seen = [step(stale, read, np.tile(one, (len(read), 1))).tolist() for read in own]
        stale.settle()
        return seen, stale.table.memory.reshape(rows, size).tolist()

    found, lacks = together(size, taken), []
    done, sent = ([[0] * size for _ in range(rows)] for _ in range(2))  # steps of a row, by rank
    for number, parts in enumerate(steps):
        for row, (all_of_it, known) in enumerate(zip(done, sent, strict=True)):
            ahead = [a - b for a, b in zip(all_of_it, known, strict=True)]
            for rank, read in enumerate(parts):
                if row in read and (ahead[rank] > most or sum(ahead) - ahead[rank] > most):
                    sent[row] = list(all_of_it)
        for rank, read in enumerate(parts):
            for row, seen in zip(read, found[rank][0][number], strict=True):
                assert seen == [done[row][q] if q == rank else sent[row][q] for q in range(size)]
                lacks.append(sum(done[row]) - sum(seen))
        for rank, read in enumerate(parts):
            for row in read:
                done[row][rank] += 1
    assert max(lacks) == most
    for _, memory in found:
        assert memory == done


# Settings of a training with --staleness, besides those of a full table.
STALE = {
    "sgd": ({"optimizer": "sgd", "lr": 1.0}, {}),
    "bags": ({"optimizer": "adagrad"}, {"data": BAGS, "model": {"interaction": "cross"}}),
    "passes": ({"optimizer": "rowwise_adagrad"}, {"fresh_embeddings": True, "average": 0.5}),
}


def shared(size, case, run, most, **options):
    """What `trained` of test_ranks.py returns on so many ranks, of a case of STALE with that bound."""
    optimizer, others = STALE[case]
    with mock.patch.dict(CASES, {case: ({"method": "full"}, optimizer, others | {"staleness": most})}):
        return together(size, lambda ranks: trained(case, run, ranks, **options))


@without_simulator
@pytest.mark.parametrize("case", STALE)
def test_ranks_hold_the_same_where_they_are_compared_and_go_on(case, tmp_path, small_evaluations):  # noqa: F811
    """On 2 ranks and on 4, of which some have no row of the last batch."""
    ((alone, _),) = shared(1, case, tmp_path / "alone", 2)
    for size in (2, 4):
        whole = shared(size, case, tmp_path / f"{size}", 2)
        for steps in (3, 6, None):  # where there are evaluations
            parts = shared(size, case, tmp_path / f"{size} parts", 2, max_steps=steps)
        exact = shared(size, case, tmp_path / f"{size} exact", 0)
        for arrays, _ in (*whole, *parts):
            for name, array in whole[0][0].items():
                assert arrays[name].tobytes() == array.tobytes(), name
        told, of_exact = (found[0][1]["processes"] for found in (whole, exact))
        assert (told["ways"], of_exact["ways"]) == ({"moves": 10}, {"rows": 10})
        table, exactly = (found[0][0]["embedding.memory"] for found in (whole, exact))
        assert np.abs(table - exactly).max() > 1e-4
        np.testing.assert_allclose(alone["embedding.memory"], exactly, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"embedding": EmbeddingConfig()}, "--staleness is for --method full in fp32, not for --method robe"),
        (
            {"embedding": EmbeddingConfig("full", memory="int8")},
            "--staleness is for --method full in fp32, not for --method full --memory int8",
        ),
        (
            {"optimizer": OptimizerConfig("adam")},
            "--staleness is for --optimizer sgd, adagrad, rowwise_adagrad, .* add up, not for adam",
        ),
        (
            {"optimizer": OptimizerConfig("sgd", weight_decay=0.1)},
            "--weight-decay and --embedding-l2 are taken",
        ),
        ({"staleness": -1}, "--staleness must be from 0 to 2147483647, not -1"),
    ],
)
def test_what_does_not_add_up_is_refused(settings, message):
    given = {"embedding": EmbeddingConfig("full"), "optimizer": OptimizerConfig("sgd"), "staleness": 1}
    assert resolve(TrainConfig(**given)).staleness == 1
    with pytest.raises(ConfigError, match=f"^{message}"):
        resolve(TrainConfig(**given | settings))
    assert resolve(TrainConfig(**settings | {"staleness": 0})).staleness == 0
