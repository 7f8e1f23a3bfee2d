"""Write README.md from nbs/index.ipynb: `python tests/readme.py README.md`.

Directive lines and hidden cells go, of cells with `#| echo: false` all but the output; links to notebooks and
pictures are seen from the root.
"""

import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parent.parent
DIRECTIVE = re.compile(r"^\s*#\s*(\||NBVAL_).*\n?", re.M)


def readme() -> str:
    notebook = nbformat.read(ROOT / "nbs" / "index.ipynb", 4)
    notebook.cells = [c for c in notebook.cells if not re.match(r"#\|\s*(hide|default_exp)", c.source)]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            mute = cell.source.startswith("#| echo: false")
            cell.source = "" if mute else DIRECTIVE.sub("", cell.source)
        cell.source = re.sub(
            r"\]\((?=images/|(?:notes/)?\w+\.ipynb)", "](nbs/", cell.source
        )  # links, seen from the root
    notebook.metadata.setdefault("language_info", {"name": "python"})
    body, resources = MarkdownExporter().from_notebook_node(notebook)
    body = re.sub(r"```\w*\s+```\n", "", body)  # what is left of a cell that says nothing
    assert not resources.get("outputs"), "a plot in index.ipynb: save it under nbs/images and link it"
    return "<!-- Made from nbs/index.ipynb by `make export`: edit that. -->\n\n" + body.strip() + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(readme(), encoding="utf-8")
