"""The book and the first minutes: what can be checked without a browser (`make check-book` looks at the pages in one)."""

import ast
import os
import re
import subprocess
import sys
import textwrap
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import prepare  # noqa: E402

INDEX = ROOT / "nbs" / "index.ipynb"
CHAPTERS = [*prepare.NOTEBOOKS, *prepare.NOTES]
LINK = re.compile(r"(?<!\\)\]\((?!\w+://|mailto:)<?([^()\s>]+(?:\([^()\s]*\))?[^()\s>]*)>?\)")
COLAB = """\
#| hide
import os
import sys

if "google.colab" in sys.modules and not os.path.exists("{mark}"):  # on Colab: fetch the workbook
    os.system("git clone --quiet --depth 1 {url}")
    os.system(f"{{sys.executable}} -m pip install --quiet ./llm_scratch")
    os.chdir("llm_scratch/{place}")"""


def cells(path, kind):
    return [c for c in nbformat.read(path, 4).cells if c.cell_type == kind]


def name(path):
    return path.stem


def anchors(path):
    "Where a link into a notebook can lead: its headings, as JupyterLab names them."
    found = [text for c in cells(path, "markdown") for _, text in prepare.headings(c.source)]
    return {prepare.slug(prepare.plain(text)) for text in found}


@pytest.mark.parametrize("path", [INDEX, *CHAPTERS], ids=name)
def test_links_lead_somewhere(path):
    for cell in cells(path, "markdown"):
        for href in LINK.findall(re.sub(r"`[^`\n]*`", "", prepare.FENCE.sub("", cell.source))):
            place, _, anchor = href.partition("#")
            target = (path.parent / place).resolve() if place else path
            assert target.exists(), f"{href} leads to no file"
            if anchor:
                assert anchor in anchors(target), f"{href} leads to no heading"


@pytest.mark.parametrize("path", CHAPTERS, ids=name)
def test_pictures_are_described(path):
    "Readers who cannot see a figure hear what it shows."
    alts = prepare.image_alts(nbformat.read(path, 4))
    mute = alts.count(None)
    assert not mute, f"{mute} of {len(alts)} pictures have no alternative text: show them with show(fig, alt)"
    for alt in alts:
        assert 20 <= len(alt) <= 400, f"one or two sentences that say what is to be seen: {alt!r}"


@pytest.mark.parametrize("path", CHAPTERS, ids=name)
def test_show_is_the_same_in_every_notebook(path):
    source = "\n\n".join(c.source for c in cells(path, "code"))
    found = re.findall(r"^def show\(fig.*?(?=\n\S|\Z)", source, re.M | re.S)
    asked = textwrap.dedent("""\
        def show(fig, alt):
            "Display a figure once, with a description for readers who cannot see it."
            display(fig, metadata={"image/png": {"alt": alt}})
            plt.close(fig)""")
    assert [f.strip() for f in found] in ([], [asked])


@pytest.mark.parametrize("path", CHAPTERS, ids=name)
def test_notebook_says_what_it_is_for(path):
    opening = cells(path, "markdown")[0].source
    for phrase in ("**At its end** ", "**It assumes** ", "**Time:** "):
        assert phrase in opening, f"the first cell lacks {phrase!r}"


@pytest.mark.parametrize("path", CHAPTERS, ids=name)
def test_first_code_cell_is_for_colab(path):
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    mark = "index.ipynb" if path.parent.name == "nbs" else "n1_gpus.ipynb"
    place = path.parent.relative_to(ROOT).as_posix()
    asked = COLAB.format(mark=mark, place=place, url=settings["DEFAULT"]["git_url"])
    assert cells(path, "code")[0].source == asked


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="nothing to clone")
def test_colab_cell_installs_the_package(tmp_path):
    "Where nothing is installed but what Colab has, with a module of that name and a clone of this checkout."
    site, content = tmp_path / "site", tmp_path / "content"
    content.mkdir()
    program = f"""
import sys, types
sys.path[:] = [p for p in sys.path if "__editable__" not in p]
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in str(f).lower()]
sys.path[:0] = [{str(content)!r}, {str(site)!r}]
sys.path = [p for p in sys.path if p not in ({str(ROOT)!r}, {str(ROOT / "tests")!r})]
sys.modules["google.colab"] = types.ModuleType("google.colab")
exec({cells(prepare.NOTEBOOKS[0], "code")[0].source!r})
import llm_scratch
assert llm_scratch.__file__.startswith({str(site)!r}), llm_scratch.__file__
from llm_scratch.data import Corpus
assert os.path.exists("../data/tales_sample.txt") and os.path.exists("00_data.ipynb")
"""
    env = {
        **os.environ,
        "PIP_TARGET": str(site),
        "PIP_NO_DEPS": "1",
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip's way to say: without isolation
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{ROOT.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": "https://github.com/llm-scratch/llm_scratch",
    }
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=content, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    out = tmp_path_factory.mktemp("book") / "source"
    prepare.main(out)
    return out


def test_pages_hold_nothing_of_the_machinery(pages):
    count = 0
    for path in pages.rglob("*.ipynb"):
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type == "code":
                count += 1
                assert not re.match(r"\s*#\s*(\||NBVAL_)", cell.source), f"{path.name}: {cell.source[:60]}"
                assert not cell.source.startswith("import os\nimport sys\n\nif ")  # the cell for Colab
                assert not any(prepare.WIDGET in o.get("data", {}) for o in cell.outputs)
    assert count > 500


def test_pages_keep_the_stored_outputs(pages):
    for path in CHAPTERS:
        place = path.relative_to(ROOT / "nbs").with_suffix(".ipynb")
        pictures = [len(prepare.image_alts(nbformat.read(p, 4))) for p in (path, pages / place)]
        assert pictures[0] == pictures[1]


def test_sidebar_names_every_page(pages):
    last = nbformat.read(pages / "index.ipynb", 4).cells[-1].source
    made = {
        p.relative_to(pages).with_suffix("").as_posix()
        for p in pages.rglob("*.*")
        if p.suffix in (".ipynb", ".md")
    }
    assert set(re.findall(r"<(.+)>$", last, re.M)) == made - {"index"}


@pytest.mark.parametrize("path", sorted(ROOT.glob("llm_scratch/[!_]*.py")), ids=name)
def test_reference_has_every_exported_name(pages, path):
    tree = ast.parse(path.read_text())
    names = next(ast.literal_eval(n.value) for n in tree.body if prepare.targets(n) == ["__all__"])
    page = (pages / "api" / f"{path.stem}.md").read_text()
    found = re.findall(r"^:{3,4}\{py:(?:class|function|data)\} (\w+)", page, re.M)
    own = [n for n in names if n in found]
    patched = {p.name for p in ast.walk(tree) if isinstance(p, ast.FunctionDef) and prepare.patched(p)}
    assert set(names) - set(own) <= patched
    assert len(found) == len(set(found))


def test_reference_shows_comments_and_patched_methods(pages):
    model, tokenizer = ((pages / "api" / f"{m}.md").read_text() for m in ("model", "tokenizer"))
    assert "{py:class} Linear(in_features: int, out_features: int)" in model
    assert ":param in_features: length of the input vectors" in model
    assert ":returns: (..., out)" in model
    section = tokenizer[tokenizer.index("{py:class} Tokenizer(") :]
    assert "{py:property} vocab_size" in section and "{py:method} encode(text: str) -> list[int]" in section


def test_mentions_become_links_once():
    home = {"Linear": "llm_scratch.model.Linear", "model.Linear": "llm_scratch.model.Linear"}
    text = "# `Linear`\n\nA `Linear` and a `model.Linear()`, `nn.Linear`.\n\n```\n`Linear`\n```"
    linked = prepare.link_names(text, home, set())
    assert linked.count("{py:obj}") == 1 and "{py:obj}`Linear <llm_scratch.model.Linear>` and" in linked


def test_numbers_become_links():
    here = prepare.NOTES[0]
    linked = prepare.link_numbers(
        "notebooks 02, 03 and 01a; note 1, note 2, [note 3](x); 04\n# notebook 02", here
    )
    two, three, a = (p.name for p in (prepare.NOTEBOOKS[i] for i in (3, 4, 2)))
    first = f"notebooks [02](../{two}), [03](../{three}) and [01a](../{a}); "
    assert linked == first + f"note 1, note [2]({prepare.NOTES[1].name}), [note 3](x); 04\n# notebook 02"


def test_docstrings_become_markdown():
    assert prepare.paragraphs("A * B_1.\nRaises x.\ngoes on") == "A \\* B\\_1.\\\nRaises x.\\\ngoes on"
    assert prepare.paragraphs("One.\n\n    a = 1\n    b = 2") == "One.\n\n```text\n    a = 1\n    b = 2\n```"
    assert prepare.escape("`a_b` [0, 1)") == "`a_b` \\[0, 1)"
