"""Sphinx reads this for `make book`; prepare.py has written the pages."""

import json
import shutil
import sys
from configparser import ConfigParser
from importlib.metadata import distribution
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # for prepare.slug
parser = ConfigParser(delimiters=["="])
parser.read(HERE.parent / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]

project, author, release = settings["title"], settings["author"], settings["version"]
copyright = settings["copyright"]
extensions = ["myst_nb", "sphinx.ext.mathjax"]
html_theme = "sphinx_book_theme"
html_context = {"default_mode": "auto"}  # light or dark as the reader's system has it
html_title = project
html_static_path = [str(HERE / "_static")]
html_css_files = ["book.css"]
html_favicon = html_logo = str(HERE / "_static" / "logo.svg")
html_theme_options = {
    "repository_url": settings["git_url"],
    "repository_branch": settings["branch"],
    "path_to_docs": settings["nbs_path"],
    "use_repository_button": True,
    "use_source_button": True,
    "use_download_button": True,
    "home_page_in_toc": True,
    "show_toc_level": 2,
    "logo": {"text": project},
}

nb_execution_mode = "off"  # outputs are the committed ones
nb_merge_streams = True
nb_render_markdown_format = "myst"  # tables in outputs
nb_ipywidgets_js = {}  # its default would be fetched from elsewhere
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath", "fieldlist"]
myst_heading_anchors = 4
myst_heading_slug_func = "prepare.slug"
add_module_names = False
python_maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"
mathjax_path = "mathjax/tex-svg-full.js"  # one file with its fonts, copied from a package below


def describe_images(app, doctree):
    "Gives the pictures of a notebook the alternative text that prepare.py found in its outputs."
    from docutils import nodes

    alts = json.loads((Path(app.srcdir) / "alts.json").read_text()).get(app.env.docname, [])
    cells = doctree.findall(lambda n: isinstance(n, nodes.container) and "cell_output" in n["classes"])
    images = [image for cell in cells for image in cell.findall(nodes.image)]
    if len(images) != len(alts):
        raise ValueError(f"{app.env.docname}: {len(images)} pictures, {len(alts)} alternative texts")
    for image, alt in zip(images, alts, strict=True):
        image["alt"] = alt or ""


def finish(app, error):
    "Copies MathJax, and the notebooks themselves in place of the prepared ones that `download` would hand out."
    if error or app.builder.name != "html":
        return
    source = Path(distribution("sphinx-mathjax-offline").locate_file("sphinx-mathjax-offline"))
    target = Path(app.outdir) / "_static" / "mathjax"
    target.mkdir(exist_ok=True)
    shutil.copy(source / "static" / "mathjax" / "tex-svg-full.js", target)
    for prepared in (Path(app.outdir) / "_sources").rglob("*.ipynb"):
        shutil.copy(HERE.parent / "nbs" / prepared.relative_to(Path(app.outdir) / "_sources"), prepared)


def no_source_button(app, pagename, templatename, context, doctree):
    "Pages of the reference are made, not written: there is no file to show."
    if pagename.startswith("api/") or doctree is None:
        context["theme_use_source_button"] = False


def setup(app):
    app.connect("doctree-read", describe_images)
    app.connect("html-page-context", no_source_button, priority=100)
    app.connect("build-finished", finish)
