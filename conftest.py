"""Lets `pytest --nbval nbs` and nbdev live together: tells nbval what nbdev knows.

- nbdev_clean blanks every execution count, which nbval reads as 'never run': a cell with outputs counts as run.
- Cells marked `#| eval: false`, or with a test flag of settings.ini that is off (`#| gpu`, `#| slow`), are skipped;
  `pytest --nb-flags 'gpu slow'` turns flags on.
- A trailing `;` hides a cell's value, as it does in JupyterLab.
"""

import os
import re
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent
DIRECTIVE = re.compile(r"^\s*#\s*\|\s*(\S+)\s*(.*)$")


def directives(source):
    "nbdev's directives: the `#|` lines at the top of a cell, as {name: argument}."
    found = {}
    for line in filter(str.strip, source.splitlines()):
        match = DIRECTIVE.match(line)
        if not match:
            break
        found[match[1].rstrip(":")] = match[2].strip().lower()
    return found


def pytest_addoption(parser):
    parser.addoption(
        "--nb-flags",
        default=os.environ.get("NB_FLAGS", ""),
        help="notebook test flags to run, e.g. 'gpu slow'",
    )


def pytest_configure(config):
    if "PYTEST_XDIST_WORKER" in os.environ:  # one thread for each of several workers, rather than all for all
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    option = config.option
    if not (getattr(option, "nbval", False) or getattr(option, "nbval_lax", False)):
        return
    os.environ["IN_TEST"] = "1"  # an nbdev_export() inside a notebook then writes nothing
    if not option.nbval_kernel_name:
        option.nbval_current_env = True
    if option.nbval_sanitize_with is None:
        option.nbval_sanitize_with = str(ROOT / "nbval_sanitize.cfg")
    if option.nbval_cell_timeout == 2000:  # nbval's default: a dead kernel would be waited for all that time
        option.nbval_cell_timeout = 300.0

    from nbval.kernel import RunningKernel

    def execute_cell_input(self, cell_input, allow_stdin=None):
        return self.kc.execute(cell_input, store_history=True, allow_stdin=allow_stdin, stop_on_error=False)

    RunningKernel.execute_cell_input = execute_cell_input  # without history IPython ignores the trailing `;`


def pytest_collection_modifyitems(config, items):
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    off = set(settings["DEFAULT"].get("tst_flags", "").split()) - set(config.getoption("--nb-flags").split())
    for item in items:
        cell = getattr(item, "cell", None)
        if cell is None:
            continue
        if cell.execution_count is None and cell.outputs:
            cell.execution_count = 0
        found = directives(cell.source)
        reason = "eval: false" if found.get("eval") == "false" else " ".join(off & found.keys())
        if reason:
            item.add_marker(pytest.mark.skip(reason=f"#| {reason}"))
