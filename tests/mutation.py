"""Mutation testing: how many small faults in a module do its mirrored tests notice?

    make mutation MODULES="bundle/predictors.py service/runtime/sizing.py"

Faults: comparisons, arithmetic, logic, numbers, conditions, minus and `not`, calls and assignments left out, results,
loop control, errors not raised or not handled. Text, annotations, decorators and `strict=` stay as they are. It works
on a copy of the checkout; each mutant is tested in a fork of a process that has imported the libraries already.
"""

import argparse
import ast
import importlib
import json
import os
import random
import shlex
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parent.parent
LINKED = ".venv", ".venv-dev", "bundles", "tests/node/node_modules"
OPERATORS = {
    **{ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt)},
    **{ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,)},
    **{ast.NotIn: (ast.In,), ast.And: (ast.Or,), ast.Or: (ast.And,), ast.Add: (ast.Sub,), ast.Sub: (ast.Add,)},
    **{ast.Mult: (ast.Div,), ast.Div: (ast.Mult,), ast.FloorDiv: (ast.Mult,), ast.Mod: (ast.Mult,)},
    **{ast.Pow: (ast.Mult,), ast.BitAnd: (ast.BitOr,), ast.BitOr: (ast.BitAnd,)},
}
Mutant = tuple[ast.AST, str]  # a node and the text that replaces it


def mutants(node: ast.AST, function: bool = False) -> Iterator[Mutant]:
    """Yield the mutants of a node and of all that it contains; `|` outside functions is for types."""
    match node:
        case ast.Compare(left, operators, operands):
            for i, operator in enumerate(operators):
                for other in OPERATORS[type(operator)]:
                    changed = [*operators[:i], other(), *operators[i + 1 :]]
                    yield node, f"({ast.unparse(ast.Compare(left, changed, operands))})"
        case ast.BinOp(left, operator, right) if function or not isinstance(operator, ast.BitOr):
            for other in OPERATORS.get(type(operator), ()):
                yield node, f"({ast.unparse(ast.BinOp(left, other(), right))})"
        case ast.BoolOp(operator, values):
            yield node, f"({ast.unparse(ast.BoolOp(OPERATORS[type(operator)][0](), values))})"
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield node, f"({ast.unparse(operand)})"
        case ast.Constant(bool(value)):
            yield node, str(not value)
        case ast.Constant(int(value) | float(value)):
            yield node, str(value + 1)
        case ast.If(test) | ast.IfExp(test):
            yield from ((test, "True"), (test, "False"))
        case ast.While(test):
            yield test, "False"
        case ast.AugAssign(target, operator, value):
            yield from (
                (node, ast.unparse(ast.AugAssign(target, other(), value))) for other in OPERATORS[type(operator)]
            )
            yield node, "pass"
        case ast.Assign([ast.Name(name)], value):
            if any(isinstance(part, ast.Name) and part.id == name for part in ast.walk(value)):
                yield node, "pass"
        case (
            ast.Assign([ast.Attribute() | ast.Subscript()])
            | ast.Expr(ast.Call() | ast.Await())
            | ast.Raise()
            | ast.Delete()
        ):
            yield node, "pass"
        case ast.Return(ast.expr() as value) if ast.unparse(value) != "None":
            yield node, "return None"
        case ast.Break() | ast.Continue():
            yield node, "continue" if isinstance(node, ast.Break) else "break"
        case ast.ExceptHandler(ast.expr() as caught):
            yield caught, "()"
    function |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for name, field in ast.iter_fields(node):
        for child in field if isinstance(field, list) else [field]:
            kept = name in ("annotation", "returns", "decorator_list") or isinstance(node, ast.JoinedStr)
            kept |= isinstance(node, ast.Call) and name == "args" and ast.unparse(node.func) == "isinstance"
            kept |= isinstance(child, ast.keyword) and child.arg == "strict"
            if isinstance(child, ast.AST) and not kept:
                yield from mutants(child, function)


def apply(source: str, mutant: Mutant) -> str:
    """Return the source with the mutant's text in place of its node."""
    node, text = mutant
    encoded = source.encode()
    starts = [0]
    for line in encoded.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    start, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
    return (encoded[:start] + text.encode() + encoded[end:]).decode()


class FastestFirst:
    """A plugin of pytest that runs the tests in the order of their durations in the last run that passed."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.before, self.seconds = seconds, Counter[str]()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: self.before.get(item.nodeid, 0.0))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration


def test(copy: Path, options: list[str], seconds: float) -> str:
    """Run pytest in a fork, for so many seconds per test; return "passed", "failed" or "hung".

    If all passed, the durations and the names of the imported modules are kept.
    """
    child = os.fork()
    if child == 0:
        log = os.open(copy / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        passed = copy / "passed.json"
        order = FastestFirst(json.loads(passed.read_text())["seconds"] if passed.exists() else {})
        fixed = ["-xq", "-p", "no:cacheprovider", "--hypothesis-profile=ci", f"--basetemp={copy}/tmp/run"]
        fixed += ["--timeout-method=thread", f"--timeout={seconds:.0f}"]
        status = pytest.main([*fixed, *options], plugins=[order])
        if status == 0:
            passed.write_text(json.dumps({"seconds": order.seconds, "imports": list(sys.modules)}))
        os._exit(status)
    _, status = os.waitpid(child, 0)
    if status and "+ Timeout +" in (copy / "log").read_text(errors="replace"):
        for process in psutil.process_iter():  # servers that the test has started
            with suppress(psutil.Error):
                if process.pid != os.getpid() and Path(process.cwd()).is_relative_to(copy):
                    process.kill()
        return "hung"
    return "failed" if status else "passed"


def examine(copy: Path, module: str, limit: int, seed: int, options: list[str]) -> str:
    """Test a sample of the module's mutants; print the survivors and return a row of the table."""
    file = copy / module
    source = file.read_text()
    every = list(mutants(ast.parse(source)))
    sample = random.Random(seed).sample(every, min(limit, len(every)))
    sample.sort(key=lambda mutant: mutant[0].lineno)
    folder, name = module.rsplit("/", 1)
    options = options or [f"tests/{folder}/test_{name}"]
    (copy / "passed.json").unlink(missing_ok=True)
    for _ in range(2):
        if test(copy, options, 600) != "passed":
            sys.exit(f"{module}: expected tests that pass\n{(copy / 'log').read_text()}")
        passed = json.loads((copy / "passed.json").read_text())
        for imported in passed["imports"]:
            if imported.partition(".")[0] not in ("vitrine", "tests"):
                with suppress(Exception):
                    importlib.import_module(imported)
    seconds = 3 * max(passed["seconds"].values()) + 5
    print(f"{module}: {len(every)} mutants, {len(sample)} of them tested, {' '.join(options)}", flush=True)
    found = Counter[str]()
    for number, (node, text) in enumerate(sample, start=1):
        file.write_text(apply(source, (node, text)))
        os.utime(file, (number, number))  # compiled files are told apart by time and size
        outcome = test(copy, options, seconds)
        found[outcome] += 1
        if outcome == "passed":
            segment = " ".join((ast.get_source_segment(source, node) or "").split())
            print(f"{module}:{node.lineno}: {segment}  →  {text}", flush=True)
    file.write_text(source)
    row = f"| `{module}` | {len(every)} | {len(sample)} | {found['failed']} | {found['hung']} | {found['passed']} |"
    print(row, flush=True)
    return row


def main() -> None:
    """Examine the modules named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="+", help="such as bundle/predictors.py")
    parser.add_argument("--limit", type=int, default=150, help="mutants per module, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pytest", default="", help="tests and options instead of the mirrored test file")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="mut-") as temporary:
        copy = Path(temporary) / "c"
        ignored = shutil.ignore_patterns(
            ".git", "__pycache__", ".*cache", ".hypothesis", *(Path(path).name for path in LINKED)
        )
        shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
        for path in LINKED:
            (copy / path).symlink_to(ROOT / path)
        (copy / "tmp").mkdir()
        os.environ |= {"PYTHONPATH": str(copy), "TMPDIR": str(copy / "tmp"), "PYTEST_XDIST_WORKER": "mutation"}
        sys.path[0] = str(copy)
        os.chdir(copy)
        rows = [
            examine(copy, module, arguments.limit, arguments.seed, shlex.split(arguments.pytest))
            for module in arguments.modules
        ]
    print("| module | mutants | tested | failed | hung | survived |", "|---|---|---|---|---|---|", *rows, sep="\n")


if __name__ == "__main__":
    main()
