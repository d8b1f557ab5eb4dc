"""The example notebooks: what is stored, and that they run in a kernel of their own."""

import os
import re
from pathlib import Path

import nbformat
import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
SMALL = {  # values of the parameters that make little work of a notebook
    "crl_hpa": "N_IMAGES, SIZE, EPOCHS, SEED = 80, 32, 2, 1",
    "crl_existing_learner": "COMMONEST, RAREST, N_EACH, SIZE, EPOCHS, SEED = 30, 2, 6, 32, 1, 1",
    "crl_own_microscopy": "N_WELLS, SIZE, EPOCHS, SEED = 12, 48, 1, 7",
}
PICTURES = {"crl_hpa": 7, "crl_existing_learner": 5, "crl_own_microscopy": 2}
SHOWN = {  # what the outputs hold, stored and run anew
    "crl_hpa": ["crl_triplets", "predicts the same: True", "F1, a threshold per label", "F1, one shift"],
    "crl_existing_learner": ["crl_labels", "own criterion, fitted", "plain, fitted"],
    "crl_own_microscopy": ["missing file", "w01_s0_actin.tif", "no errors: True", "leaks: 0", "the same pixels: True"],
}


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)


def code(nb: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def outputs(nb: nbformat.NotebookNode) -> tuple[list[nbformat.NotebookNode], str]:
    """The outputs of all cells, and their text without the pictures.

    A kernel sends what is printed five times a second, so one line may come in several outputs.
    """
    found = [o for cell in code(nb) for o in cell.outputs]
    return found, "".join(o["text"] if "text" in o else str({**o.get("data", {}), "image/png": ""}) for o in found)


def n_pictures(found: list[nbformat.NotebookNode]) -> int:
    return sum("image/png" in o.get("data", {}) for o in found)


def test_a_line_that_comes_in_two_outputs_is_one():
    parts = [nbformat.v4.new_output("stream", text=text) for text in ("no errors:", " True\n")]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(outputs=parts)])
    assert outputs(nb)[1] == "no errors: True\n"


def test_every_notebook_is_tested():
    assert sorted(f.stem for f in EXAMPLES.glob("*.ipynb")) == sorted(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_notebooks_are_stored_with_outputs_and_without_errors(name):
    assert (EXAMPLES / f"{name}.ipynb").stat().st_size < 700_000
    nb = read(name)
    nbformat.validate(nb)
    assert [c.execution_count for c in code(nb)] == list(range(1, len(code(nb)) + 1))
    found, text = outputs(nb)
    assert not [o for o in found if o.output_type == "error" or o.get("name") == "stderr"]
    assert n_pictures(found) == PICTURES[name]
    assert not re.search(r"<progress|site-packages|/(home|root|tmp|Users)/|\w+Warning:", text)
    assert all(words in text for words in SHOWN[name])
    assert "no winner is named" in outputs(nbformat.v4.new_notebook(cells=[code(nb)[-1]]))[1]  # by compare_losses


@pytest.mark.parametrize("name", SMALL)
def test_links_of_notebooks_lead_somewhere(name):
    text = "".join(c.source for c in read(name).cells if c.cell_type == "markdown")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        assert "://" in link or (EXAMPLES / link.split("#")[0]).is_file(), link


def test_the_guide_trains_in_one_line():
    assert "crl_learner(dls).fit_one_cycle()" in [line for c in code(read("crl_hpa")) for line in c.source.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_notebooks_run(name, tmp_path):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    nb = read(name)
    (parameters,) = (c for c in nb.cells if "parameters" in c.metadata.get("tags", []))
    names = re.findall(r"^([A-Z_, ]+) = ", parameters.source, re.M)
    assert ", ".join(names) == SMALL[name].split(" = ")[0]
    parameters.source = SMALL[name]
    where = {"metadata": {"path": str(tmp_path)}}
    # On a busy machine outputs may come long after the kernel's reply; by default they are given up after 4 s.
    nbclient.NotebookClient(nb, timeout=600, iopub_timeout=600, kernel_name="python3", resources=where).execute(env=ENV)
    found, text = outputs(nb)
    assert n_pictures(found) == PICTURES[name]
    assert all(words in text for words in SHOWN[name])
    if name == "crl_hpa":
        assert (tmp_path / "out" / "learner.pkl").stat().st_size > 1_000_000
