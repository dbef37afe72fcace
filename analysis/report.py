"""One page of HTML from what the scripts found, complete in itself, to be read like a short paper."""

import base64
import html
import inspect
import os
import platform
import re
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from analysis.claim import FOLDER, Result, Rows, columns
from data_pipeline.names import shown
from data_pipeline.whole_files import write_whole
from robe.train import versions

ROOT = FOLDER.parent
MOST_ROWS = 200  # of a table of measurements; the CSV file has all
LINKED = re.compile(r"(?:robe|analysis|data_pipeline|docs)/[\w/]+\.\w+")

STYLE = """
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 Georgia, serif; color: #222; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 3rem; border-top: 1px solid #ccc; padding-top: 1.5rem; }
img { width: 100%; } pre, code { font: 14px/1.4 monospace; } pre { background: #f4f4f4; padding: .5rem 1rem; }
table { border-collapse: collapse; font: 14px/1.4 sans-serif; margin: 1rem 0; }
td, th { padding: .15rem .6rem; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top; }
.scroll { overflow: auto; max-height: 30rem; }
.holds { color: #176b2c; } .fails { color: #b00020; font-weight: bold; }
"""


def write(results: list[Result], out: Path) -> Path:
    """OUT/report.html of these results."""
    held = sum(result.verdict.holds for result in results)
    count = "All" if held == len(results) else f"{held} of"
    facts = {
        "made": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "by": shown(shlex.join(["python", *sys.argv])),
        "on": f"{platform.system()}, {platform.machine()}, {os.cpu_count()} processors",
        "with": ", ".join(f"{name} {v}" for name, v in (versions() | _own_versions()).items()),
    }
    overview = [
        {
            "claim": f'<a href="#{_name(result)}">{html.escape(_title(result))}</a>',
            "verdict": _verdict(result.verdict.holds),
            "checks": len(result.verdict.checks),
            "seconds": f"{result.seconds:.1f}",
        }
        for result in results
    ]
    page = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>ROBE analysis</title>',
        f"<style>{STYLE}</style>",
        "<h1>Shared embeddings: the theory held against measurements</h1>",
        "<p>A ROBE array stands for embedding tables many times its size: every block of Z elements of the "
        "virtual table is read from a hashed position in one array. Each section states one claim about such "
        "arrays, shows theory and measurements on the same axes, and ends in a verdict, which also asks that "
        "wrong formulas and bad hashes be rejected.</p>",
        f"<p><b>{count} {len(results)} claims hold.</b></p>",
        _table(overview),
        _table([{"": key, " ": html.escape(value)} for key, value in facts.items()]),
        *(_section(result, out) for result in results),
        "</html>\n",
    ]
    path = out / "report.html"
    write_whole(path, "\n".join(page))
    return path


def _section(result: Result, out: Path) -> str:
    name, (holds, text, checks) = _name(result), result.verdict
    image = base64.b64encode(result.figure.read_bytes()).decode()
    told = [
        {"": _verdict(c.holds), "check": html.escape(c.what), "found": html.escape(c.found)} for c in checks
    ]
    plain = (bool, int, float, str, Path)
    settings = ", ".join(f"{k} = {v}" for k, v in result.settings.items() if isinstance(v, plain))
    rows = [{k: _cell(v) for k, v in row.items()} for row in result.rows[:MOST_ROWS]]
    part = f"the first {MOST_ROWS} of " if len(result.rows) > MOST_ROWS else ""
    return "\n".join(
        [
            f'<h2 id="{name}">{html.escape(_title(result))}</h2>',
            _prose(inspect.getdoc(result.script).partition("\n")[2], out),
            f"<p>Code: {', '.join(_sources(result, out))}. Measured with {html.escape(shown(settings))}.</p>",
            f'<img alt="figure of {name}" src="data:image/png;base64,{image}">',
            f"<p>Verdict: {_verdict(holds)}; {html.escape(text)}.</p>",
            _table(told),
            f"<details><summary>Measurements: {part}{len(result.rows):,} rows ({name}.csv)</summary>",
            f'<div class="scroll">{_table(rows)}</div></details>',
        ]
    )


def _name(result: Result) -> str:
    return Path(result.script.__file__).stem


def _title(result: Result) -> str:
    return inspect.getdoc(result.script).partition("\n")[0].removesuffix(".")


def _own_versions() -> dict[str, str]:
    return {name: version(name) for name in ("scipy", "matplotlib")}


def _verdict(holds: bool) -> str:
    return f'<span class="{"holds" if holds else "fails"}">{"holds" if holds else "FAILS"}</span>'


def _cell(value) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return "" if value is None else html.escape(str(value))


def _table(rows: Rows) -> str:
    """Rows whose values are HTML."""
    names = columns(rows)
    lines = ["".join(f"<th>{name}</th>" for name in names)]
    lines += ["".join(f"<td>{row.get(name, '')}</td>" for name in names) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _link(path: str, out: Path, text: str) -> str:
    return f'<a href="{os.path.relpath(ROOT / path, out)}">{text}</a>'


def _sources(result: Result, out: Path) -> list[str]:
    """Links to the functions that state, measure and judge the claim."""
    path = f"analysis/{_name(result)}.py"
    functions = [f for f in ("bound", "measure", "verdict") if hasattr(result.script, f)]
    lines = [inspect.getsourcelines(getattr(result.script, f))[1] for f in functions]
    return [_link(path, out, f"{f} ({path}:{n})") for f, n in zip(functions, lines, strict=True)]


def _prose(text: str, out: Path) -> str:
    """A docstring as HTML: paragraphs, lists, indented lines as they stand, `code` and links to files."""

    def inline(piece: str) -> str:
        piece = LINKED.sub(lambda m: _link(m[0], out, m[0]), html.escape(piece, quote=False))
        return re.sub(r"`([^`]+)`", r"<code>\1</code>", piece)

    parts = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        if block.startswith("    "):
            parts.append(f"<pre>{inline(inspect.cleandoc(block))}</pre>")
            continue
        lead, *items = re.split(r"^(?=\d+\. |- )", block, flags=re.M)
        if lead.strip():
            parts.append(f"<p>{inline(lead)}</p>")
        for item in items:
            mark, _, rest = item.partition(" ")
            kind = "<ul><li>" if mark == "-" else f'<ol start="{mark[:-1]}"><li>'
            parts.append(f"{kind}{inline(rest)}</li></{kind[1:3]}>")
    return "\n".join(parts)
