"""The package has floors, and one way down: no module imports from above, or the private part of a wing beside it."""

import ast
from pathlib import Path

import fastai_crl

PACKAGE = Path(fastai_crl.__file__).parent
FLOORS = (
    {"augment", "labels", "hpa", "distributed", "_fastai", "_checks", "_errors"},
    {"mining", "images", "samplers", "synthetic"},
    {"losses", "evaluate", "data"},
    {"callback"},
    {"learner"},
    {"all"},
)
FLOOR = {wing: i for i, wings in enumerate(FLOORS) for wing in wings}


def imports():
    "Every import of the package within itself: file, wing of the importer, dotted parts of the imported module."
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("fastai_crl.")):
                base = parts[: len(parts) - node.level] if node.level else ()
                yield file, parts[0], (*base, *(node.module or "").removeprefix("fastai_crl.").split("."))
            elif isinstance(node, ast.Import):
                names = [a.name.split(".")[1:] for a in node.names if a.name.startswith("fastai_crl.")]
                yield from ((file, parts[0], tuple(name)) for name in names)


def test_every_wing_has_a_floor():
    found = {f.relative_to(PACKAGE).with_suffix("").parts[0] for f in PACKAGE.rglob("*.py")} - {"__init__"}
    assert found <= set(FLOOR)


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


def test_only_data_and_synthetic_know_the_human_protein_atlas():
    assert {wing for _, wing, (to, *_) in imports() if to == "hpa"} <= {"data", "synthetic", "all"}
