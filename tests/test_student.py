"""The exercises: each check takes the solution and refuses wrong answers; the student edition, from nothing to all solved.

`pytest tests/test_student.py -k 05` tests the exercises of one notebook; `--nb-flags slow` the whole edition as well.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
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


# ---- the student edition


@pytest.fixture(scope="module")
def edition(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student") / "course"
    student.make_student(folder)
    return folder


@pytest.fixture
def chosen(request):
    "The notebooks to try: one of them, or all with `--nb-flags slow`."
    return "" if "slow" in request.config.getoption("--nb-flags") else "1"


def numbers_of(edition, chosen):
    numbers = json.loads((edition / ".solutions.json").read_text())
    return [number for number in numbers if chosen in ("", number.split(".")[0])]


def python(code, folder, *args):
    done = subprocess.run(
        [sys.executable, "-c", code, *args], cwd=folder, capture_output=True, text=True, timeout=600
    )
    return done.returncode, done.stdout + done.stderr


def command(line, folder):
    code = "import sys; from llm_scratch.cli import main; sys.exit(main(sys.argv[1:]))"
    return python(code, folder, *line.split())


def run_until_error(path):
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    client = NotebookClient(
        nbformat.read(path, 4),
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": path.parent}},
    )
    try:
        client.execute()
    except CellExecutionError as error:
        return f"{error.ename}: {error.evalue}"


def test_with_nothing_solved_all_is_open(edition, chosen):
    results = list(student.progress(edition, chosen))
    assert {result.status for *_, result in results} <= {"open", "waits"}, results
    assert [result.number for *_, result in results] == numbers_of(edition, chosen)


def test_notebooks_run_up_to_the_first_unsolved_exercise(edition, chosen):
    for path in sorted(edition.glob("nbs/*.ipynb")):
        if chosen and path.stem != "01_tokenizer":
            continue
        solutions = [e for e in student.find_exercises(cells_of(path)) if e.check]
        said = run_until_error(path)
        if solutions:  # or an earlier part that this one uses
            assert said.startswith("NotImplementedError: Exercise "), f"{path.stem}: {said}"


def test_no_solution_is_left(edition):
    "Neither in a notebook nor in the package; and no output behind the first exercise."
    solutions = json.loads((edition / ".solutions.json").read_text())
    text = "\n".join(p.read_text() for p in edition.glob("my_llm/*.py"))
    for path in edition.glob("nbs/*.ipynb"):
        cells = cells_of(path)
        first = min((e.heading for e in student.find_exercises(cells)), default=len(cells))
        assert not any(cell.get("outputs") for cell in cells[first:])
        text += "\n".join(cell.source for cell in cells)
    assert not re.search(r"(from|import) llm_scratch\b(?!\.(student|cli))", text), "the reference is imported"
    assert len(solutions) >= 30
    for number, parts in solutions.items():
        for solution in parts.values():
            assert solution not in text, number
        assert f'raise NotImplementedError("Exercise {number}: ' in text


def test_parts_can_come_from_the_reference(edition):
    code = """
from llm_scratch.student import use_solutions
use_solutions({names})
from my_llm.tokenizer import merge_pair
import my_llm
print(my_llm.__file__, merge_pair([b"a", b"b"], (b"a", b"b")))
"""
    status, said = python(code.format(names=""), edition / "nbs")
    assert status and "NotImplementedError: Exercise 1.6: merge a pair" in said
    status, said = python(code.format(names='"tokenizer"'), edition / "nbs")
    assert (status, said.split()) == (0, [str(edition / "my_llm" / "__init__.py"), "[b'ab']"])
    status, said = python(code.format(names='"tokeniser"'), edition / "nbs")
    assert "the reference has no part 'tokeniser'" in said
    late = "import sys; sys.path.insert(0, '..'); import my_llm.tokenizer\n"
    assert "restart the kernel" in python(late + code.format(names='"tokenizer"'), edition / "nbs")[1]


def test_solutions_put_back_solve_everything(edition, chosen, tmp_path):
    whole = shutil.copytree(edition, tmp_path / "solved")
    for number in numbers_of(edition, chosen):
        assert student.reveal(number, whole) is None  # there was no attempt to keep
    results = list(student.progress(whole, chosen))
    assert results and {result.status for *_, result in results} == {"solved"}, results
    if not chosen:
        args = [sys.executable, "-m", "pytest", "-q", "--nbval", "nbs"]
        assert subprocess.run(args, cwd=whole, timeout=3000).returncode == 0


def test_commands(edition, tmp_path):
    status, said = command(f"student {edition}", tmp_path)
    assert status == 2 and "is not empty; nothing was changed" in said
    status, said = command("student mine --source .", tmp_path)
    assert status == 2 and "git clone" in said and not list(tmp_path.iterdir())
    status, said = command("student mine --package llm_scratch", tmp_path)
    assert status == 2 and "choose a name" in said and not list(tmp_path.iterdir())
    status, said = command("progress", tmp_path)
    assert status == 2 and "not in a student edition" in said
    status, said = command("progress 99.1", edition)
    assert status == 2 and "no exercise 99.1" in said
    status, said = command("reveal 99.1 --yes", edition)
    assert status == 2 and "no exercise 99.1" in said
    status, said = command("reveal 1.5", edition)  # nobody at the keyboard
    assert status == 2 and "--yes" in said


def test_an_attempt_is_judged_and_kept(edition, tmp_path):
    "A wrong answer in a notebook: progress says why, reveal keeps it."
    mine = shutil.copytree(edition, tmp_path / "mine")
    path = mine / "nbs" / "01_tokenizer.ipynb"
    notebook = student.read_notebook(path)
    exercise = next(e for e in student.find_exercises(notebook.cells) if e.number == "1.5")
    cell = notebook.cells[exercise.solutions["count_pairs"]]
    cell.source = student.replace_definition(
        cell.source,
        "count_pairs",
        "def count_pairs(words, word_counts):\n    return Counter(p for tokens in words.values() for p in pairwise(tokens))",
    )
    student.write_notebook(notebook, path)
    status, said = command("progress 1.5", mine / "nbs")
    assert status == 0 and "1.5   wrong" in said and "weigh by word_counts" in said
    assert "0 of 1 exercises solved" in said
    status, said = command("reveal 1.5 --yes", mine)
    (kept,) = (mine / "attempts").iterdir()
    assert status == 0 and "for p in pairwise(tokens))" in kept.read_text()
    assert "1 of 1 exercises solved" in command("progress 1.5", mine)[1]
    (mine / ".solutions.json").unlink()  # as a teacher may
    assert "1 of 1 exercises solved" in command("progress 1.5", mine)[1]
    status, said = command("reveal 1.6 --yes", mine)
    assert status == 2 and "no solutions to reveal" in said


def test_a_typing_error_costs_one_exercise(edition, tmp_path):
    "A cell that is no Python: its exercise says so, the others are checked all the same."
    mine = shutil.copytree(edition, tmp_path / "mine")
    path = mine / "nbs" / "01_tokenizer.ipynb"
    notebook = student.read_notebook(path)
    exercise = next(e for e in student.find_exercises(notebook.cells) if e.number == "1.5")
    notebook.cells[exercise.solutions["count_pairs"]].source = "#| export\ndef count_pairs(words:"
    student.write_notebook(notebook, path)
    with pytest.warns(UserWarning, match="could not be exported"):
        results = {result.number: result for *_, result in student.progress(mine, "1")}
    assert results["1.5"].status == "error" and "SyntaxError" in results["1.5"].message
    assert results["1.6"].status == "open"
