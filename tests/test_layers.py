"""The package has floors, and one way down: no module imports from above, or the private part of a wing beside it."""

import ast
import re
from pathlib import Path

import pytest

import fastai_crl

PACKAGE = Path(fastai_crl.__file__).parent
FLOORS = (
    {"mining", "augment", "hpa", "distributed", "_fastai", "_files", "_checks", "unknown"},
    {"images", "labels", "task", "stem"},
    {"losses", "samplers"},
    {"evaluate", "data"},
    {"callback", "mined", "network", "predict"},
    {"learner"},
    {"compare"},
    {"all"},
)
FLOOR = {wing: i for i, wings in enumerate(FLOORS) for wing in wings}


def imports_of(parts, source):
    "Every import of the package in a file's text, `parts` its place: dotted parts of the imported module."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            dotted = [a.name.split(".") for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["fastai_crl", *parts][: len(parts) + 1 - node.level] if node.level else []
            base += node.module.split(".") if node.module else []
            # Of the package itself the names are wings.
            dotted = [[*base, a.name] for a in node.names] if base == ["fastai_crl"] else [base]
        else:
            continue
        within = (tuple(name[1:]) for name in dotted if name[0] == "fastai_crl")
        yield from (name for name in within if name not in ((), ("__version__",)))


def imports():
    "Every import of the package within itself: file, wing of the importer, dotted parts of the imported module."
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        yield from ((file, parts[0], module) for module in imports_of(parts, file.read_text()))


@pytest.mark.parametrize(
    ("source", "modules"),
    [
        ("from fastai_crl import learner as above, labels", ["learner", "labels"]),
        ("from fastai_crl.losses import crl", ["losses"]),
        ("from fastai_crl.losses.crl import CRL", ["losses.crl"]),
        ("import fastai_crl.losses.crl, fastai", ["losses.crl"]),
        ("from .. import callback", ["callback"]),
        ("from ..callback import CRLCallback", ["callback"]),
        ("from . import mine, memory", ["mining"]),
        ("from .mine import mine", ["mining.mine"]),
        ("def late():\n    from fastai_crl import learner", ["learner"]),
        ("from fastai_crl import __version__\nimport fastai_crl\nfrom fastai_crly import learner", []),
    ],
)
def test_every_form_of_import_is_found(source, modules):
    assert [".".join(m) for m in imports_of(("mining", "profile"), source)] == modules


def test_every_wing_has_a_floor():
    found = {f.relative_to(PACKAGE).with_suffix("").parts[0] for f in PACKAGE.rglob("*.py")} - {"__init__"}
    assert found <= set(FLOOR)


def test_the_picture_for_contributors_shows_the_floors():
    page = (PACKAGE.parent / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert [set(re.findall(r"\w+", floor)) for floor in re.findall(r'\["(.*?)"\]', page)] == [*reversed(FLOORS)]


def test_one_way_down():
    for file, wing, (to, *inside) in imports():
        assert FLOOR[to] <= FLOOR[wing], f"{file} imports {to}, which is above it"
        if to != wing and FLOOR[to] == FLOOR[wing]:
            assert not inside, f"{file} imports {to}.{'.'.join(inside)}: of a wing beside it, only what it exports"


def test_no_circles():
    edges = {(wing, to) for _, wing, (to, *_) in imports() if to != wing}
    while edges:
        tops = {a for a, _ in edges} - {b for _, b in edges}
        assert tops, f"these import each other in a circle: {sorted(edges)}"
        edges = {(a, b) for a, b in edges if a not in tops}


def test_only_data_knows_the_human_protein_atlas():
    assert {wing for _, wing, (to, *_) in imports() if to == "hpa"} <= {"data", "all"}


def test_insides_of_fastai_and_torch_are_known_to_one_module():
    "Its tests hold them; `_checks`, which it imports, has the one assertion of torch."
    insides = re.compile(r"""\.tls\b|"tls"|\.fs\b|\bfake_l\b|set_split_idx|"shuffled"|_typed_storage|\btorch\._""")
    found = {f.stem: set(insides.findall(f.read_text())) for f in PACKAGE.rglob("*.py")}
    assert found.pop("_fastai") and found.pop("_checks") == {"torch._"}
    assert not {module: names for module, names in found.items() if names}
