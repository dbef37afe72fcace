"""What a column of a table seems to be, by its name and by its first values: `look`.

A name says more than values can. 37 is an id in `user` and a number in `age`, and nothing but its name tells
that `dwell_time` is known only after the click. Where neither decides, the guess comes with its doubts.
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import polars as pl

from data_pipeline.columns import EXACT, INTEGER, LARGEST, NUMBER, TRUTH, times
from data_pipeline.names import unseen
from data_pipeline.schema import PARTS, Bag

# What programs write for a missing value; only if all other values of the column are numbers does it mean so.
NOTHING = ("", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", "-", "?", "\\N")
FEW = 32  # up to so many distinct integers are taken for codes rather than counts
ROWS = 10  # so many rows in rising order are no chance

CODES = set(
    """
    ad adgroup adset advertiser aid aisle album app area article artist asin author banner barcode
    bin book brand browser bucket business campaign carrier cat cate category channel cid city class
    client cluster cms code color colour company cookie country county creative crowd currency
    customer department device district doc document domain driver ean emp employee entity feature
    flag gender genre geo gid group guid hash hotel hour id iid impression ip isbn isp item job key
    keyword kind lang language level listing locale location make manager market member merchant
    model month movie network news node occupation offer oid org os page partner pid place plan
    platform position post postal postcode product profession profile province publisher query
    region restaurant room route seg segment seller service session sex shop show sid site sku slot
    song source state station status store street subcategory supplier tag team template tid title
    tower track type uid upc url user uuid vendor venue version vid video visitor warehouse website
    weekday zip zipcode zone
    """.split()
)
MEASURES = set(
    """
    age ago amount average avg balance bid budget capacity cnt cost count ctr days depth discount
    distance duration elevation fee freq frequency height hours income kilometers km lat latitude
    length lng lon longitude max mean median mileage min minutes ms num number pct percent
    percentage population price prob probability qty quantity rate ratio salary score sec seconds
    secs share since size speed std stock sum temp temperature time total value views visits volume
    weight width
    """.split()
)
COUNTS = {"n", "nb", "nr", "no", "num", "number", "count", "cnt", "total", "sum", "avg", "mean", "average"}
TIMES = {"timestamp", "time", "ts", "date", "datetime", "unixtime", "dt", "created", "updated"}
CLICKS = {"click", "clicked", "clk", "clicks"}
# What happens once something was clicked, and what may stand beside it in the name of a column.
AFTER = set(
    """
    attributed attribution booked booking bought buy checkout conversion conversions convert
    converted converts dwell install installed ordered paid payment playtime purchase purchased
    purchases refund refunded revenue sold watched
    """.split()
)
BESIDE = (CLICKS | TIMES).union(
    """
    after amount at bool delay did duration end eur first flag has id in is label made ms price s
    sec seconds secs start status to until usd user value was
    """.split()
)
FLAGS = {"is", "has", "was", "did", "flag", "bool", "label", "user"}
# A verb and a span of time: how long someone looked.
LOOKING = set("listen listening page play playing read reading spent stay view viewing watch watched".split())
LASTING = set("duration minutes ms on pct percent rate ratio sec seconds secs time".split())
# What else people do with a thing they see; a column of 0 and 1 called so is an outcome.
DEEDS = (AFTER | CLICKS).union(
    """
    cart churn churned comment commented default favorite favourite follow followed forward hate
    like liked responded response returned save saved share shared skip skipped subscribe subscribed
    """.split()
)
# These make of it what was known before.
BEFORE = set(
    """
    ago average avg before cnt count ctr cum cumulative cvr days ever freq frequency hist historical
    history lag last max mean median min n num past prev previous prior rate recent since std sum
    total
    """.split()
)

TIME_STAMP = "a time stamp"  # what is told of a column of times
SECONDS = 631_152_000, 2_208_988_800  # 1990 to 2040
_MONTH = "(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*"
_CLOCK = r"[0-9]{1,2}:[0-9]{2}(?::[0-9]{2}(?:[.,][0-9]+)?)?"
_DATES = (
    "[0-9]{4}[-/.][0-9]{1,2}[-/.][0-9]{1,2}",
    "[0-9]{1,2}[-/.][0-9]{1,2}[-/.][0-9]{2,4}",
    f"(?:[a-z]{{3,9}},? )?[0-9]{{1,2}}[-/ ]{_MONTH}[-/ ,]+[0-9]{{2,4}}",
    f"(?:[a-z]{{3,9}},? )?{_MONTH} [0-9]{{1,2}},? [0-9]{{2,4}}",
)
DATE = rf"(?i)^(?:{'|'.join(_DATES)})(?:[T :]+{_CLOCK} ?[a-z0-9:+-]*)?$|^{_CLOCK}$"
DAY = r"^(?:19|20)[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])(?:[0-9]{2}){0,3}$"
COMMAS = r"^-?[0-9]+(?:,[0-9]+)*(?:\.[0-9]+)?$"
UNITS = r"^[$€£¥]? ?-?[0-9][0-9.,]* ?(?:[%$€£¥]|[a-zA-Z]{1,3})?$"
UNIT = r"[$€£¥%a-zA-Z]"
BLANK = r"^\s|\s$"
BRACKETS = r"^\[.*\]$|^\{.*\}$"
SENTENCE = r"\S \S+ \S+ \S"
UNIQUE = {"uuid", "guid", "request", "impression", "event", "row"}
SEPARATORS = "|;^~,"  # between what a cell lists, the likeliest first
LIST = r"[^|;^~,]\s*[|;^~,]\s*[^|;^~,]"


class Look(NamedTuple):
    """What a column looks like.

    kind: dense, time, or a kind of categorical column (see `Schema`), or None if it cannot be used.
    words: what is told of it in a comment.
    doubts: what its owner should think of, in words.
    left_out: why it is no feature, in words, or "".
    nothing: the texts in it that seem to mean a missing value.
    numbers: its values (rows,) as Float64, null where missing, if they are numbers or true and false.
    code: whether it could be embedded as `integer`.
    distinct: how many values it has.
    bag: how its cells hold several values, if they do.
    parts: what of its times could be features, if it holds times.
    """

    kind: str | None
    words: str
    doubts: tuple[str, ...] = ()
    left_out: str = ""
    nothing: frozenset[str] = frozenset()
    numbers: pl.Series | None = None
    code: bool = False
    distinct: int = 0
    bag: Bag | None = None
    parts: tuple[str, ...] = ()

    def only(self, values: set[float]) -> bool:
        """Whether none is missing, and all are among these."""
        return self.numbers is not None and self.numbers.null_count() == 0 and set(self.numbers) <= values


def look(column: pl.Series) -> Look:
    """What a column seems to be; none of its values need be there."""
    name, column = column.name, column.alias("")  # Polars takes some names for patterns
    if isinstance(column.dtype, pl.Categorical | pl.Enum):
        column = column.cast(pl.String)
    if column.null_count() == column.len():
        return Look(None, "no value")
    if name == "*" or (name.startswith("^") and name.endswith("$")):
        return Look(None, "a name that is a pattern; rename it in the file")
    if column.dtype == pl.String:
        found = _text(name, column)
    elif column.dtype.is_numeric() or column.dtype == pl.Boolean:
        found = _number(name, column, frozenset())
    elif isinstance(column.dtype, pl.Date | pl.Datetime):
        found = Look("time", str(column.dtype), left_out=TIME_STAMP, parts=_parts(column))
    elif column.dtype.is_temporal():
        return Look(None, f"{TIME_STAMP}, {column.dtype}")
    elif isinstance(column.dtype, pl.List | pl.Array) and (found := _lists(column)):
        pass
    elif column.dtype.is_nested():
        return Look(None, f"neither number nor text but {column.dtype}; give each part a column of its own")
    else:
        return Look(None, f"neither number nor text but {column.dtype}")
    if found.kind and not found.left_out and found.distinct == 1:
        found = found._replace(doubts=(*found.doubts, "the same in all these rows"))
    if found.kind and is_after(name):
        found = found._replace(left_out="known only after the click, by its name")
    elif words(name) & (AFTER | CLICKS) and words(name) & BEFORE:
        doubt = "if it counts what came after this row, leave it out"
        found = found._replace(doubts=(*found.doubts, doubt))
    return found


def words(name: str) -> set[str]:
    """The words in a name like user_id, userId or UserID."""
    return set(_words(name))


def is_after(name: str) -> bool:
    """Whether a column of that name says what happened once something was clicked."""
    parts = words(name)
    if parts & BEFORE:
        return False
    deed = parts & AFTER and parts <= AFTER | BESIDE
    clicked = parts & CLICKS and parts & BESIDE - CLICKS - FLAGS
    return bool(deed or clicked or (parts & LOOKING and parts & LASTING))


def _words(name: str) -> list[str]:
    found = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+|[^\W\d_a-zA-Z]+", name)
    return [word.lower() for word in found]


def _singular(word: str) -> str:
    return word[:-3] + "y" if word.endswith("ies") else word.removesuffix("s")


def _is_code(word: str) -> bool:
    stem = word.removesuffix("id")
    return word in CODES or _singular(word) in CODES or (stem != word and stem in CODES)


def role(name: str) -> str:
    """`code`, `measure` or "": what a name says of the whole numbers below it."""
    parts = _words(name)
    if not parts:
        return ""
    measures = [word for word in parts if word in MEASURES or _singular(word) in MEASURES]
    if parts[0] in COUNTS and len(parts) > 1:  # num_users, but not user_number
        return "measure"
    if parts[-1] in MEASURES or _singular(parts[-1]) in MEASURES:
        return "measure"
    if _is_code(parts[-1]) and not (measures and parts[-1] not in ("id", "group", "code", "class", "bucket")):
        return "code"
    if measures:
        return "measure"
    return "code" if any(map(_is_code, parts)) else ""


def _text(name: str, column: pl.Series) -> Look:
    column = column.fill_null("")
    values = column.filter(~column.is_in(NOTHING))
    nothing = frozenset(NOTHING) & set(column)
    if values.str.contains(NUMBER).all():
        return _number(name, column.set(column.is_in(NOTHING), None), nothing)

    values = column.filter(column != "")
    found = Look("string", _about(column, values), distinct=values.n_unique())
    if reason := _unlike_text(name, values):
        return found._replace(left_out=reason, parts=_parts(values) if reason == TIME_STAMP else ())
    if values.str.contains("^[0-9a-f]{8}$").all():
        return found._replace(kind="hex")
    if values.len() == column.len() and set(values) <= TRUTH.keys():
        return found._replace(numbers=column.replace_strict(TRUTH).cast(pl.Float64))
    return _listing(column, values) or found._replace(doubts=tuple(_doubts(values, nothing - {""})))


def _parts(values: pl.Series) -> tuple[str, ...]:
    """The parts of times that differ in some table; none of texts that are no times of ISO 8601."""
    values = values.drop_nulls()
    time = values.to_frame().select(times(pl.col(values.name), values.dtype)).to_series()
    if time.null_count():
        return ()
    return PARTS if (time != time.dt.truncate("1d")).any() else ("weekday",)  # else dates alone


def _listing(column: pl.Series, values: pl.Series) -> Look | None:
    """A column of texts, of which `values` are not empty, as one of bags; None if it seems to be none.

    It is one if a tenth of the cells have a separator, and what stands between comes again in others.
    """
    for separator in SEPARATORS:
        if values.str.contains(separator, literal=True).mean() >= 0.1:  # type: ignore[operator]
            ids = values.str.split(separator).explode()
            blanks = ids.str.contains(BLANK).any()
            ids = ids.filter(ids != "")
            if not blanks and ids.n_unique() < values.n_unique():
                return _bag(column, ids, Bag(separator=separator))
    return None


def _lists(column: pl.Series) -> Look | None:
    """A column of lists as one of bags; None if they hold what cannot be ids."""
    lists = column.arr.to_list() if isinstance(column.dtype, pl.Array) else column
    ids, bag = lists.filter(lists.list.len() > 0).explode().drop_nulls(), Bag()
    if isinstance(ids.dtype, pl.Struct):
        if len(ids.struct.fields) != 2 or not ids.dtype.fields[1].dtype.is_numeric():
            return None
        ids, bag = ids.struct.field(ids.struct.fields[0]).drop_nulls(), Bag(weights=True)
    return _bag(column, ids, bag)


def _bag(column: pl.Series, ids: pl.Series, bag: Bag) -> Look | None:
    """A column of bags of these ids; None where these can be no ids."""
    if ids.dtype == pl.String:
        kind = "integer" if ids.str.contains(INTEGER).all() else "string"
    elif ids.dtype.is_integer():
        kind = "integer"
    else:
        return None
    words = f"{ids.n_unique():,} distinct, {ids.len() / column.len():.3g} in a row"
    return Look(kind, words, distinct=ids.n_unique(), bag=bag)


def _unlike_text(name: str, values: pl.Series) -> str:
    """Why a column of texts, none of them empty, is no feature as it is, in words; "" if it is one."""
    bare = values.str.strip_chars()
    if bare.str.contains(NUMBER).all():
        return f"numbers with blanks, as in {_example(values, BLANK)}; remove the blanks from the file"
    if bare.str.contains(COMMAS).all():
        return f"numbers with commas, as in {_example(values, ',')}; write a point before decimals alone"
    if bare.str.contains(DATE).all():
        return TIME_STAMP
    if values.n_unique() == values.len() >= ROWS and (words(name) & UNIQUE or words(name) == {"id"}):
        return "another value in each row, as of an id of the row"
    return ""


def _doubts(values: pl.Series, marks: frozenset[str]) -> Iterator[str]:
    """What to think of before texts, none of them empty, are embedded; `marks` often mean a missing one."""
    if values.str.contains(UNITS).all() and values.str.contains(UNIT).all():
        yield f"numbers with units, as in {_shown(values[0])}: texts, unless you remove the units"
    elif (share := _share(values, NUMBER)) >= 0.5:
        other = _shown(values.filter(~values.str.contains(NUMBER))[0])
        yield f"{share:.0%} are numbers, but not {other}: texts, unless [missing_in] names all such"
    elif marks:
        yield f"{listed(marks)} are values here; if they mean a missing one, write so under [missing_in]"
    if _share(values, LIST) >= 0.1:
        yield f"cells like {_example(values, LIST)} are one value, not taken apart: a|b and b|a are two ids"
    elif _share(values, BRACKETS) >= 0.1:
        yield f"cells like {_example(values, BRACKETS)} are one value, not taken apart"
    elif _share(values, SENTENCE) >= 0.5:
        yield f"cells like {_example(values, SENTENCE)} are one value, not taken apart"
    if values.n_unique() == values.len() >= ROWS:
        yield "another value in each row: does any come back?"


def _number(name: str, column: pl.Series, nothing: frozenset[str]) -> Look:
    """A column of numbers, or of their texts; null where missing."""
    numbers = column.cast(pl.Float64, strict=False).fill_nan(None)
    values = column.filter(numbers.is_not_null())
    if values.is_empty():
        return Look(None, "no value")
    known = numbers.drop_nulls().to_numpy()
    distinct, least, most = values.n_unique(), known.min(), known.max()
    about = _about(column, values)
    if column.dtype == pl.String:
        code, floats = bool(values.str.contains(INTEGER).all()), bool(values.str.contains("[.eE]").any())
    else:
        floats = column.dtype.is_float() or column.dtype.is_decimal()
        limit = EXACT.get(column.dtype, 0)
        code = not floats or bool((known == known.round()).all() and np.abs(known).max() <= limit)
    if column.dtype == pl.String and values.str.contains("^-?0[0-9]").any():
        return Look("string", f"{about}, zeros in front", nothing=nothing, numbers=numbers, distinct=distinct)
    if np.abs(known).max() >= LARGEST:
        kind = "integer" if code else "string" if column.dtype == pl.String else None
        about += ", numbers of 1e38 and beyond, or infinite"
        return Look(kind, about, nothing=nothing, distinct=distinct)

    span = f"{_plain(least)} to {_plain(most)}"
    found = Look("dense", f"{span}, {about}", (), "", nothing, numbers, code, distinct)
    doubts, said = [], role(name)
    if reason := _in_order(name, column, found, said):
        return found._replace(kind="integer" if code else "dense", left_out=reason)
    if code and said != "measure" and not (floats and said != "code" and numbers.null_count() == 0):
        if said == "code" or distinct <= FEW:
            found = found._replace(kind="integer", words=about)
        elif _spread(known):
            found = found._replace(kind="integer")
            doubts.append("or a number? then under dense")
        else:
            doubts.append("or a code? then under [categorical]")
    if found.kind == "integer" and numbers.null_count() and (known == 0).any():
        doubts.append("0 and a missing value share an id")
    if found.kind == "dense" and least < 0 and max(-least, most) > 100:
        doubts.append("large for a model as they are: better scaled in the file")
    return found._replace(doubts=tuple(doubts))


def _in_order(name: str, column: pl.Series, found: Look, said: str) -> str:
    """Why a column of numbers is a row number or a time stamp, in words; "" if it is neither."""
    assert found.numbers is not None
    known, parts = found.numbers.drop_nulls(), words(name)
    if parts & BEFORE:
        return ""
    timed = bool(parts & TIMES) or bool(re.search(r"(?:_at|[a-z]At)$", name))
    least, most = known.min(), known.max()
    unix = any(SECONDS[0] * k <= least and most <= SECONDS[1] * k for k in (1, 1e3, 1e6, 1e9))  # type: ignore[operator]
    if unix and (timed or said == ""):
        return TIME_STAMP
    if found.code and (timed or parts & {"day", "hour"} or said == ""):
        texts = known.cast(pl.Int64, strict=False).cast(pl.String)
        if texts.str.contains(DAY).all() or ("hour" in parts and most > 10**7):  # type: ignore[operator]
            return TIME_STAMP
    if timed and found.distinct > FEW:
        return TIME_STAMP
    index = (
        name == ""
        or parts & {"index", "unnamed", "row", "rowid", "rownum", "rowno", "idx"}
        or parts == {"id"}
    )
    if found.code and known.len() == column.len() and known.len() >= (2 if index else ROWS):
        exact = column.cast(pl.Int128, strict=False)
        steps = (known if exact.null_count() else exact).diff().drop_nulls()
        if (steps > 0).all() or (steps < 0).all():
            return "another number in each row, in order: a row number or a time stamp"
        if index and found.distinct == known.len() >= ROWS:
            return "another number in each row, as of an id of the row"
    return ""


def _spread(numbers: np.ndarray) -> bool:
    """Whether numbers lie all over their range, as codes do; counts crowd low in it, sizes in the middle."""
    least, most = numbers.min(), numbers.max()
    share = (numbers - least) / (most - least)
    return bool((share < 0.1).mean() <= 0.5 and (np.abs(share - 0.5) < 0.25).mean() <= 0.75)


def _share(values: pl.Series, pattern: str) -> float:
    return float(values.str.contains(pattern).to_numpy().mean())


def _example(values: pl.Series, pattern: str) -> str:
    return _shown(values.filter(values.str.contains(pattern))[0])


def _plain(number: float) -> str:
    return f"{number:.0f}" if number == round(number) and abs(number) < 1e16 else f"{number:g}"


def _about(column: pl.Series, values: pl.Series) -> str:
    missing = 1 - values.len() / column.len()
    return f"{values.n_unique():,} distinct" + (f", {missing:.1%} missing" if missing else "")


def quoted(text: str) -> str:
    """A text as TOML writes it, with escapes for what cannot be seen; what is not UTF-8, as names of files
    may be, becomes a question mark."""
    text = json.dumps(text.encode(errors="replace").decode(), ensure_ascii=False)
    return "".join(rf"\U{ord(c):08x}" if unseen(c) else c for c in text)


def listed(texts: Iterable[str]) -> str:
    return f"[{', '.join(map(quoted, sorted(texts)))}]"


def _shown(text: str) -> str:
    return quoted(text if len(text) <= 40 else text[:37] + "...")
