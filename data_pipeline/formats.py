"""What a file holds, by its first bytes and its name; and a stream of that, unpacked where it is packed.

What cannot be read is refused by its right name, with a command that makes something readable of it: a row of
`UNREADABLE`.
"""

import bz2
import gzip
import lzma
import re
import shlex
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from backports import zstd
from isal import igzip, isal_zlib

from data_pipeline.partitions import files_of
from data_pipeline.schema import DataError
from data_pipeline.stores import Stored

Format = Literal["parquet", "arrow", "csv", "json", "raw"]

# What tables are called; all other names are those of raw logs.
SUFFIXES: dict[str, Format] = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".ipc": "arrow",
    ".feather": "arrow",
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "json",
    ".ndjson": "json",
}
BINARY: dict[bytes, Format] = {b"PAR1": "parquet", b"ARROW1\0\0": "arrow"}
JSON_LINE = rb"(\xef\xbb\xbf)?[ \t]*\{[ \t]*(\"|\}[ \t]*\r?\n)"

# Packings that are read: first bytes, name, and what unpacks. ISA-L unpacks gzip 3.5 times as fast as zlib.
PACKINGS: tuple[tuple[bytes, str, Any], ...] = (
    (rb"\x1f\x8b", "gzip", lambda file: igzip.IGzipFile(fileobj=file)),
    (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", "bzip2", bz2.BZ2File),
    (rb"\xfd7zXZ\0", "xz", lzma.LZMAFile),
    # What pzstd writes begins with a frame to be skipped; `zstd --long` takes windows of up to 2^31 bytes.
    (
        rb"(?s)(?:[\x50-\x5f]\x2a\x4d\x18.{4,12})?\x28\xb5\x2f\xfd",
        "zstd",
        lambda file: zstd.ZstdFile(file, options={zstd.DecompressionParameter.window_log_max: 31}),
    ),
    (rb"PK(\x03\x04|\x05\x06)", "zip", None),
)
PACKED = {".gz", ".bz2", ".xz", ".zip", ".zst", ".lz4", ".z"}
# What is raised for a damaged file. Bz2 raises a plain OSError, without a number.
DAMAGES: tuple[Any, ...] = (
    EOFError,
    gzip.BadGzipFile,
    isal_zlib.error,
    zlib.error,
    lzma.LZMAError,
    zstd.ZstdError,
    zipfile.BadZipFile,
)

TAR = "a tar archive"
PARQUET = "write it as Parquet, for example with `"
POLARS = (
    PARQUET + "python -c \"import polars; polars.read_{}('{{path}}').write_parquet('{{stem}}.parquet')\"`"
)
FETCH = "the download failed, so fetch it again"
TABLE = "write it as a table, as docs/own_data.md shows"

# First bytes, what they are the first of, and the way on. {file}, {new} and {text} are names for a shell: of
# the file, of what is packed in it, and of the text to make of it; {path} is its name as it is, {stem} that
# without its suffix.
UNREADABLE = (
    (rb"[\0-\xff]{257}ustar", TAR, "unpack it with `tar xf {file}`, and name a log in it"),
    (rb"\x04\x22\x4d\x18", "packed with LZ4", "unpack it with `lz4 -dc {file} > {new}`"),
    (rb"\x1f\x9d[\x80-\x9f]", "packed with compress", "unpack it with `gzip -dc {file} > {new}`"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it with `7z x {file}`, and name a log in it"),
    (rb"Rar!\x1a\x07", "a RAR archive", "unpack it with `unrar x {file}`, and name a log in it"),
    (rb"version https://git-lfs", "a pointer of Git LFS, not the file", "fetch that with `git lfs pull`"),
    (rb"(?i)\s*<(!doctype html|html|head|body)", "a web page, not data", FETCH),
    (rb"\s*<\?xml", "XML", f"if it tells of an error, {FETCH}; else write its rows as CSV or Parquet"),
    (rb"\s*\[\s*[\[{]|\s*\{\s*\n", "JSON", POLARS.format("json")),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Excel workbook", "save its sheet as CSV (UTF-8)"),
    (rb"SQLite format 3\0", "an SQLite database", "write a table of it with `sqlite3 -csv -header`"),
    (rb"\x89HDF\r\n\x1a\n", "HDF5", PARQUET + "pandas.read_hdf`"),
    (
        rb"\x80[\x02-\x05][\x95c(}\])KMXGNU\x8a]",
        "a Python pickle",
        PARQUET + "pandas.read_pickle` if you trust it",
    ),
    (rb"\x93NUMPY", "an array of NumPy", "write it as Parquet, with a name for each column"),
    (rb"FEA1", "Feather of version 1", PARQUET + "pandas.read_feather`"),
    (rb"\xff{4}[\0-\xff]{3}\0", "a stream of Arrow", POLARS.format("ipc_stream")),
    (rb"ORC[\0-\x1f]", "ORC", PARQUET + "pandas.read_orc`"),
    (rb"Obj\x01", "Avro", POLARS.format("avro")),
    (rb"(?i)\s*(%[^\n]*\n\s*)*@relation\s", "ARFF", "write it as CSV, with a header"),
    (
        rb"\xff\xfe|\xfe\xff|([\t\n\r -~]\0){8}|(\0[\t\n\r -~]){8}",
        "text in UTF-16",
        "convert it with `iconv -f UTF-16 -t UTF-8 {file} > {text}`",
    ),
    (
        rb"(?=[^\n\0]*\Z)[^\r]*\r[^\r]",
        "text whose lines end as on old Macs",
        "convert it with `tr '\\r' '\\n' < {file} > {text}`",
    ),
    (rb"[-+.\deE]+([ \t]+\d+:\d+:[-+.\deE]+)+[ \t]*\r?(\n|\Z)", "in the format of libffm", TABLE),
    (
        rb"[-+.\deE]+([ \t]+qid:\d+)?([ \t]+\d+:[-+.\deE]+)+[ \t]*(#[^\n]*)?\r?(\n|\Z)",
        "in the format of libsvm",
        TABLE,
    ),
)
HEAD_BYTES = 4096
BOM = b"\xef\xbb\xbf"
NOT_UTF8 = "not UTF-8 text"
FROM_GBK = "if it is GBK, `iconv -f GBK -t UTF-8 FILE > NEW` converts it"
MANY_NULS = 100  # so many in the head, and the file is not text


class Contents(NamedTuple):
    """What an open file holds.

    stream: its bytes, unpacked.
    file: the file on disk, whose position tells how far it was read.
    head: the first bytes of the stream, which are still to be read from it.
    packing: what it is packed with, or None.
    name: its name without the suffix of the packing; that of the one file in a zip archive.
    """

    stream: BinaryIO
    file: BinaryIO
    head: bytes
    packing: str | None
    name: str


@contextmanager
def opened(path: Path) -> Iterator[Contents]:
    """The contents of a file, unpacked.

    Raises OSError, and DataError for a format that is known but cannot be read, or a damaged packing; the
    stream raises the errors of DAMAGES for that.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise DataError(f"{path}: is not an ordinary file; write the log to one first")
    with ExitStack() as stack:
        file = stack.enter_context(path.open("rb"))
        head, name = file.peek(HEAD_BYTES), _unpacked_name(path)
        packing, unpack = _packing(head)
        stream: Any = file
        if packing is None:
            _require_readable(path, head)
        else:
            try:
                if packing == "zip":
                    archive = stack.enter_context(zipfile.ZipFile(file))
                    name = _only_member(path, archive)
                    stream = stack.enter_context(archive.open(name))
                else:
                    stream = stack.enter_context(unpack(file))
                head = stream.peek(HEAD_BYTES)
            except DAMAGES as error:
                raise damaged(path, packing, 0, error) from None
            _require_text(path, head, packing)
        yield Contents(stream, file, head, packing, name)


def damaged(path: Path, packing: str | None, line: int, error: Exception) -> DataError:
    """What is raised where a packed file turns out to be damaged after a line."""
    return DataError(f"{path}: {packing} damaged after line {line} ({error}); fetch it again")


def format_of(path: Path) -> Format:
    """The format of a file: what its first bytes tell, else its name, which is all if it cannot be read.

    Raises DataError as `opened` does. A folder is taken for that of the Parquet files below it, if any. In a
    store, binary files are told by their names alone.
    """
    if isinstance(path, Stored) and (named := SUFFIXES.get(path.suffix.lower())) in BINARY.values():
        return named
    if path.is_dir() and files_of(path):
        return "parquet"
    try:
        with opened(path) as contents:
            found, name = _binary(contents.head), contents.name
            if re.match(JSON_LINE, contents.head):
                found = "json"
    except OSError:  # of which its reader tells
        found, name = None, _unpacked_name(path)
    return found or SUFFIXES.get(Path(name).suffix.lower(), "raw")


def header_of(path: Path) -> bytes:
    """The first line of a text file, without its end; nothing if it cannot be read."""
    try:
        with opened(path) as contents:
            return contents.stream.readline(1 << 20).removeprefix(BOM).rstrip(b"\r\n")
    except (OSError, *DAMAGES):  # of which its reader tells
        return b""


def _unpacked_name(path: Path) -> str:
    return path.stem if path.suffix.lower() in PACKED else path.name


def _packing(head: bytes) -> tuple[str | None, Any]:
    return next(((name, unpack) for start, name, unpack in PACKINGS if re.match(start, head)), (None, None))


def _only_member(path: Path, archive: zipfile.ZipFile) -> str:
    """The name of the one file in a zip archive; raises DataError if there is no such, or it is not read."""
    names = archive.namelist()
    if "[Content_Types].xml" in names:
        raise DataError(f"{path}: is an Excel workbook or another document; save its sheet as CSV (UTF-8)")
    if any(name.endswith(".npy") for name in names):
        raise DataError(f"{path}: is an archive of NumPy arrays (.npz); write them as Parquet, with names")
    members = [
        member
        for member in archive.infolist()
        if not member.is_dir() and not member.filename.startswith("__MACOSX/")
    ]
    way_on = f"unpack it with `unzip {shlex.quote(str(path))}`, and name a log in it"
    if len(members) != 1:
        few = ", ".join(member.filename for member in members[:4]) + ", ..." * (len(members) > 4)
        raise DataError(f"{path}: is a zip archive of {len(members)} files ({few}); {way_on}")
    (member,) = members
    if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(f"{path}: is a zip archive that is encrypted or packed in a rare way; {way_on}")
    return member.filename


def _unreadable(head: bytes) -> tuple[str, str] | None:
    """What begins so, and the way on; None if it may be read."""
    if _binary(head):
        return None
    for start, what, way_on in UNREADABLE:
        if re.match(start, head):
            return what, way_on
    if head.count(0) > MANY_NULS:
        return "neither text nor of a known kind", "check where it comes from"
    return None


def _binary(head: bytes) -> Format | None:
    return next((found for start, found in BINARY.items() if head.startswith(start)), None)


def _require_readable(path: Path, head: bytes) -> None:
    """Raise DataError if a file begins like something that is not read."""
    if found := _unreadable(head):
        what, way_on = found
        names = {"path": path, "stem": path.with_suffix(""), **_shell_names(path)}
        raise DataError(f"{path}: is {what}; {way_on.format(**names)}")


def _require_text(path: Path, head: bytes, packing: str) -> None:
    """Raise DataError if what a file holds begins like something that is not read when it is packed."""
    again = _packing(head)[0]
    if again or _binary(head):
        what, way_on = again or _binary(head), "{file}"
    elif found := _unreadable(head):
        what, way_on = found
    else:
        return
    if "{" in way_on and what != TAR:
        unpacks = "unzip {file}" if packing == "zip" else packing + " -dc {file} > {new}"
        way_on = f"unpack it first, with `{unpacks}`"
    raise DataError(f"{path}: is {what} in {packing}; {way_on.format(**_shell_names(path))}")


def _shell_names(path: Path) -> dict[str, str]:
    """The names of a file and of those to make of it, as a shell takes them."""
    new = path.with_name(_unpacked_name(path))
    names = {
        "file": path,
        "new": new if new != path else f"{path}.unpacked",
        "text": path.with_suffix(f".utf8{path.suffix}"),
    }
    return {name: shlex.quote(str(value)) for name, value in names.items()}
