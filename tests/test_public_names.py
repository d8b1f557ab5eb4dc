"""Every public name is used by an example that a test runs: a doctest, or the code of README, guide or a notebook."""

import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fastai_crl"
WINGS = sorted(f"fastai_crl.{p.parent.name}" for p in PACKAGE.glob("*/__init__.py"))


def examples() -> str:
    """What stands behind `>>>` and `...` in the package, in the blocks of Python of the pages, in cells of code."""
    sources = [p.read_text(encoding="utf-8") for p in PACKAGE.rglob("*.py")]
    doctests = [re.findall(r"^ *(?:>>>|\.\.\.) (.*)", text, re.M) for text in sources]
    pages = [ROOT / "README.md", *(ROOT / "examples" / "guide").glob("*.md")]
    blocks = [re.findall(r"^```py(?:thon)?\n(.*?)^```$", p.read_text(encoding="utf-8"), re.M | re.S) for p in pages]
    books = [json.loads(p.read_text(encoding="utf-8"))["cells"] for p in (ROOT / "examples").glob("*.ipynb")]
    cells = [["".join(c["source"]) for c in book if c["cell_type"] == "code"] for book in books]
    return "\n".join(line for texts in (*doctests, *blocks, *cells) for line in texts)


# An import uses nothing, nor does a comment.
USED = set(re.findall(r"\w+", re.sub(r"^(?:from|import) .*|#.*", "", examples(), flags=re.M)))


@pytest.mark.parametrize("module", ["fastai_crl.all", *WINGS])
def test_each_name_has_an_example(module):
    names = importlib.import_module(module).__all__
    assert len(names) > 0
    missing = [name for name in names if name not in USED]
    assert not missing, ", ".join(missing)
