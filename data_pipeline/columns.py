"""Tables with named columns -> chunks of NumPy arrays: Parquet, Arrow IPC, CSV with a header, JSON lines.

A file is read in slices, so memory does not depend on its size. The schema says which columns are used, and
how; they may stand in any order, and other columns are ignored. A row with a value that breaks the rules of
its column is rejected: nothing is guessed.

A column of bags holds texts that are taken apart, or lists. Each id has to keep the rule of its kind, and
those that are missing are left out, so an empty cell is an empty bag.

CSV is separated by comma, tab, semicolon or bar, plain or packed, one row per line. Fields may be quoted as
in RFC 4180, if the schema's `quote` is not empty, but hold no newline. A regular expression checks each line
of a block before Polars parses the block. Lines of JSON are read by `json_lines.py`.
"""

import csv
import io
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import xxhash

from data_pipeline.background import ahead
from data_pipeline.bags import LONGEST, Column, IdsOfRows, of_columns
from data_pipeline.chunk import Chunk, Parsed, Rejected
from data_pipeline.dialects import dense_values
from data_pipeline.formats import FROM_GBK, NOT_UTF8, SUFFIXES, Format, format_of, header_of
from data_pipeline.json_lines import JsonLines
from data_pipeline.partitions import files_of, size_of, values_of
from data_pipeline.schema import PARTS, SPLIT_DAYS, WEIGHT, Bag, DataError, Schema, moment
from data_pipeline.stores import OPTIONS, Stored, asking, located
from data_pipeline.text_blocks import BLOCK_BYTES, TextBlock, text_blocks

# Rows up to which columns with the same rule are read as one.
FEW = 1000
# How Polars opens a file of a format.
SCANS: dict[str, Callable[..., pl.LazyFrame]] = {"parquet": pl.scan_parquet, "arrow": pl.scan_ipc}
SLICE_ROWS = 1 << 18  # fewer, and the row groups of a Parquet file are decoded again and again
SEPARATORS = ",\t;|"
# What is not read, but occurs.
FOREIGN = ("::", ":", "^", "~", "\x01", "  ", " ")

NUMBER = r"^-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$"
INTEGER = r"^-?[0-9]{1,38}(?:\.0+)?$"  # what 128 bits hold; Pandas writes 37.0 where others are missing
LARGEST = 1e38  # what float32 holds
HEX = r"^[0-9a-fA-F]{1,8}$"
# A time of ISO 8601: day, hour and minute, second with its fraction, zone.
_CLOCK = r"([0-9]{2}:[0-9]{2})(:[0-9]{2}(?:\.[0-9]+)?)?(Z|[-+][0-9]{2}:?[0-9]{2})?"
TIME = rf"^([0-9]{{4}}-[0-9]{{2}}-[0-9]{{2}})(?:[T ]{_CLOCK})?$"
A_TIME = "a time like 2024-05-01 or 2024-05-01T12:30:00"
QUOTES = "quotes that do not match, or are not around a whole field"
# The integers up to which a float tells each from its neighbours.
EXACT: dict[pl.DataType | type[pl.DataType], int] = {pl.Float32: 2**24, pl.Float64: 2**53}
# Words that a label may be, as programs write them.
TRUTH = {
    form(word): value
    for value, words in (("1", ("true", "yes", "t", "y")), ("0", ("false", "no", "f", "n")))
    for word in words
    for form in (str.lower, str.upper, str.title)
}


def is_table(path: Path, schema: Schema) -> bool:
    """Whether a file is a table: by its format, or as its first line names the columns of the schema.

    Where a schema has rules that no raw log can keep, the name of one column is enough.
    """
    if format_of(path) != "raw":
        return True
    try:
        named = set(_Csv(path, header_of(path), schema.quote).names)
    except DataError:
        return False
    wanted = {*schema.sources}
    return wanted <= named or bool(schema.rules() and wanted & named)


def is_binary(path: Path) -> bool:
    """Whether a file is Parquet or Arrow IPC, or a folder of Parquet."""
    return format_of(path) in SCANS


def hash_texts(texts: pl.Series) -> pl.Series:
    """The hashes (UInt32) of texts (String): XXH32, seed 0, of the UTF-8 bytes, with 1 instead of 0.

    They are the same on all machines and in all versions. Null stays null. 0 is kept for missing values, so
    the one text in 2^32 with this hash gets 1 like some others. Only distinct texts are hashed.
    """
    distinct = texts.drop_nulls().unique()
    hashes = np.fromiter(map(xxhash.xxh32_intdigest, distinct.cast(pl.Binary)), np.uint32, len(distinct))
    found = pl.Series(np.maximum(hashes, 1))
    # Where there is nothing to replace, Polars leaves the type as it is.
    return texts.replace_strict(distinct, found, return_dtype=pl.UInt32).cast(pl.UInt32)


def read_table(
    path: Path,
    schema: Schema,
    *,
    labelled: bool | None,
    dense: str,
    first_line: int,
    block_bytes: int,
    slice_rows: int,
) -> Generator[Parsed, None, None]:
    """Yield, for each part of a table, its rows and those that break the rules.

    Rows count from 1, without the header. Arguments and errors are those of `logs.read_log`.
    """
    form = format_of(path)
    if form in SCANS:
        parts = _slices(path, schema, labelled, first_line, slice_rows)
    elif form == "json":
        parts = _json(path, schema, labelled, first_line, block_bytes)
    else:
        parts = _csv(path, schema, labelled, first_line, block_bytes)
    types, rules, taken = None, [], _taken(schema, labelled)
    with closing(ahead(parts, 1)) as ready:
        for part in ready:
            frame = part.frame.select(pl.col(column).alias(name) for name, column in taken.items())
            if frame.schema != types:  # the files of a folder need not agree
                types = frame.schema
                rules = [_any_rule(part.file, name, dtype, schema) for name, dtype in types.items()]
            values, good, reasons = _applied(rules, frame)
            broken = [_Broken(int(part.row[i]), text, part.frame.row(i)) for i, text in reasons.items()]
            values = values if good.all() else values.keep(good)
            flat = values.flat
            numbers, clipped = dense_values(schema, dense, matrix(flat, schema.dense, np.float64))
            chunk = Chunk(
                line=part.row[good],
                label=flat[schema.label].to_numpy() if schema.label in flat.columns else None,
                dense=numbers,
                clipped=clipped,
                ids=values.ids(schema),
                position=part.position,
                weight=flat[schema.weight].to_numpy() if schema.weight in flat.columns else None,
                split=flat[schema.split].to_numpy() if schema.split in flat.columns else None,
            )
            rejected = sorted(part.broken + broken, key=attrgetter("row"))
            inside = f" of {part.file.relative_to(path)}" if part.file != path else ""
            yield chunk, [_rejected(row, _where(form, row.row - part.before) + inside) for row in rejected]


def _rejected(broken: "_Broken", where: str) -> Rejected:
    text = "\t".join("" if field is None else str(field) for field in broken.fields)
    return Rejected(broken.row, where, broken.reason, text.encode().replace(b"\n", b"\\n"))


def _where(form: Format, row: int) -> str:
    """A row in words; in a text its line too, which is another where there is a header."""
    if form == "json":
        return f"line {row}"
    return f"row {row}" if form in SCANS else f"row {row} (line {row + 1})"


def count_binary(path: Path) -> int:
    """The number of rows of a Parquet or Arrow file, or of a folder of such; DataError if it is not read."""
    return sum(_length(file, _scan(file)) for file in files_of(path))


def frame_reader(schema: Schema, what: Path) -> Callable[[pl.DataFrame], "Values"]:
    """A function that gives what the rules of a schema make of the columns of a frame.

    It raises DataError for the first row that breaks a rule; `what` is what it calls the frame. Rules are
    kept, since to make them takes as long as to apply them to a few rows.
    """

    @lru_cache(maxsize=1000)
    def rule(name: str, dtype: pl.DataType) -> _Rule | _BagRule:
        return _any_rule(what, name, dtype, schema)

    def values(frame: pl.DataFrame) -> Values:
        rules = [rule(*column) for column in frame.schema.items()]
        flat = [each for each in rules if isinstance(each, _Rule)]
        if frame.height <= FEW and len(flat) == len(rules) and (few := _few(frame, flat, schema)):
            return few
        found, _, reasons = _applied(rules, frame)
        for row, reason in reasons.items():
            raise DataError(f"{what}, row {row}: {reason}; correct the value")
        return found

    return values


def matrix(table: pl.DataFrame, columns: tuple[str, ...], dtype: type[np.generic]) -> np.ndarray:
    """Columns of one type as (rows, columns), row by row; there may be none."""
    if not columns:
        return np.zeros((table.height, 0), dtype)
    return table.select(columns).to_numpy(order="c")


def quote_of(path: Path) -> str:
    """`Schema.quote` for a table: empty if its first rows can be taken apart only where quotes are text."""
    if format_of(path) in (*SCANS, "json"):
        return '"'
    with closing(text_blocks(path, BLOCK_BYTES)) as blocks:
        block = next(blocks)
    header, _, text = block.text.partition(b"\n")

    def broken(quote: str) -> int:
        layout = _Csv(path, header, quote)
        return len(layout.parse(text, np.arange(1, block.rows), layout.names[:1], block.position).broken)

    return "" if broken('"') > broken("") == 0 else '"'


def head(path: Path | str, rows: int) -> pl.DataFrame:
    """All columns of the first rows of a table, with the quotes of `quote_of`; those of CSV are texts.

    Raises DataError if the file is no table, or one of these rows of a text cannot be taken apart.
    """
    path = located(path)
    form = format_of(path)
    if form == "raw" and not _is_header(path):
        with closing(text_blocks(path, BLOCK_BYTES)) as blocks:
            line = next(blocks).text.partition(b"\n")[0]
        if b"::" in line:
            _refuse_separator(path, "::")
        raise DataError(f"{path}: not called {', '.join(SUFFIXES)}; rename the file if it is one")
    if form in SCANS:
        with _named(file := files_of(path)[0]):
            return _scan(file).head(rows).collect()
    with closing(text_blocks(path, BLOCK_BYTES)) as blocks:
        block = next(blocks)
    if form == "json":
        keys = JsonLines(block.text)
        return _whole(path, form, _json_part(path, keys, block, list(keys.types))).head(rows)
    header, _, text = block.text.partition(b"\n")
    layout = _Csv(path, header, quote_of(path))
    if len(layout.names) == 1 and (other := [one for one in FOREIGN if one in layout.names[0].strip()]):
        _refuse_separator(path, other[0])
    if twice := [name for name in layout.names if layout.names.count(name) > 1]:
        raise DataError(
            f"{path}: has two columns of one name; rename one called {twice[0]!r}, or write the names of the "
            "columns above line 1 if that is data"
        )
    part = layout.parse(text, np.arange(1, block.rows), layout.names, block.position)
    return _whole(path, form, part).head(rows)


def _whole(path: Path, form: Format, part: "_Part") -> pl.DataFrame:
    """The columns of a part; raises DataError if one of its lines could not be taken apart."""
    if part.broken:
        first = min(part.broken, key=attrgetter("row"))
        raise DataError(f"{path}, {_where(form, first.row)}: {first.reason}; correct it")
    return part.frame


def _refuse_separator(path: Path, separator: str) -> None:
    """Raise DataError for a table with a separator that is not read."""
    raise DataError(
        f"{path}: its fields seem to be separated by {separator!r}, which is not read; write a .csv file "
        "with commas or tabs between them, and the names of the columns in its first line"
    )


class _Broken(NamedTuple):
    """A row that breaks the rules: its number, why, and its fields as they were read."""

    row: int
    reason: str
    fields: tuple


class _Part(NamedTuple):
    """Consecutive rows of a table.

    row: (n,) int64, their numbers.
    frame: the columns asked for, (n,) rows.
    broken: the lines in between that could not be taken apart, and are missing from `frame`.
    position: as in `Chunk`.
    file: where they stand, behind the `before` rows of the files before it.
    """

    row: np.ndarray
    frame: pl.DataFrame
    broken: list[_Broken]
    position: int
    file: Path
    before: int = 0


class _Rule(NamedTuple):
    """What a column may hold.

    bad: which values break the rule.
    value: what becomes of the others.
    words: what a value has to be.
    """

    bad: pl.Expr
    value: pl.Expr
    words: str


class _BagRule(NamedTuple):
    """What a column of bags may hold: ids that keep `rule`; where they have weights, these are finite."""

    name: str
    bag: Bag
    rule: _Rule
    words: str

    def applied(self, cells: pl.Series) -> tuple[Column, np.ndarray]:
        """The bags of a column of n rows, and which of them break the rule, (n,) bool."""
        elements, lengths = _elements(cells, self.bag)
        bad, ids = elements.select(self.rule.bad.alias("bad"), self.rule.value.alias("ids")).get_columns()
        row, there = np.repeat(np.arange(len(cells)), lengths), ids.is_not_null().to_numpy()
        wrong, weights = bad.to_numpy(), None
        if self.bag.weights:
            found = elements.to_series(1).to_numpy()
            wrong, weights = wrong | (there & ~np.isfinite(found)), found[there]
        lengths = np.bincount(row[there], minlength=len(cells))
        broken = (np.bincount(row[wrong], minlength=len(cells)) > 0) | (lengths > LONGEST)
        return Column(ids.drop_nulls().to_numpy(), lengths, weights), broken


class Values(NamedTuple):
    """What the rules of a schema make of some rows.

    flat: their columns but for bags: Float64, and UInt32 of categorical ones.
    bags: those of the others, by column.
    """

    flat: pl.DataFrame
    bags: dict[str, Column]

    def keep(self, good: np.ndarray) -> "Values":
        """The rows for which `good` is True."""
        return Values(self.flat.filter(good), {name: bags.keep(good) for name, bags in self.bags.items()})

    def ids(self, schema: Schema) -> IdsOfRows:
        """The ids of all categorical columns, (n, F) uint32, or bags where the schema has any."""
        if not schema.bags:
            return matrix(self.flat, schema.categorical, np.uint32)
        return of_columns([self.column(name) for name in schema.categorical], schema.weighted())

    def column(self, name: str) -> Column:
        """A categorical column as bags, of one id where it has none."""
        if name in self.bags:
            return self.bags[name]
        ids = self.flat[name].to_numpy()
        return Column(ids, np.ones(len(ids), np.int64))


def no_header(path: Path, cell: str) -> DataError:
    """What is raised for a CSV file whose first line is a row, as one of its cells shows."""
    return DataError(
        f"{path}, line 1: no header, but data, as {cell!r} shows; write a line with the names of the columns "
        "above it"
    )


def _wanted(path: Path, names: list[str], schema: Schema, labelled: bool | None) -> list[str]:
    """Those of a table's columns that the schema names; raises DataError if one is missing."""
    wanted = [*dict.fromkeys(_taken(schema, labelled).values())]
    if missing := [name for name in wanted if names.count(name) == 0]:
        remedy = "give its columns with --schema, of which `robe schema FILE` proposes one"
        if labelled is None:
            remedy = "give all columns that the model was trained on"
        raise DataError(f"{path}: has no column {missing[0]!r}, but {', '.join(names)[:200]!r}; {remedy}")
    if twice := [name for name in wanted if names.count(name) > 1]:
        raise DataError(f"{path}: has two columns {twice[0]!r}; rename one")
    return wanted


def _taken(schema: Schema, labelled: bool | None) -> dict[str, str]:
    """What is made of the columns of a table: name -> the column that it is made of."""
    told = [name for name in (schema.label, schema.weight, schema.split) if labelled and name is not None]
    names = (*told, *schema.dense, *schema.categorical)
    return {name: schema.times.get(name, name) for name in names}


def _is_header(path: Path) -> bool:
    """Whether the first line of a text is made of names, rather than of values."""
    try:
        names = _Csv(path, header_of(path), '"').names
    except DataError:
        return False
    return len(names) > 1 and all(name and not re.fullmatch(NUMBER, name) for name in names)


def _scan(path: Path) -> pl.LazyFrame:
    """The columns of a file, and as texts those that its folders' names tell and it does not have."""
    told, options = values_of(path), OPTIONS if isinstance(path, Stored) else None
    log = SCANS[format_of(path)](str(path), glob=False, storage_options=options)
    with _named(path):
        names = log.collect_schema().names() if told else []
    missing = {name: value for name, value in told.items() if name not in names}
    return log.with_columns(pl.lit(value, pl.String).alias(name) for name, value in missing.items())


def _length(path: Path, log: pl.LazyFrame) -> int:
    with _named(path):
        return log.select(pl.len()).collect().item()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn what Polars raises about a file into a DataError of one line that names it."""
    if isinstance(path, Stored):
        with asking(path):
            yield
        return
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: not found; check the path") from None
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: not a whole {format_of(path)} file ({reason}); write it again") from None


def _slices(
    path: Path, schema: Schema, labelled: bool | None, first_line: int, slice_rows: int
) -> Generator[_Part, None, None]:
    if schema.bags:  # which take more memory than numbers
        slice_rows = max(1, slice_rows // 4)
    before = read = arrived = 0
    for file in files_of(path):
        log = _scan(file)
        rows, size = _length(file, log), size_of(file)
        with _named(file):
            wanted = _wanted(file, log.collect_schema().names(), schema, labelled) if rows else []
            first = max(first_line - 1 - before, 0)
            for start in range(first // slice_rows * slice_rows, rows, slice_rows):
                frame = log.select(wanted).slice(start, slice_rows).collect()
                row = np.arange(before + start, before + start + frame.height) + 1
                arrived += int(frame.estimated_size())
                position = arrived if size is None else read + size * (start + frame.height) // rows
                yield _Part(row, frame, [], position, file, before)
        before, read = before + rows, read + (size or 0)
    if before == 0:
        raise DataError(f"{path}: empty, there is no row 1; check where the file comes from")


def _csv(
    path: Path, schema: Schema, labelled: bool | None, first_line: int, block_bytes: int
) -> Generator[_Part, None, None]:
    layout = None
    for block in text_blocks(path, block_bytes):
        text, row = block.text, np.arange(block.line, block.line + block.rows) - 1
        if layout is None:
            header, _, text = text.partition(b"\n")
            layout, row = _Csv(path, header, schema.quote), row[1:]
            numbers = [name for name in layout.names if re.fullmatch(NUMBER, name)]
            known = {schema.label, *schema.sources} & {*layout.names}
            if 2 * len(numbers) >= len(layout.names) and not known:
                raise no_header(path, numbers[0])
            wanted = _wanted(path, layout.names, schema, labelled)
        if row.size and first_line <= row[-1]:
            yield layout.parse(text, row, wanted, block.position)
    if not row.size and block.line == 1:
        raise DataError(f"{path}: empty, there is no row after the header; check where the file comes from")


def _json(
    path: Path, schema: Schema, labelled: bool | None, first_line: int, block_bytes: int
) -> Generator[_Part, None, None]:
    keys = None
    for block in text_blocks(path, block_bytes):
        if keys is None:
            keys = JsonLines(block.text)
            wanted = _wanted(path, list(keys.types), schema, labelled)
        if first_line < block.line + block.rows:
            yield _json_part(path, keys, block, wanted)


def _json_part(path: Path, keys: JsonLines, block: TextBlock, wanted: list[str]) -> _Part:
    lines, row = block.text.split(b"\n")[:-1], np.arange(block.line, block.line + block.rows)
    frame, reasons = keys.parse(lines, wanted)
    broken = [
        _Broken(int(row[i]), reason, (lines[i].decode(errors="replace"),)) for i, reason in reasons.items()
    ]
    return _Part(np.delete(row, list(reasons)), frame, broken, block.position, path)


class _Csv:
    """How the lines of a CSV file are taken apart, as its header and `Schema.quote` tell."""

    def __init__(self, path: Path, header: bytes, quote: str):
        self.path, self.quote = path, quote
        try:
            text = header.decode("utf-8-sig")
            splits = {separator: self._split(text, separator) for separator in SEPARATORS}
        except UnicodeDecodeError:
            raise DataError(f"{path}, line 1: {NOT_UTF8}; {FROM_GBK}") from None
        except (StopIteration, csv.Error):
            raise DataError(f"{path}, line 1: not the names of columns; give the file a header") from None
        self.separator = max(SEPARATORS, key=lambda separator: len(splits[separator]))
        self.names = splits[self.separator]
        # Where a blank follows each separator in the header, blanks belong to the separators.
        self.blanks = len(self.names) > 1 and all(name[:1] == " " for name in self.names[1:])
        if self.blanks:
            self.names = [name.strip(" ") for name in self.names]
        field = rf'(?:[^"{self.separator}\r]*|"(?:[^"\r]|"")*")' if quote else rf"[^{self.separator}\r]*"
        self.pattern = f"^{field}(?:[{self.separator}]{field}){{{len(self.names) - 1}}}$"

    def parse(self, text: bytes, row: np.ndarray, wanted: list[str], position: int) -> _Part:
        """The wanted columns of a block of lines, `row` (n,) being their numbers."""
        broken = []
        plain = self._is_plain(text, row.size)
        if not plain:
            lines = self._lines(text)
            good = lines.str.contains(self.pattern).fill_null(False).to_numpy()
            if not good.all():
                texts = text.split(b"\n")
                broken = [
                    _Broken(int(row[i]), self._explain(texts[i]), (texts[i].decode(errors="replace"),))
                    for i in np.flatnonzero(~good).tolist()
                ]
                row, text = row[good], "".join(line + "\n" for line in lines.filter(good)).encode()
        table = pl.scan_csv(
            io.BytesIO(text or b"\n"),
            has_header=False,
            separator=self.separator,
            quote_char=None if plain else self.quote or None,
            empty_string_is_null=False,
            schema=dict.fromkeys(map(str, range(len(self.names))), pl.String),
            missing_columns="insert",
        )
        # Columns are picked by number, as names that are not wanted may come twice.
        columns = {name: pl.col(str(self.names.index(name))) for name in wanted}
        if self.blanks:
            columns = {name: column.str.strip_chars(" ") for name, column in columns.items()}
        frame = table.select(column.alias(name) for name, column in columns.items()).collect()
        frame = frame[: row.size]
        assert frame.height == row.size, "the two ways to read a line disagree"
        return _Part(row, frame, broken, position, self.path)

    def _is_plain(self, text: bytes, rows: int) -> bool:
        """Whether there are no quotes, and all lines have the right number of fields."""
        separators = self.separator.encode()
        others = bytes(byte for byte in range(256) if byte not in b'"\r\n' + separators)
        bare = (separators * (len(self.names) - 1) + b"\n") * rows
        return text.translate(None, others) == bare and _decoded(text) is not None

    def _lines(self, text: bytes) -> pl.Series:
        """The lines of a block; null where they are not UTF-8."""
        if (whole := _decoded(text)) is not None:
            return pl.Series([whole]).str.split("\n").explode()[:-1]
        return pl.Series(map(_decoded, text.split(b"\n")[:-1]), dtype=pl.String)

    def _explain(self, line: bytes) -> str:
        """Why a line breaks the rules."""
        if not line:
            return "blank line"
        if (text := _decoded(line)) is None:
            return NOT_UTF8
        try:
            count = len(self._split(text, self.separator))
        except csv.Error as error:  # a carriage return; a field of over 128 KiB
            return str(error)
        if len(self.names) not in (count, text.count(self.separator) + 1):
            return f"{count} fields instead of {len(self.names)}"
        return QUOTES

    def _split(self, line: str, separator: str) -> list[str]:
        if self.quote:
            return next(csv.reader([line], delimiter=separator))
        return next(csv.reader([line], delimiter=separator, quoting=csv.QUOTE_NONE))


def _decoded(text: bytes) -> str | None:
    """The text, or None if it is not UTF-8."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return None


def _any_rule(path: Path, name: str, dtype: pl.DataType, schema: Schema) -> _Rule | _BagRule:
    """The rule for a column of that type; raises DataError if the type does not fit the schema."""
    return (_bag_rule if name in schema.bags else _rule)(path, name, dtype, schema)


def _bag_rule(path: Path, name: str, dtype: pl.DataType, schema: Schema) -> _BagRule:
    """That for a column of bags."""
    bag = schema.bags[name]
    inner: Any = dtype.inner if isinstance(dtype, pl.List | pl.Array) else dtype
    if isinstance(inner, pl.Categorical | pl.Enum | pl.Null):
        inner = pl.String()
    if bag.weights and inner != pl.String:
        _, *of_weights = inner.fields if isinstance(inner, pl.Struct) else [None]
        if not (
            len(of_weights) == 1 and (of_weights[0].dtype.is_numeric() or of_weights[0].dtype == pl.Null)
        ):
            raise DataError(
                f"{path}: column {name} is {dtype}, but its ids have weights; give texts such as "
                f"3{WEIGHT}0.5, or lists of structs of an id and a weight"
            )
        inner = inner.fields[0].dtype
    missing = {name: (*schema.missing_in.get(name, schema.missing), "")}
    rule = _rule(path, name, inner, replace(schema, bags={}, missing_in=missing), missing=None)
    words = f"up to {LONGEST:,} ids, each {rule.words}" + " with a finite weight" * bag.weights
    return _BagRule(name, bag, rule, words)


def _elements(cells: pl.Series, bag: Bag) -> tuple[pl.DataFrame, np.ndarray]:
    """The ids (N,) of a column under its name, with their weights behind, and how many each cell has (n,)."""
    name, lengths = cells.name, np.ones(len(cells), int)
    if isinstance(cells.dtype, pl.Categorical | pl.Enum | pl.Null):
        cells = cells.cast(pl.String)
    if cells.dtype == pl.String:
        cells = cells.str.split(bag.separator)
    elif isinstance(cells.dtype, pl.Array):
        cells = cells.arr.to_list()
    if isinstance(cells.dtype, pl.List):
        sizes = cells.list.len().fill_null(0)
        # Polars would make a null of an empty list.
        cells, lengths = cells.filter(sizes > 0).explode(), sizes.to_numpy()
    if isinstance(cells.dtype, pl.Null | pl.Categorical | pl.Enum):
        cells = cells.cast(pl.String)
    if not bag.weights:
        return pl.DataFrame({name: cells}), lengths
    if cells.dtype == pl.String:
        weights = cells.str.extract(f"{WEIGHT}({NUMBER[1:-1]})$")
        ids = cells.str.replace(f"{WEIGHT}[^{WEIGHT}]*$", "")
    else:
        ids, weights = (cells.struct.field(field) for field in cells.struct.fields)
    weights = weights.cast(pl.Float32, strict=False).fill_null(np.nan)
    return pl.DataFrame({name: ids, f"{name}{WEIGHT}": weights}), lengths


def _rule(path: Path, name: str, dtype: pl.DataType, schema: Schema, missing: int | None = 0) -> _Rule:
    """That for a column of one value; missing: the id that a missing one gets."""
    column = pl.col(name)
    if isinstance(dtype, pl.Categorical | pl.Enum):
        column, dtype = column.cast(pl.String), pl.String()
    text = dtype == pl.String
    if text and name == schema.label:
        column = column.replace(TRUTH)
    elif text:
        column = pl.when(column.is_in(schema.missing_in.get(name, schema.missing)).not_()).then(column)

    def unlike(pattern: str) -> pl.Expr:
        return ~column.str.contains(pattern).fill_null(True) if text else pl.repeat(False, pl.len())

    def rule(bad: pl.Expr, value: pl.Expr, words: str) -> _Rule:
        return _Rule(bad.alias(name), value.alias(name), words)

    def filled(ids: pl.Expr) -> pl.Expr:
        return ids if missing is None else ids.fill_null(missing)

    kind = dict(zip(schema.categorical, schema.kinds, strict=True)).get(name)
    whole = dtype.is_integer() or dtype == pl.Boolean
    if kind == "string" and (text or whole):
        ids = column.cast(pl.String).map_batches(hash_texts, return_dtype=pl.UInt32)
        return rule(pl.repeat(False, pl.len()), filled(ids), "a text")
    if kind == "hex" and text:
        ids = column.str.to_integer(base=16, dtype=pl.UInt32, strict=False)
        return rule(unlike(HEX), filled(ids), "a number of up to 8 hex digits")
    if kind == "integer" and (text or whole):
        ids = column.map_batches(_integer_ids, return_dtype=pl.UInt32)
        return rule(unlike(INTEGER), filled(ids), "an integer of up to 38 digits")
    if kind in ("integer", "string") and dtype in EXACT:
        column = column.fill_nan(None)
        good = (column == column.round()) & (column.abs() <= EXACT[dtype])
        number, hashed = column.cast(pl.Int64, strict=False), kind == "string"
        ids = (number.cast(pl.String) if hashed else number).map_batches(
            hash_texts if hashed else _integer_ids, return_dtype=pl.UInt32
        )
        words = f"a whole number of up to {EXACT[dtype]}, as which {dtype} is exact"
        return rule(~good.fill_null(True), filled(ids), words)
    if kind in PARTS and (time := times(column, dtype)) is not None:
        ids = time.dt.hour() + 1 if kind == "hour" else time.dt.weekday()
        return rule(time.is_null() & column.is_not_null(), filled(ids.cast(pl.UInt32)), A_TIME)
    if name == schema.split and schema.split_at is not None:
        if found := _days_by_time(column, dtype, schema.split_at):
            day, words = found
            return rule(day.is_null(), day, words)
    elif name == schema.split and text:
        day = column.replace_strict(SPLIT_DAYS, default=None, return_dtype=pl.UInt8)
        return rule(day.is_null(), day, f"one of {', '.join(SPLIT_DAYS)}")
    if kind is None and name != schema.split and (text or whole or dtype.is_numeric()):
        number = column.cast(pl.Float64, strict=False).fill_nan(None)
        if name in schema.dense:
            number = number.fill_null(schema.dense_missing)
            return rule(unlike(NUMBER) | (number.abs() >= LARGEST), number, f"a number below {LARGEST:.0e}")
        if name == schema.weight:
            allowed = number.is_between(0, LARGEST, closed="left").fill_null(False)
            weight = number.cast(pl.Float32, strict=False)
            return rule(unlike(NUMBER) | ~allowed, weight, f"a weight from 0 to below {LARGEST:.0e}")
        if schema.threshold is None:
            label, allowed = number == 1, number.is_in([0.0, 1.0])
            words = "0 or 1, true or false (other numbers need a `threshold` in the schema)"
        else:
            label, allowed, words = number >= schema.threshold, number.is_finite(), "a number"
        return rule(unlike(NUMBER) | ~allowed.fill_null(False), label.cast(pl.Int32), words)
    wanted = "a time" if kind in PARTS else kind or "a number"
    if name == schema.split:
        wanted = "a split" if schema.split_at is None else f"a time like {schema.split_at[0]!r}"
    column_name = schema.times.get(name, name)
    raise DataError(f"{path}: column {column_name} is {dtype}, which cannot be {wanted}; correct the schema")


def _days_by_time(
    column: pl.Expr, dtype: pl.DataType, at: tuple[str | float, str | float]
) -> tuple[pl.Expr, str] | None:
    """The day (UInt8) of a folder that is split at two times, null where a value is no time; and what a value
    has to be in words. None if the type cannot be a time as these two are.
    """
    if not isinstance(at[0], str):
        if dtype != pl.String and not dtype.is_numeric():
            return None
        number = column.cast(pl.Float64, strict=False)
        good = number.is_finite() & (column.str.contains(NUMBER) if dtype == pl.String else True)
        return _days(pl.when(good).then(number), at), "a number"
    if (time := times(column, dtype)) is None:
        return None
    return _days(time, [moment(str(text)) for text in at]), A_TIME


def _days(time: pl.Expr, at: Sequence[Any]) -> pl.Expr:
    """How many of some times have come: UInt8, null where `time` is."""
    return pl.sum_horizontal([(time >= pl.lit(one)).cast(pl.UInt8) for one in at], ignore_nulls=False)


def _in_utc(zoned: pl.Expr) -> pl.Expr:
    """Times of a zone in UTC, without it."""
    return zoned.dt.convert_time_zone("UTC").dt.replace_time_zone(None)


def times(column: pl.Expr, dtype: pl.DataType) -> pl.Expr | None:
    """Times, dates or texts of ISO 8601 as Datetime of microseconds in UTC, null where a text is none of
    these; None for other types.
    """
    if isinstance(dtype, pl.Date | pl.Datetime):
        zoned = isinstance(dtype, pl.Datetime) and dtype.time_zone is not None
        return (_in_utc(column) if zoned else column).cast(pl.Datetime("us"))
    if dtype != pl.String:
        return None
    parts = column.str.extract_groups(TIME).struct
    day, minute, second, zone = (parts.field(str(part)) for part in range(1, 5))
    zone = zone.fill_null("Z").replace("Z", "+0000")
    # Null where there is no day, as a text that is no time has none.
    whole = pl.concat_str(day, pl.lit("T"), minute.fill_null("00:00"), second.fill_null(":00"), zone)
    return _in_utc(whole.str.to_datetime("%Y-%m-%dT%H:%M:%S%.f%z", time_unit="us", strict=False))


def _applied(rules: list[_Rule | _BagRule], frame: pl.DataFrame) -> tuple[Values, np.ndarray, dict[int, str]]:
    """(values, whether each row is good (n,), index -> reason of each row that is not) of some rows."""
    flat = [rule for rule in rules if isinstance(rule, _Rule)]
    bad, values = frame.select(rule.bad for rule in flat), frame.select(rule.value for rule in flat)
    found = {rule.name: rule.applied(frame[rule.name]) for rule in rules if isinstance(rule, _BagRule)}
    if found:
        broken = {name: rows for name, (_, rows) in found.items()}
        bad = pl.DataFrame(bad.to_dict() | broken).select(frame.columns)
    good = np.logical_not(bad.to_numpy().any(axis=1))
    reasons = {i: _reason(rules, bad, frame, i) for i in np.flatnonzero(~good).tolist()}
    return Values(values, {name: bags for name, (bags, _) in found.items()}), good, reasons


def _few(frame: pl.DataFrame, rules: list[_Rule], schema: Schema) -> Values | None:
    """What `_applied` makes of a few good rows without bags; None if a row is not good.

    Here a call of Polars takes longer than its work: columns with the same rule are one long column.
    """
    kinds = dict(zip(schema.categorical, schema.kinds, strict=True))
    alike: dict[tuple, list[str]] = {}
    for name, dtype in frame.schema.items():
        alone = name if name in (schema.label, schema.weight) else None
        key = dtype, kinds.get(name), schema.missing_in.get(name, schema.missing), alone
        alike.setdefault(key, []).append(name)
    columns, of, rows = {}, dict(zip(frame.columns, rules, strict=True)), frame.height
    for names in alike.values():
        long, rule = pl.DataFrame([pl.concat([frame[name] for name in names])]), of[names[0]]
        bad, value = long.select(rule.bad.alias("bad"), rule.value.alias("value")).get_columns()
        if bad.any():
            return None
        columns |= {name: value.slice(i * rows, rows) for i, name in enumerate(names)}
    return Values(pl.DataFrame({name: columns[name] for name in frame.columns}), {})


def _integer_ids(values: pl.Series) -> pl.Series:
    """The ids (UInt32) of integers, or of texts of their digits; null stays null.

    An id is the number itself from 0 to 2^32 - 1, else the hash of its digits.
    """
    numbers = values.cast(pl.Int64, strict=False)
    if numbers.null_count() > values.null_count():
        if values.dtype == pl.String:
            values = values.str.replace(r"\.0+$", "")
        numbers = values.cast(pl.Int128, strict=False)
    ids = numbers.cast(pl.UInt32, strict=False)
    if ids.null_count() > numbers.null_count():
        ids = ids.fill_null(hash_texts(numbers.set(ids.is_not_null(), None).cast(pl.String)))
    return ids


def _reason(rules: list[_Rule | _BagRule], bad: pl.DataFrame, frame: pl.DataFrame, row: int) -> str:
    """What is wrong with a row: the first of its fields that is bad."""
    rule, name, field = next(
        found
        for *found, is_bad in zip(rules, frame.columns, frame.row(row), bad.row(row), strict=True)
        if is_bad
    )
    return f"{name} is {str(field)[:24]!a}, not {rule.words}"
