"""Docstrings tell arguments and errors in Google's sections; ruff sees that such a section names every argument."""

import ast
import re
from pathlib import Path

import pytest

import fastai_crl

PACKAGE = Path(fastai_crl.__file__).parent
SECTION = re.compile(
    r"^(?:Args|Attributes|Returns|Raises|Example):\n(?:(?: .*)?\n)*", re.M
)  # to the next line in front


def in_prose(node: ast.FunctionDef) -> list[str]:
    """What a function's docstring tells of arguments and errors outside its sections."""
    text = SECTION.sub("", (ast.get_docstring(node) or "") + "\n")
    names = "|".join(arg.arg for arg in ast.walk(node.args) if isinstance(arg, ast.arg)) or "-"
    return re.findall(rf"Raises [A-Z]\w+|^`?(?:{names})`?(?:, \w+)*: ", text, re.M)


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_arguments_and_errors_are_in_sections(file):
    functions = [n for n in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(n, ast.FunctionDef)]
    assert not {f.name: prose for f in functions if (prose := in_prose(f))}
