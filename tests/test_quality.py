"""Mixed precision beside the table it stands for: what is trained, and the tables."""

import dataclasses

import numpy as np
import pytest

from benchmarks import quality
from robe.config import DataSpec


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    tiny = dataclasses.replace(quality.TINY, rows=8_000)
    return quality.measure(tiny, tmp_path_factory.mktemp("cache"), say=lambda text: None)


def test_every_width_has_its_table_and_both_kinds_of_codes(results):
    rows = results["table_rows"]
    sets = [max(1, round(share * rows / 32)) for share in (0.05, 0.01)]
    # Codes, scale and bias; of a cached row its elements, tag and use.
    expected = [
        (width, name, size)
        for width in (16, 64)
        for name, size in (
            ("float32 table", 4 * width * rows),
            ("INT8, 5% cached", (width + 4) * rows + 32 * sets[0] * (4 * width + 8)),
            ("INT4, 1% cached", (width // 2 + 4) * rows + 32 * sets[1] * (4 * width + 8)),
        )
    ]
    assert [(row["width"], row["method"], row["bytes"]) for row in results["rows"]] == expected
    for width, name, size in expected:
        if name != quality.FULL:
            assert results["smaller"][name][width] == pytest.approx(4 * width * rows / size)
    assert results["test_rows"] == 400
    for row in results["rows"]:
        assert len(set(row["auc"])) == 2
        assert all(0.45 < loss < 0.7 for loss in row["log_loss"])


def test_bytes_of_rows_too_many_to_train_on():
    """INT4 at D = 64: 256 bytes become 36, and 1% of 264 for the cache."""
    spec = DataSpec(13, (10**7,), "dictionary", "", "")
    found = quality.smaller(quality.METHODS["INT4, 1% cached"], 64, spec)
    assert found == pytest.approx(256 / (36 + 2.64), rel=1e-4)  # the cache is a whole number of sets


def test_the_tables(results):
    doctored = [
        row | {"auc": [x + 0.01 * (row["width"] == 16 and "INT4" in row["method"]) for x in (0.7, 0.8)]}
        for row in results["rows"]
    ]
    lines = quality.table(results | {"rows": doctored}).splitlines()
    assert lines[0].startswith("7,200 training and 400 test rows, ")
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:10]]
    assert len({len(cells) for cells in table}) == 1
    assert [cells[4] for cells in table[2:]] == [
        *("", "+0.00000 ± 0.00000", "+0.01000 ± 0.00000"),
        *("", "+0.00000 ± 0.00000", "+0.00000 ± 0.00000"),
    ]
    middle, half = 0.75, 12.706 * 0.05  # Student's with one degree of freedom
    assert table[2][3] == f"{middle:.4f} ± {half:.4f}"
    assert lines[11] == "| times smaller, with cache | D = 16 | D = 64 | D = 128 | D = 256 |"
    ratios = [float(cell.strip(" x")) for cell in lines[14].split("|")[2:-1]]
    np.testing.assert_allclose(ratios, list(results["smaller"]["INT4, 1% cached"].values()), atol=0.005)
