"""Files in object stores, `s3://`, `gs://`, `az://` and `hf://`, as paths; Polars reads and lists them.

Polars takes credentials and endpoints from where the tools of each store do: the variables AWS_*, GOOGLE_*,
AZURE_* and HF_TOKEN, and ~/.aws. A text comes as its lines, unpacked; neither the size of a file nor the time
of its last change is told. A folder is what has files below it; these are listed once for each path.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from data_pipeline.schema import DataError

STORES = r"(s3|gs|az|hf):/"
# A request is repeated so often, and for so long: some seconds where nothing answers.
OPTIONS: Any = {"max_retries": 3, "retry_timeout_ms": 10_000}
BUFFER_BYTES = 1 << 18
# Where the credentials of a store are looked for.
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for what is public",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or GOOGLE_SKIP_SIGNATURE=true for what is public",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "hf": "HF_TOKEN",
}
# What stands in errors of Polars, what it says in words, and the way on.
ERRORS = (
    ("NoSuchBucket", "no such bucket", "check its name, and AWS_ENDPOINT_URL if it is not Amazon's"),
    (r"169\.254\.169\.254|service account file|Account must be", "no credentials", "set {credentials}"),
    (r"40[13] |PermissionError", "may not be read with these credentials", "check {credentials}"),
    ("error sending request", "the store does not answer", "check the network, and the store's endpoint"),
    ("40[04] |FileNotFoundError", "not found", "check the path"),
    (
        "invalid utf8",
        "no UTF-8 text, plain or packed with gzip or Zstandard, and stores give no other texts",
        "copy it to a disk, or call it .parquet or .arrow if it is that",
    ),
)


class Stored(type(Path())):  # type: ignore[misc]
    """A file or a folder in a store, of which the ways to look and to read are those of a path."""

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)

    @cached_property
    def objects(self) -> "tuple[Stored, ...]":
        """The files below it."""
        return tuple(listed(self, "/**/*"))

    @cached_property
    def found(self) -> bool:
        """Whether a file is called so."""
        return self in listed(self, "*")

    def is_dir(self, **options: Any) -> bool:
        return bool(self.objects)

    def is_file(self, **options: Any) -> bool:
        return not self.objects and self.found

    def exists(self, **options: Any) -> bool:
        return bool(self.objects) or self.found

    def iterdir(self) -> "Iterator[Stored]":
        depth = len(self.parts)
        inside: dict[str, list[Stored]] = {}
        for file in self.objects:
            below = inside.setdefault(file.parts[depth], [])
            below += [file] if len(file.parts) > depth + 1 else []
        for name, below in inside.items():
            child = self / name
            child.objects, child.found = tuple(below), not below
            yield child

    def open(
        self,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> Any:
        """Its lines, each ended by a newline; only to read."""
        file = io.BufferedReader(_Lines(self), BUFFER_BYTES)
        return file if "b" in mode else io.TextIOWrapper(file, encoding, errors, newline)


def located(path: Path | str) -> Path:
    """The path, as one of a store if it names a file there; `Path` makes one slash of the two."""
    path = path if isinstance(path, Path) else Path(path)
    return Stored(path) if re.match(STORES, str(path)) and not isinstance(path, Stored) else path


def require_disk(path: Path, what: str) -> None:
    """Raise DataError if a path is in a store: `what` it would be is on disks alone."""
    if isinstance(path := located(path), Stored):
        raise DataError(f"{path}: {what} on a disk, not in a store; name a path there, and copy it")


def listed(path: Stored, more: str = "") -> list[Stored]:
    """The files that match a path with `more` behind it, in the order of their names."""
    # Polars has no public way to list files without reading them.
    from polars.io._expand_paths import _expand_paths

    with asking(path):
        names = _expand_paths(f"{path}{more}", storage_options=OPTIONS).collect()["path"]
    files = [*map(Stored, names)]
    for file in files:
        file.objects, file.found = (), True
    return files


def matching(pattern: Stored) -> list[Stored]:
    """The files that match a pattern; if there are none, the folders."""
    if (files := listed(pattern)) or "**" in pattern.parts:
        return files
    depth = len(pattern.parts)
    return [*dict.fromkeys(Stored(*file.parts[:depth]) for file in pattern.objects)]


@contextmanager
def asking(path: Path) -> Iterator[None]:
    """Turn what Polars raises about a path in a store into a DataError of one line."""
    import polars as pl

    try:
        yield
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path}: {_told(path, error)}") from None


def _told(path: Path, error: Exception) -> str:
    """What a store, or a file in it, has against being read, and the way on."""
    text = f"{type(error).__name__}: {error}"
    found = ((words, way_on) for pattern, words, way_on in ERRORS if re.search(pattern, text))
    words, way_on = next(found, ("cannot be read", "check the path, and set {credentials}"))
    # Without the answer of the server, and a path that may be of another request.
    reason = re.split(r"<\?xml| \(path: |\n", str(error).removeprefix("object-store error: "))[0].rstrip(": ")
    return f"{words} ({reason}); {way_on.format(credentials=CREDENTIALS[path.parts[0][:-1]])}"


class _Lines(io.RawIOBase):
    """The lines of a text in a store, as its bytes would be if each ended with a newline."""

    def __init__(self, path: Stored):
        import polars as pl

        self.path, self.read_so_far, self.rest = path, 0, memoryview(b"")
        log = pl.scan_lines(str(path), glob=False, storage_options=OPTIONS)
        self.parts: Any = iter(log.collect_batches(maintain_order=True))

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.read_so_far

    def readinto(self, buffer: Any) -> int:
        while not self.rest:
            with asking(self.path):
                part = next(self.parts, None)
            if part is None:
                return 0
            text = io.BytesIO()
            part.write_csv(text, include_header=False, quote_style="never")
            self.rest = text.getbuffer()
        count = min(len(buffer), len(self.rest))
        buffer[:count], self.rest = self.rest[:count], self.rest[count:]
        self.read_so_far += count
        return count
