"""Names as people read them. A column, a file or a value may be called anything: what its name would do to
a terminal or to a line of text is written out."""

import re
from collections.abc import Collection

from rich.cells import cell_len

# Characters that Python counts as printable but that show nothing: fillers, and selectors of variants.
BLANK = re.compile(
    r"[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)


def unseen(c: str) -> bool:
    """Whether a character shows nothing, or does something to the text around it."""
    return not c.isprintable() or BLANK.match(c) is not None


def shown(name: object, lacking: Collection[str] = ()) -> str:
    r"""The text of a name, in one line, each of whose characters can be seen.

    What has no glyph (control characters, line ends, marks of direction and of width zero, blanks other than
    the space, bytes of a file's name that are not UTF-8), and the characters in `lacking`, become escapes as
    in Python, such as \n and \u202e. All else, backslashes too, stays as it is.
    """
    return "".join(c.encode("unicode_escape").decode() if unseen(c) or c in lacking else c for c in str(name))


def fitted(text: str, cells: int) -> str:
    """A text in at most so many columns of a terminal: of one that is longer, the beginning and the end."""
    if max(len(text), cell_len(text)) <= cells:
        return text
    end = text[-(cells // 3) :]
    while cell_len(end) > cells // 3:
        end = end[1:]
    start = text[: cells - 3 - len(end)]
    while cell_len(start) + 3 + cell_len(end) > cells:
        start = start[:-1]
    return f"{start}...{end}"
