import tomllib

import pytest
from rich.cells import cell_len

from data_pipeline.dialects import report
from data_pipeline.guesses import quoted
from data_pipeline.manifest import Ids, Manifest
from data_pipeline.names import fitted, shown
from data_pipeline.schema import Schema


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("price", "price"),
        (r"$\alpha$ a^b 100% [red] `x` <b> | {y}", r"$\alpha$ a^b 100% [red] `x` <b> | {y}"),
        ("价格 Цена العربية é 😀", "价格 Цена العربية é 😀"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("a\nb\r\tc\x7f\x85\u2028", r"a\nb\r\tc\x7f\x85\u2028"),
        ("a\u200bb\u202ec\ufeff\xad", r"a\u200bb\u202ec\ufeff\xad"),
        ("\u3164\u2800\ufe0f\U000e0101", r"\u3164\u2800\ufe0f\U000e0101"),
        ("a\xa0b\u3000", r"a\xa0b\u3000"),
        ("\udcff\ue000", r"\udcff\ue000"),
    ],
)
def test_what_cannot_be_seen_is_written_out(name, text):
    assert shown(name) == text
    assert shown(text) == text
    text.encode()


@pytest.mark.parametrize(
    "name", ["\x1b[31m", "a\n\t", "\x7f\x9b", "rtl\u202ea", '"\u3164\\', "价\U000e0101", "é"]
)
def test_toml_holds_any_name_and_shows_it(name):
    text = quoted(name)
    assert text.isprintable()
    assert shown(text) == text
    assert tomllib.loads(f"{text} = {text}") == {name: name}


def test_characters_that_are_lacking_are_written_out():
    assert shown("价格 x", lacking={"价"}) == r"\u4ef7格 x"


@pytest.mark.parametrize("cells", [4, 5, 20, 32])
@pytest.mark.parametrize("character", ["x", "格", "e\u0301", "😀"])
def test_long_names_keep_both_ends(cells, character):
    name = "a" + character * 200 + "b"
    short = fitted(name, cells)
    assert cells - 2 <= cell_len(short) <= cells or character == "e\u0301"
    assert len(short) <= cells
    assert short.endswith("b")
    assert "..." in short
    assert short.startswith("a") or cells == 4
    assert fitted("a" * cells, cells) == "a" * cells


def test_what_is_told_of_data_is_one_line_a_feature():
    schema = Schema("a\nb", "label", (), ("\x1b[31m", "$x$"))
    feature = {"coverage": {"1": 0.5}, "kept": 1, "distinct": 2, "rare_rows": 1}
    ids, split = Ids("dictionary", (2, 2), True), {"train": ((0, 0, 9),)}
    manifest = Manifest(schema, "none", ids, (), split, "day_0\n tests", features=(feature, feature))
    assert manifest.describe().startswith(r"a\nb data; ")
    assert manifest.describe().endswith(r"day_0\n tests")
    assert [line.split(":")[0] for line in report(manifest)] == [r"\x1b[31m", "$x$"]


def test_wide_characters_take_two_cells():
    assert fitted("格" * 10, 20) == "格" * 10
    assert fitted("格" * 11, 20) == "格" * 5 + "..." + "格" * 3
