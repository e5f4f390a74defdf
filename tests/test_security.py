"""docs/security.md: every promise names its tests, and they exist."""

import ast
import re
from pathlib import Path


def test_every_promise_names_tests_that_exist(root: Path) -> None:
    text = (root / "docs" / "security.md").read_text()
    (table,) = re.findall(r"\| promise \| tests \|\n\|---\|---\|\n((?:\|.*\n)+)", text)
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
    promises = [(promise, tests) for promise, tests in rows if not promise.startswith("**")]
    assert len(promises) > 15
    for promise, tests in promises:
        named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", tests)
        assert named, promise
        assert len(named) == tests.count("`") // 2, promise
        for file, name in named:
            functions = ast.walk(ast.parse((root / file).read_text()))
            assert any(isinstance(node, ast.FunctionDef) and node.name == name for node in functions), f"{file}::{name}"
