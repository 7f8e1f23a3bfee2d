"""Tells setuptools what settings.ini says: the one place where the package is described."""

import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(root / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
lib = cfg["lib_name"]

setup(
    name=lib,
    version=cfg["version"],
    description=cfg["description"],
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license=cfg["license"].upper(),
    keywords=cfg["keywords"].split(),
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=[lib, f"{lib}.*"]),
    install_requires=shlex.split(cfg["requirements"]),
    extras_require={extra: shlex.split(cfg[f"{extra}_requirements"]) for extra in ("dev", "bench", "book")},
    entry_points={"console_scripts": [cfg["console_scripts"]], "nbdev": [f"{lib}={lib}._modidx:d"]},
)
