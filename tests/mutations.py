"""Would a test notice? Small faults are put into modules, one at a time, and the tests run against each.

    python tests/mutations.py                          a sample of every module below
    python tests/mutations.py robe/metrics.py --most 100

What no test notices is printed as it is found: the line, as it was and as it became. Each survivor is a test
that lacks, or a change without consequence (a message's words, a size that only bounds memory); which, a
person has to say. The clone is copied first, and only the copy is changed. No CI runs this: it takes hours.
"""

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Of each module the tests that should see what is wrong with it, the quickest first.
TESTS = {
    "data_pipeline/appearing.py": "prepare resume",
    "data_pipeline/bags.py": "bag_data torchrec",
    "data_pipeline/batches.py": "batches",
    "data_pipeline/columns.py": "columns own_data",
    "data_pipeline/dialects.py": "dialects prepare",
    "data_pipeline/formats.py": "formats own_data",
    "data_pipeline/guesses.py": "schema own_data",
    "data_pipeline/hexadecimal.py": "raw",
    "data_pipeline/input_files.py": "input_files prepare predict",
    "data_pipeline/manifest.py": "prepare",
    "data_pipeline/names.py": "names describe",
    "data_pipeline/npy.py": "torchrec batches prepare",
    "data_pipeline/number_features.py": "prepare resume",
    "data_pipeline/parse_days.py": "input_files prepare resume",
    "data_pipeline/prepare.py": "input_files prepare resume",
    "data_pipeline/proposal.py": "schema own_data",
    "data_pipeline/ranks.py": "resume",
    "data_pipeline/raw.py": "raw",
    "data_pipeline/schema.py": "schema own_data",
    "data_pipeline/shard_files.py": "prepare resume",
    "data_pipeline/splits.py": "splits prepare",
    "data_pipeline/torchrec.py": "torchrec",
    "data_pipeline/whole_files.py": "whole_files prepare",
    "robe/checkpoint.py": "train run convert",
    "robe/config.py": "config",
    "robe/convert.py": "convert",
    "robe/doctor.py": "run",
    "robe/estimate.py": "benchmarks run config",
    "robe/estimator.py": "python",
    "robe/exchange.py": "ranks",
    "robe/export.py": "export",
    "robe/export_weights.py": "export_weights",
    "robe/feed.py": "feed",
    "robe/import_weights.py": "import_weights",
    "robe/interaction.py": "model",
    "robe/layers.py": "model",
    "robe/matmul.py": "matmul",
    "robe/metrics.py": "metrics",
    "robe/model.py": "model",
    "robe/optim.py": "model train",
    "robe/ranks.py": "ranks",
    "robe/run_folder.py": "run python predict",
    "robe/serve.py": "serve",
    "robe/train.py": "train run",
}
SWAPS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


class Mutant:
    """A place in a module and the nodes that stand there and might.

    start, stop: offsets in the source, in bytes.
    """

    def __init__(self, node: ast.AST, text: str):
        self.node, self.text = node, text

    def applied(self, source: str) -> str:
        lines = source.encode().splitlines(keepends=True)
        node = self.node
        before = b"".join(lines[: node.lineno - 1]) + lines[node.lineno - 1][: node.col_offset]
        after = lines[node.end_lineno - 1][node.end_col_offset :] + b"".join(lines[node.end_lineno :])
        return (before + self.text.encode() + after).decode()


def mutants(source: str) -> list[Mutant]:
    """All small faults of a module that still is a Python program."""
    tree, found = ast.parse(source), []
    quiet = {id(part) for node in ast.walk(tree) for part in _told(node)}
    for node in ast.walk(tree):
        if id(node) in quiet:
            continue
        for text in _instead(node):
            found.append(Mutant(node, text))
    return found


def _told(node: ast.AST):
    """What is for people or for type checkers: messages of errors, docstrings, annotations."""
    parts = []
    if isinstance(node, ast.Raise | ast.Assert):
        parts = [node]
    elif isinstance(node, ast.JoinedStr):
        parts = [node]
    elif isinstance(node, ast.FunctionDef):
        parts = [node.returns, *(argument.annotation for argument in node.args.args), *node.decorator_list]
    elif isinstance(node, ast.AnnAssign):
        parts = [node.annotation]
    for part in parts:
        if part is not None:
            yield from ast.walk(part)


def _instead(node: ast.AST) -> list[str]:
    """What could stand where an expression or statement stands, by a slip."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in SWAPS:
            return [ast.unparse(ast.Compare(node.left, [SWAPS[type(op)]()], node.comparators))]
        case ast.BinOp(op=op) if type(op) in SWAPS and not isinstance(
            node.left, ast.Constant | ast.JoinedStr
        ):
            return [f"({ast.unparse(ast.BinOp(node.left, SWAPS[type(op)](), node.right))})"]
        case ast.BoolOp(op=op, values=values):
            return [f"({ast.unparse(ast.BoolOp(SWAPS[type(op)](), values))})", f"({ast.unparse(values[0])})"]
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return [f"({ast.unparse(operand)})"]
        case ast.Constant(value=bool(value)):
            return [str(not value)]
        case ast.Constant(value=int(value)) if value < 1000:
            return [str(value + 1)]
        case ast.IfExp(body=body, orelse=orelse):
            return [f"({ast.unparse(body)})", f"({ast.unparse(orelse)})"]
        case ast.Expr(value=ast.Call()):
            return ["pass"]
        case ast.AugAssign():
            return ["pass"]
        case ast.Return(value=value) if value is not None and not isinstance(value, ast.Constant):
            return ["return None"]
    return []


def survives(folder: Path, tests: list[str], seconds: float) -> bool:
    """Whether the tests pass in a copy of the clone; what takes far too long is noticed too."""
    for test in tests:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            f"tests/test_{test}.py",
        ]
        try:
            ended = subprocess.run(
                command, cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)}, capture_output=True,
                timeout=seconds,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return False
        if ended.returncode:
            return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("modules", nargs="*", default=sorted(TESTS))
    parser.add_argument("--most", type=int, default=20, help="mutants of a module, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=600, help="after which a test file counts as red")
    arguments = parser.parse_args()
    tried = alive = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "clone"
        for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        for module in arguments.modules:
            source, tests = (ROOT / module).read_text(), TESTS[module].split()
            if not survives(folder, tests, arguments.seconds):
                sys.exit(f"{module}: its tests fail as it is")
            found = mutants(source)
            chosen = random.Random(arguments.seed).sample(found, min(arguments.most, len(found)))
            for mutant in sorted(chosen, key=lambda mutant: mutant.node.lineno):
                (folder / module).write_text(mutant.applied(source))
                tried += 1
                if survives(folder, tests, arguments.seconds):
                    alive += 1
                    was = ast.get_source_segment(source, mutant.node)
                    print(f"{module}:{mutant.node.lineno}: {was!r} -> {mutant.text!r}", flush=True)
            (folder / module).write_text(source)
            print(
                f"{module}: {len(chosen)} of {len(found)} tried; so far {alive} of {tried} survive",
                flush=True,
            )


if __name__ == "__main__":
    main()
