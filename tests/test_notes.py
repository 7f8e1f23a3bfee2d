"""The lecture notes in nbs/notes: clean, run, described, linked, and exporting nothing."""

import copy
import json
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
NOTES = sorted((ROOT / "nbs" / "notes").glob("[!_.]*.ipynb"))
every_note = pytest.mark.parametrize("path", NOTES, ids=lambda p: p.name)


def code_cells(path):
    return [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]


def markdown(path):
    return "\n\n".join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown")


def test_there_are_six():
    assert [p.name[:2] for p in NOTES] == ["n1", "n2", "n3", "n4", "n5", "n6"]


@every_note
def test_note_is_clean(path):
    from nbdev.clean import clean_nb

    notebook = json.loads(path.read_text(encoding="utf-8"))
    before = copy.deepcopy(notebook)
    clean_nb(notebook, allowed_cell_metadata_keys=["tags"])
    assert notebook == before, "run `make format`"


@every_note
def test_note_exports_nothing(path):
    for cell in code_cells(path):
        assert not re.search(r"^#\|\s*(default_exp|export)", cell.source, re.M)


@every_note
def test_note_has_been_run(path):
    "Outputs hold no error and no path; every figure is there, with a description."
    for i, cell in enumerate(code_cells(path)):
        assert not any(o.output_type == "error" for o in cell.outputs), f"code cell {i} raised"
        assert not any(o.get("name") == "stderr" for o in cell.outputs), f"code cell {i} warns"
        text = json.dumps(cell.outputs)
        for place in (str(Path.home()) + "/", "/home/", "/Users/", "/tmp/", str(ROOT)):
            assert place not in text, f"code cell {i} shows a path of the machine it ran on: {place}"
        figures = [o for o in cell.outputs if "image/png" in o.get("data", {})]
        if "plt.subplots" in cell.source:
            assert figures, f"code cell {i} draws, but has no stored figure"
        for figure in figures:
            assert len(figure.metadata.get("image/png", {}).get("alt", "")) > 40, (
                f"code cell {i}: figure without description"
            )


@every_note
def test_note_opens_and_asks(path):
    "It says what, for whom and how long; its think-first questions have folded answers, followed by a cell that checks them."
    cells = nbformat.read(path, 4).cells
    for promise in ("**At its end**", "**It assumes**", "**Time:**"):
        assert promise in cells[0].source
    (i,) = [i for i, c in enumerate(cells) if c.cell_type == "markdown" and "### Think first" in c.source]
    questions, _, answers = cells[i].source.partition("<details><summary>Answers</summary>")
    numbered = [len(re.findall(r"^\d\. ", part, re.M)) for part in (questions, answers)]
    assert numbered[0] == numbered[1] >= 2
    assert answers.rstrip().endswith("</details>")
    assert cells[i + 1].cell_type == "code" and "assert" in cells[i + 1].source


@every_note
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)", markdown(path)):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target
