"""The exercises: each check takes the solution and refuses wrong answers; the student edition, from nothing to all solved.

`pytest tests/test_student.py -k 05` tests the exercises of one notebook; `--nb-flags slow` the whole edition as well.
"""

import importlib.util
import json
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import nbformat
import pytest

from llm_scratch import student

ROOT = Path(__file__).parent.parent
NOTEBOOKS = [p for p in sorted(ROOT.glob("nbs/0[0-6]_*.ipynb"))]
names = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def cells_of(path):
    return nbformat.read(path, 4).cells


def wrong_answers(path):
    "The table in tests/wrong_answers_NN.py; empty when there is none."
    file = ROOT / "tests" / f"wrong_answers_{path.stem[:2]}.py"
    if not file.exists():
        return {}
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.WRONG


def face_the_checks(path):
    "In a process of its own: what each check says to the solution, then to the wrong answers."
    sys.stdout = sys.stderr = open(os.devnull, "w")
    from IPython.core.interactiveshell import InteractiveShell

    cells, said, wrong = cells_of(path), [], []
    exercises = {e.number: e for e in student.find_exercises(cells) if e.check}
    student.run_checks(path, said.append, set(exercises))
    space = InteractiveShell.instance().user_ns
    for number, answers in wrong_answers(path).items():
        last = student.parse_cell(cells[exercises[number].call]).body[-1]
        check = space[last.value.func.id]
        for candidates, part in answers:
            candidates = candidates if isinstance(candidates, tuple) else (candidates,)
            name = f"{number} " + ", ".join(getattr(c, "__name__", repr(c)) for c in candidates)
            try:
                wrong.append((name, part, f"accepted: {check(*candidates)}"))
            except AssertionError as error:
                wrong.append((name, part, str(error)))
            except Exception as error:
                wrong.append((name, part, f"no AssertionError but {type(error).__name__}: {error}"))
    return [result for result in said if isinstance(result, student.Result)], wrong


@names
def test_exercises_have_the_form(path):
    "Numbers in order; a hint or an answer; a check that says ok; no name of a check twice."
    cells = cells_of(path)
    exercises = student.find_exercises(cells)
    lesson = path.stem.split("_")[0].lstrip("0") or "0"
    assert [e.number for e in exercises] == [f"{lesson}.{k}" for k in range(1, len(exercises) + 1)]
    headings = [
        c.source for c in cells if c.cell_type == "markdown" and re.search(r"(?m)^### .*min\)", c.source)
    ]
    assert len(headings) == len(exercises), "a heading with minutes that is no exercise: mind its exact form"
    for e in exercises:
        assert "</details>" in cells[e.heading].source, f"{e.number} has neither hint nor answer"
        if e.check:
            assert e.solutions, f"{e.number}: nothing that its check is called with is defined below it"
            assert "ok" in json.dumps(cells[e.call].outputs), f"{e.number}: run the notebook"
    checks = [
        name for e in exercises if e.check for name in student.definitions(student.parse_cell(cells[e.check]))
    ]
    assert len(checks) == len(set(checks))


@names
def test_stubs_are_python_and_raise(path):
    "Every solution becomes a stub with its number, and comes back letter by letter."
    cells, before = cells_of(path), cells_of(path)
    solutions = student.student_cells(cells, "my_llm")
    exercises = {e.number: e for e in student.find_exercises(cells)}
    for number, parts in solutions.items():
        for name, text in parts.items():
            i = exercises[number].solutions[name]
            assert f"Exercise {number}:" in student.definition(cells[i].source, name)
            cells[i].source = student.replace_definition(cells[i].source, name, text)
    assert [c.source for c in cells] == [
        student.rename(c.source, "my_llm") if c.cell_type == "code" else c.source for c in before
    ]


@names
def test_checks_take_solutions_and_refuse_wrong_answers(path):
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        results, wrong = pool.submit(face_the_checks, path).result(timeout=300)
    assert not [(r.number, r.status, r.message) for r in results if r.status != "solved"]
    bad = [(name, f"wanted: {part}", said) for name, part, said in wrong if part not in said]
    bad += [(name, said) for name, _, said in wrong if said.startswith(("accepted", "no AssertionError"))]
    assert not bad, "\n".join(map(str, bad))


@pytest.mark.parametrize("path", NOTEBOOKS[1:], ids=lambda p: p.stem)
def test_three_exercises_have_two_wrong_answers(path):
    assert sum(len(answers) >= 2 for answers in wrong_answers(path).values()) >= 3
