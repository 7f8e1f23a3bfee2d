"""What a notebook cannot check of itself: that the package is its export, that it is clean, that it imports lightly."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(ROOT.glob("nbs/[!_.]*.ipynb"))


def run_python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        cwd=ROOT / "tests",
    )


def test_modules_are_what_nbdev_export_writes(tmp_path):
    "Export a copy of the notebooks into an empty package, and compare."
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (tmp_path / "llm_scratch").mkdir()
    shutil.copy(
        ROOT / "llm_scratch" / "__init__.py", tmp_path / "llm_scratch"
    )  # the one file that is no export
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}  # under IN_TEST nbdev_export does nothing
    subprocess.run([Path(sys.executable).with_name("nbdev_export")], cwd=tmp_path, check=True, env=env)
    committed = {p.name: p.read_text() for p in (ROOT / "llm_scratch").glob("*.py")}
    exported = {p.name: p.read_text() for p in (tmp_path / "llm_scratch").glob("*.py")}
    assert len(exported) > 5
    assert committed.keys() == exported.keys()
    stale = [name for name in exported if committed[name] != exported[name]]
    assert not stale, f"{stale} differ from their notebooks: run `make export`"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebook_is_clean(path):
    "nbdev_clean has run: no execution counts, no stray metadata."
    from nbdev.clean import clean_nb

    notebook = json.loads(path.read_text(encoding="utf-8"))
    before = copy.deepcopy(notebook)
    clean_nb(notebook, allowed_cell_metadata_keys=["tags"])
    assert notebook == before, "run `make format`"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebook_has_been_run(path):
    "Stored outputs hold no error, no path of one machine, and a picture wherever a cell draws one."
    for i, cell in enumerate(c for c in nbformat.read(path, 4).cells if c.cell_type == "code"):
        assert not any(o.output_type == "error" for o in cell.outputs), f"code cell {i} raised"
        text = json.dumps(cell.outputs)
        for place in (str(Path.home()), "/home/", "/Users/", str(ROOT)):
            assert place not in text, f"code cell {i} shows a path of the machine it ran on: {place}"
        if "plt.subplots" in cell.source and "#| export" not in cell.source:
            assert cell.outputs, f"code cell {i} draws, but has no stored output"


def test_import_is_light_and_lazy():
    code = """
import sys, llm_scratch
heavy = {"torch", "numpy", "matplotlib", "triton", "regex", "tyro"} & set(sys.modules)
assert not heavy, heavy
for name in llm_scratch.__all__: assert getattr(llm_scratch, name) is not None, name
try: llm_scratch.nonsense
except AttributeError: pass
else: raise SystemExit("an unknown name must raise AttributeError")
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}: raise ModuleNotFoundError(f"No module named {{name!r}} (blocked)", name=name)
sys.meta_path.insert(0, Block())
"""


@pytest.mark.parametrize("module", ["data", "tokenizer"])
def test_text_side_needs_no_torch(module):
    done = run_python(BLOCK.format(blocked={"torch", "triton"}) + f"import llm_scratch.{module}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "first", ["", "import llm_scratch.flash_attention", "import llm_scratch.experiments"]
)
def test_flash_attention_is_the_function(first):
    "A module of the same name must not take its place, whatever was imported before."
    done = run_python(
        f"{first}\nimport llm_scratch\nassert llm_scratch.flash_attention.__name__ == 'flash_attention'"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "module", ["data", "tokenizer", "model", "training", "generation", "flash_attention", "experiments"]
)
def test_every_module_imports_without_triton(module):
    done = run_python(BLOCK.format(blocked={"triton"}) + f"import llm_scratch.{module}")
    assert done.returncode == 0, done.stderr


def test_readme_is_the_index(tmp_path):
    "README.md is made from nbs/index.ipynb by `make export`."
    subprocess.run([sys.executable, ROOT / "tests" / "readme.py", tmp_path / "README.md"], check=True)
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text(), "run `make export`"
