"""Turn notebooks and modules into what Sphinx reads: `python docs/prepare.py OUT`.

Notebooks lose what only nbdev, nbval and Jupyter need, and keep their outputs: nothing is executed. Each module becomes
a page of reference, read from its source: signatures, the comment beside each parameter, docstrings. Nothing is imported.
"""

import ast
import io
import json
import os
import re
import shutil
import sys
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(ROOT.glob("nbs/[0-9]*.ipynb"))
NOTES = sorted(ROOT.glob("nbs/notes/[!_.]*.ipynb"))

DIRECTIVES = re.compile(r"\A(?:\s*#\s*(?:\||NBVAL_).*(?:\n|\Z))+")  # the lines at the top of a cell
HIDDEN = re.compile(r"#\s*\|\s*(hide|default_exp)\b")
EXPORTED = re.compile(r"#\s*\|\s*exports?\b")
MUTE = re.compile(r"#\s*\|\s*echo:\s*false\b")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.M | re.S)
CODE = re.compile(r"(?<![\[`\w}])`([A-Za-z_][\w.]*)(?:\(\))?`(?!`)")
NUMBERS = re.compile(
    r"(?<!\[)\b(?:[Nn]otebooks? \d\da?\b(?:(?:,| and| or| to) \d\da?\b)*|[Nn]ote \d\b)(?!\])"
)
WIDGET = "application/vnd.jupyter.widget-view+json"


def slug(title: str) -> str:
    "The anchor that JupyterLab gives to a heading; Sphinx is told to use the same."
    return title.strip().replace(" ", "-")


def plain(title: str) -> str:
    "A heading as Sphinx names it: the text without backticks, formulas and emphasis."
    return re.sub(r"[`*]|\$[^$]*\$|(?<=\])\([^)]*\)|[\[\]]", "", title).strip()


def headings(source: str) -> list[tuple[int, str]]:
    "Level and text of each heading of a cell of Markdown."
    return [
        (len(h), t.strip()) for h, t in re.findall(r"^(#{1,6})\s+(.+?)\s*#*$", FENCE.sub("", source), re.M)
    ]


def title(path: Path) -> str:
    "The first heading of a notebook, without its number."
    cells = nbformat.read(path, 4).cells
    found = next(h[0][1] for c in cells if c.cell_type == "markdown" and (h := headings(c.source)))
    return re.sub(r"^\d+\w?\s*·\s*", "", plain(found))


# Notebooks


def directives(source: str) -> str:
    "The lines at the top of a cell that speak to nbdev and nbval."
    return match[0] if (match := DIRECTIVES.match(source)) else ""


def image_alts(notebook) -> list[str | None]:
    "Alternative text of every picture among the outputs, in order; None where there is none."
    outputs = [o for c in notebook.cells for o in c.get("outputs", []) if "data" in o]
    return [
        o.get("metadata", {}).get(kind, {}).get("alt")
        for o in outputs
        for kind in o["data"]
        if kind.startswith("image/")
    ]


def link_names(source: str, home: dict[str, str], seen: set[str]) -> str:
    "The first mention of each name of the library becomes a link to its place in the reference."

    def link(match):
        name = match[1].removeprefix("llm_scratch.")
        target = home.get(name)
        if target is None or target in seen:
            return match[0]
        seen.add(target)
        return f"{{py:obj}}`{match[0].strip('`')} <{target}>`"

    return each_line(source, lambda line: CODE.sub(link, line))


def link_numbers(source: str, here: Path) -> str:
    "`notebook 02`, `notebooks 02 and 03` and `note 1` become links to these pages."
    place = {re.match(r"\d\da?", p.stem)[0]: p for p in NOTEBOOKS} | {p.stem[1]: p for p in NOTES}
    to = lambda number: os.path.relpath(place[number], here.parent) if number in place else None
    link = lambda m: f"[{m[0]}]({to(m[0])})" if to(m[0]) and place[m[0]] != here else m[0]
    return each_line(source, lambda line: NUMBERS.sub(lambda m: re.sub(r"\d+a?", link, m[0]), line))


def each_line(source: str, change: Callable[[str], str]) -> str:
    "Changes the lines of Markdown that are prose."
    lines, fenced = source.split("\n"), False
    for i, line in enumerate(lines):
        fenced ^= line.startswith(("```", "~~~"))
        if not (fenced or line.startswith(("#", "    ", "<"))):
            lines[i] = change(line)
    return "\n".join(lines)


def prepare_notebook(path: Path, home: dict[str, str]):
    "What a reader of the book sees: no directives, no hidden cells, no progress bars; names and numbers are links."
    notebook = nbformat.read(path, 4)
    notebook.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python", "pygments_lexer": "ipython3"},
    }
    code = lambda cell: cell.cell_type == "code"
    notebook.cells = [c for c in notebook.cells if not (code(c) and HIDDEN.search(directives(c.source)))]
    seen = set()
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "markdown":
            seen = set() if any(level == 2 for level, _ in headings(cell.source)) else seen
            cell.source = link_numbers(link_names(cell.source, home, seen), path)
        elif code(cell):
            top = directives(cell.source)
            tags = {"export": EXPORTED, "remove-input": MUTE}
            cell.metadata = {"tags": [tag for tag, directive in tags.items() if directive.search(top)]}
            cell.source = cell.source.removeprefix(top)
            cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {})]
    return notebook


# Modules


def comments(source: str) -> dict[int, str]:
    "The comment at the end of each line of code that has one."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT and t.start[1]}


def escape(text: str) -> str:
    "Plain text as Markdown: marks lose their power, except backticks."
    parts = text.split("`")
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"([\\*_{}\[\]<>|$#~])", r"\\\1", parts[i])
    return "`".join(parts)


def paragraphs(doc: str | None) -> str:
    "A docstring as Markdown: one line for each sentence that ends a line; deeper lines are code."
    blocks = []
    for block in re.split(r"\n\s*\n", doc or ""):
        if not block.strip():
            continue
        if all(line.startswith("    ") for line in block.split("\n")):
            blocks.append("```text\n" + block + "\n```")
        else:
            blocks.append(re.sub(r"(?<=[.:;])\n(?=\S)(?!- )", "\\\\\n", escape(block)))
    return "\n\n".join(blocks)


class Module:
    "The exported names of one module, its notebook, and the section of the notebook that each comes from."

    def __init__(self, path: Path):
        self.name, source = path.stem, path.read_text(encoding="utf-8")
        self.notes, self.tree = comments(source), ast.parse(source)
        if (made := re.search(r"File to edit: \.\./nbs/(\S+ipynb)", source)) is None:
            raise ValueError(f"{path} does not say which notebook it was made from: run `make export`")
        self.notebook = ROOT / "nbs" / made[1]
        cells = [
            (n, m[1])
            for n, line in enumerate(source.split("\n"), 1)
            if (m := re.match(r"# %% \S+ #(\w+)", line))
        ]
        places, place = {}, ""  # the last heading of level 2 above each cell
        for cell in nbformat.read(self.notebook, 4).cells:
            if cell.cell_type == "markdown":
                place = next((text for level, text in headings(cell.source)[::-1] if level == 2), place)
            places[cell.id] = place
        self.place = lambda line: places[max(c for c in cells if c[0] <= line)[1]]
        self.all = next(ast.literal_eval(n.value) for n in self.tree.body if targets(n) == ["__all__"])
        self.methods = {}
        for node in self.tree.body:  # fastcore's @patch: methods that were written later
            if owner := patched(node):
                self.methods.setdefault(owner, []).append(node)

    def __iter__(self) -> Iterator[tuple[str, ast.stmt]]:
        "Name and statement of each exported definition, in order."
        done = set()
        for node in self.tree.body:
            names = [] if patched(node) else targets(node)
            for name in names:
                if name in self.all and name not in done:
                    done.add(name)
                    yield name, node


def targets(node: ast.stmt) -> list[str]:
    "The names that a statement defines."
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.Assign):
        places = [e for t in node.targets for e in (t.elts if isinstance(t, ast.Tuple) else [t])]
        return [t.id for t in places if isinstance(t, ast.Name)]
    return [node.target.id] if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) else []


def decorators(node) -> list[str]:
    return [ast.unparse(d) for d in getattr(node, "decorator_list", [])]


def patched(node: ast.stmt) -> str | None:
    "The class that a function decorated with @patch belongs to."
    if any(re.match(r"patch\b", d) for d in decorators(node)):
        return ast.unparse(node.args.args[0].annotation)


def signature(function: ast.FunctionDef, method: bool) -> str:
    args = ast.parse(ast.unparse(function)).body[0].args  # a copy
    first = args.posonlyargs or args.args
    if method and first and "staticmethod" not in decorators(function):
        del first[0]
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    return f"({ast.unparse(args)}){returns}"


def fields(function: ast.FunctionDef, notes: dict[int, str]) -> list[str]:
    "What stands beside each parameter and beside the arrow."
    arguments = function.args
    every = arguments.posonlyargs + arguments.args + arguments.kwonlyargs
    every += [a for a in (arguments.vararg, arguments.kwarg) if a]
    ends = {a.arg: a.end_lineno for a in every}
    positional = arguments.posonlyargs + arguments.args
    defaults = zip(positional[len(positional) - len(arguments.defaults) :], arguments.defaults, strict=True)
    for a, default in [*defaults, *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]:
        ends[a.arg] = default.end_lineno if default else ends[a.arg]
    rows = {}
    body = function.body[0].lineno
    for name, line in ends.items():
        if line in notes and line < body:
            rows.setdefault(line, []).append(name)
    arrow = function.returns.end_lineno if function.returns else None
    lines = [f":param {', '.join(rows[n])}: {escape(notes[n])}" for n in sorted(rows) if n != arrow]
    return lines + ([f":returns: {escape(notes[arrow])}"] if arrow in notes else [])


def directive(kind: str, head: str, body: list[str], options: str = "", colons: int = 3) -> str:
    fence = ":" * colons
    return f"{fence}{{py:{kind}}} {head}\n{options}\n" + "\n\n".join(b for b in body if b) + f"\n{fence}\n"


def describe_function(name, node, notes, kind="function", method=False, options=""):
    head = name if kind == "property" else name + signature(node, method)
    if kind == "property" and node.returns:
        options += f":type: {ast.unparse(node.returns)}\n"
    body = [paragraphs(ast.get_docstring(node)), "\n".join(fields(node, notes) if kind != "property" else [])]
    return directive(kind, head, body, options)


def describe_method(node, notes) -> str:
    marks = decorators(node)
    prop = any("property" in m or "as_prop=True" in m for m in marks)
    options = "".join(f":{m}:\n" for m in ("classmethod", "staticmethod") if m in marks)
    if any("cls_method=True" in m for m in marks):
        options = ":classmethod:\n"
    return describe_function(node.name, node, notes, "property" if prop else "method", True, options)


def describe_class(name: str, node: ast.ClassDef, module: Module) -> str:
    inside = [n for n in node.body if isinstance(n, ast.FunctionDef)] + module.methods.get(name, [])
    init = next((n for n in inside if n.name == "__init__"), None)
    attributes = [n for n in node.body if isinstance(n, ast.AnnAssign)]
    head, table = name, []
    if init:
        head, table = name + signature(init, True), fields(init, module.notes)
    elif attributes:
        head += "(" + ", ".join(ast.unparse(n) for n in attributes) + ")"
        found = [(n.target.id, module.notes.get(n.end_lineno)) for n in attributes]
        table = [f":param {field}: {escape(note)}" for field, note in found if note]
    public = [n for n in inside if not n.name.startswith("_") and n.name != "extra_repr"]
    body = [paragraphs(ast.get_docstring(node)), "\n".join(table)]
    return directive("class", head, body + [describe_method(n, module.notes) for n in public], colons=4)


def describe(name: str, node: ast.stmt, module: Module) -> str:
    if isinstance(node, ast.ClassDef):
        return describe_class(name, node, module)
    if isinstance(node, ast.FunctionDef):
        return describe_function(name, node, module.notes)
    value = ast.unparse(node.value) if node.value else ""
    short = len(value) < 70 and "\n" not in value and len(targets(node)) == 1
    note = module.notes.get(node.end_lineno) or module.notes.get(node.lineno)
    return directive("data", name, [escape(note or "")], f":value: {value}\n" if short else "")


def module_page(module: Module) -> str:
    "One page of the reference, in the order and under the headings of the notebook."
    book = f"../{module.notebook.name}"
    page = [
        f"# {module.name}\n",
        f"`llm_scratch.{module.name}` is written in the notebook [{title(module.notebook)}]({book}).\n",
        f"```{{py:module}} llm_scratch.{module.name}\n```\n",
    ]
    section = None
    for name, node in module:
        chapter = module.place(node.lineno)
        if chapter != section:
            section, anchor = chapter, f"#{slug(plain(chapter))}" if chapter else ""
            page.append(f"## {plain(chapter) or 'At the start'}\n")
            page.append(f"```{{container}} made-in\n[In the notebook](<{book}{anchor}>)\n```\n")
        page.append(describe(name, node, module))
    return "\n".join(page)


def summary(node: ast.stmt) -> str:
    "The first sentence of a docstring."
    doc = ast.get_docstring(node) if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else ""
    return escape(re.split(r"(?<=[.:])\s", doc or "")[0].rstrip(":"))


def overview(modules: list[Module]) -> str:
    "What `from llm_scratch import` offers, and the modules with the notebooks that they are written in."
    root = ast.parse((ROOT / "llm_scratch" / "__init__.py").read_text(encoding="utf-8"))
    home = next(ast.literal_eval(n.value) for n in root.body if targets(n) == ["_HOME"])
    home["flash_attention"] = "flash_attention"
    found = {(m.name, name): node for m in modules for name, node in m}
    names = [
        f"| {{py:obj}}`{name} <llm_scratch.{module}.{name}>` | {summary(found[module, name])} |"
        for name, module in home.items()
    ]
    rows = [
        f"| [{m.name}]({m.name}.md) | [{title(m.notebook)}](../{m.notebook.name}) | {len(list(m))} |"
        for m in modules
    ]
    return "\n".join([
        "# Overview\n\n`from llm_scratch import ...` gives the main names; each is loaded when it is first used:\n",
        "| name | what it is |\n|---|---|", *names,
        "\nEverything else is in its module:\n",
        "| module | written in | names |\n|---|---|---|", *rows, "",
    ])  # fmt: skip


# The book


def toctree(caption: str, entries: list[str]) -> str:
    return f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(entries) + "\n```\n"


def entry(path: Path) -> str:
    "A line of the sidebar: the number of the notebook, its title, its place."
    place = path.relative_to(ROOT / "nbs").with_suffix("").as_posix()
    number = re.match(r"\d+\w?(?=_)", path.stem)
    return f"{number[0] + ' · ' if number else ''}{title(path)} <{place}>"


def main(out: Path) -> None:
    modules = [Module(p) for p in sorted(ROOT.glob("llm_scratch/[!_]*.py"))]
    modules.sort(key=lambda m: m.notebook.name)
    home, twice = {}, set()
    for module in modules:
        for name, _ in module:
            twice |= {name} & home.keys()
            home[name] = home[f"{module.name}.{name}"] = f"llm_scratch.{module.name}.{name}"
    for name in twice | {m.name for m in modules}:  # which one is meant cannot be told
        home.pop(name, None)
    shutil.rmtree(out, ignore_errors=True)
    (out / "api").mkdir(parents=True)
    alts = {}
    for path in [ROOT / "nbs" / "index.ipynb", *NOTEBOOKS, *NOTES]:
        place = path.relative_to(ROOT / "nbs")
        notebook = prepare_notebook(path, home)
        alts[place.with_suffix("").as_posix()] = image_alts(notebook)
        if path.stem == "index":
            reference = ["Overview <api/index>", *(f"{m.name} <api/{m.name}>" for m in modules)]
            trees = [
                toctree("Workbook", [entry(p) for p in NOTEBOOKS]),
                toctree("Notes", [entry(p) for p in NOTES]),
                toctree("Reference", reference),
            ]
            notebook.cells.append(nbformat.v4.new_markdown_cell("\n".join(trees)))
        (out / place).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, out / place)
    (out / "alts.json").write_text(json.dumps(alts))
    (out / "api" / "index.md").write_text(overview(modules), encoding="utf-8")
    for module in modules:
        (out / "api" / f"{module.name}.md").write_text(module_page(module), encoding="utf-8")
    shutil.copytree(ROOT / "nbs" / "images", out / "images")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
