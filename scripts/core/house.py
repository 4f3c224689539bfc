#!/usr/bin/env python
"""Count what makes the code hard to read, and fail when a count grows.

    python scripts/core/house.py                 the table of counts
    python scripts/core/house.py --list demos    every place behind one count

Each count has a ceiling in CEILINGS. A change that lowers a count lowers its ceiling too.
"""

import argparse
import ast
import re
import statistics
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "core"))

CEILINGS = {
    "wide": 0,  # lines over 120 columns, in notebooks' code, tests, scripts and benchmarks
    "chains": 0,  # statements joined by `;`
    "long": 0,  # functions over 40 lines in notebooks, without docstring and parameters
    "long_scripts": 0,  # the same in tests, scripts and benchmarks
    "modules": 0,  # modules over 800 lines
    "median": 20,  # lines of the median export cell
    "demos": 0,  # public names that no demo or test cell of their notebook uses
    "rows": 3,  # export cells in a row without another code cell
    "contract": 0,  # "SPEC" and row ids in the package and in prose
    "words": 0,  # words that the style guide replaces, in prose, names, comments, tests, scripts and benchmarks
    "twice": 0,  # public names that two modules define
    "upward": 0,  # imports of a later wing or a later module
    "unread": 0,  # settings that no code reads
}
MEANING = {
    "wide": "lines over 120 columns",
    "chains": "statements joined by ;",
    "long": "functions over 40 lines in notebooks",
    "long_scripts": "functions over 40 lines in tests, scripts and benchmarks",
    "modules": "modules over 800 lines",
    "median": "lines of the median export cell",
    "demos": "public names without a demo or a test in their notebook",
    "rows": "longest run of export cells without a demo",
    "contract": "row ids of the contract in package and prose",
    "words": "words that the style guide replaces",
    "twice": "public names with two definitions",
    "upward": "imports that point up",
    "unread": "settings that no code reads",
}
WORDS = re.compile(
    r"\b(teach(?:es|ing)?|taught|lots?|rooms?|doors?|the house|settles?|settled|wish(?:es)?|judges?|judged|judging"
    r"|going_on|mean_of_the_best|image_twin|as_it_ended|teaching_rows|manifest_pool)\b",
    re.I,
)
ROWS = re.compile(
    r"\bSPEC\b|\b(?:BX|CF|CT|DM|DT|EV|EX|FX|GP|HS|IM|IT|NM|OP|RS|RT|SG|SP|SV|TL|BM|X)\d+\b"  # RP1 to RP5 have a page
)


@dataclass
class Notebook:
    "One chapter: its module, its cells."

    path: Path
    cells: list

    @property
    def module(self) -> str:
        wing = self.path.parent.relative_to(ROOT / "nbs").parts
        return ".".join([*wing, re.sub(r"^\d+_", "", self.path.stem)])

    @property
    def name(self) -> str:
        return str(self.path.relative_to(ROOT / "nbs").with_suffix(""))

    def code(self) -> list[str]:
        return [plain(c.source) for c in self.cells if c.cell_type == "code"]

    def prose(self) -> list[str]:
        return [c.source for c in self.cells if c.cell_type == "markdown"]


def plain(source: str) -> str:
    "A cell without Jupyter's magics, which Python cannot parse."
    return re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.M)


def is_export(source: str) -> bool:
    return bool(re.match(r"#\|\s*export\b", source))


@cache
def parsed(source: str) -> ast.Module:
    "The syntax tree of a text, which several counts read."
    return ast.parse(source)


@cache
def nodes(source: str) -> tuple[ast.AST, ...]:
    "Every node of that tree."
    return tuple(ast.walk(parsed(source)))


@cache
def notebooks() -> list[Notebook]:
    "Every chapter that exports a module, in reading order."
    paths = sorted((ROOT / "nbs").rglob("[0-9]*_*.ipynb"), key=lambda p: p.name)
    return [Notebook(p, nbformat.read(p, 4).cells) for p in paths if p.parent.name != "guide"]


def cells() -> Iterator[tuple[str, str]]:
    "Place and text of every code cell."
    for nb in notebooks():
        for i, source in enumerate(nb.code()):
            yield f"{nb.name} cell {i}", source


def scripts() -> Iterator[tuple[str, str]]:
    "Place and text of every test, script and benchmark."
    for folder in ("tests", "scripts", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")


def wide() -> list[str]:
    return [
        f"{place}: {line.strip()[:100]}"
        for place, text in (*cells(), *scripts())
        for line in text.splitlines()
        if len(line) > 120 and "fig-alt" not in line and "# noqa" not in line
    ]


def chains() -> list[str]:
    found = []
    for place, text in (*cells(), *scripts()):
        for node in (n for n in nodes(text) if hasattr(n, "body")):
            for body in (node.body, getattr(node, "orelse", []), getattr(node, "finalbody", [])):
                if isinstance(body, list):
                    pairs = zip(body, body[1:], strict=False)
                    found += [f"{place}: line {b.lineno}" for a, b in pairs if a.end_lineno == b.lineno]
    return found


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    "Lines of a function's body, without its docstring."
    first = function.body[1] if ast.get_docstring(function) and len(function.body) > 1 else function.body[0]
    return function.end_lineno - first.lineno + 1


def long_functions(sources: Iterable[tuple[str, str]]) -> list[str]:
    return [
        f"{place}: {node.name}, {body_lines(node)} lines"
        for place, text in sources
        for node in nodes(text)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and body_lines(node) > 40
    ]


def long() -> list[str]:
    return long_functions(cells())


def long_scripts() -> list[str]:
    return long_functions(scripts())


def modules() -> list[str]:
    lines = {nb.name: sum(len(s.splitlines()) for s in nb.code() if is_export(s)) for nb in notebooks()}
    return [f"{name}: {n} lines" for name, n in lines.items() if n > 800]


def code_lines(source: str) -> int:
    "Lines of code of a cell; documented parameters stand one a line and do not count, nor do docstrings."
    free: set[int] = set()
    for n in nodes(source):
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)):
            free |= set(range(n.lineno, n.body[0].lineno))
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and ast.get_docstring(n):
            free |= set(range(n.body[0].lineno, n.body[0].end_lineno + 1))
    lines = enumerate(source.splitlines(), 1)
    return sum(1 for i, line in lines if i not in free and line.strip() and not line.lstrip().startswith("#"))


def median() -> float:
    return statistics.median(code_lines(s) for nb in notebooks() for s in filter(is_export, nb.code()))


def defined(source: str) -> list[str]:
    "Public functions and classes that a cell defines, but for methods that @patch adds and for commands."
    names = []
    for node in parsed(source).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        free = r"patch|delegates|\w+\.command\("  # commands are shown by their help, on the page of the command line
        if not any(re.match(free, ast.unparse(d)) for d in node.decorator_list):
            names.append(node.name)
    return names


def used(source: str) -> set[str]:
    "Names that a cell uses, also in code that it hands to another process; other strings and comments use nothing."
    names = set()
    for node in nodes(source):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.Constant) and re.search(r"(?m)^ *from pillsnap\S* import ", str(node.value)):
            with suppress(SyntaxError):  # a part of an f-string
                names |= used(textwrap.dedent(node.value))
    return names


def demos() -> list[str]:
    found = []
    for nb in notebooks():
        shown = set().union(*(used(s) for s in nb.code() if not is_export(s)))
        names = [n for s in filter(is_export, nb.code()) for n in defined(s)]
        found += [f"{nb.name}: {n}" for n in names if n not in shown]
    return found


def is_definition(source: str) -> bool:
    "An export cell that defines something, not one that imports or names the module."
    body = parsed(source).body
    return is_export(source) and not all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in body)


def longest_rows() -> list[str]:
    "Runs of more than three export cells."
    found = []
    for nb in notebooks():
        run = 0
        for source in [*nb.code(), ""]:
            if source and is_definition(source):
                run += 1
                continue
            if run > 3:
                found.append(f"{nb.name}: {run} before {source[:50]!r}")
            run = 0
    return found


def said(nb: Notebook) -> Iterator[str]:
    "What a reader reads: prose, and the docstrings and comments of exported code."
    yield from nb.prose()
    for source in filter(is_export, nb.code()):
        yield "\n".join(re.findall(r"#.*$", source, re.M))
        yield from (ast.get_docstring(n) or "" for n in nodes(source) if has_doc(n))


def has_doc(node: ast.AST) -> bool:
    return isinstance(node, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))


def places(pattern: re.Pattern) -> list[str]:
    found = []
    for nb in notebooks():
        for text in said(nb):
            for m in pattern.finditer(text):
                around = text[max(0, m.start() - 30) : m.end() + 30].replace("\n", " ")
                found.append(f"{nb.name}: …{around}…")
    return found


def contract() -> list[str]:
    "Chapters and presets by row ids, which campaigns and benchmarks may have in their names."
    presets = [(p, ROWS) for p in sorted((ROOT / "configs").glob("*.yaml"))]
    programs = [
        (p, re.compile(r"\bSPEC [A-Z]")) for p in sorted((ROOT / "scripts").rglob("*")) if p.suffix in (".py", ".sh")
    ]
    texts = [(p, pattern, p.read_text(encoding="utf-8")) for p, pattern in presets + programs]
    return places(ROWS) + [f"{p.name}: {m[0]}" for p, pattern, text in texts for m in pattern.finditer(text)]


def identifiers(source: str) -> set[str]:
    "Names of variables, attributes, parameters, functions and classes."
    parts = ("id", "attr", "arg", "name")
    return {str(getattr(node, part, "")) for node in nodes(source) for part in parts}


def words() -> list[str]:
    "Prose and docstrings, names and comments of all cells, and the whole text of tests, scripts and benchmarks."
    found = places(WORDS)
    texts = {place: "\n".join([*identifiers(s), *re.findall(r"#.*$", s, re.M)]) for place, s in cells()}
    texts |= dict(scripts())
    for own in ("scripts/core/house.py", "tests/test_house.py"):  # they name the words
        del texts[own]
    return found + [f"{place}: {m[0]}" for place, text in texts.items() for m in WORDS.finditer(text)]


def twice() -> list[str]:
    where = defaultdict(set)
    for nb in notebooks():
        for name in (n for s in filter(is_export, nb.code()) for n in defined(s)):
            where[name].add(nb.module)
    return [f"{name}: {', '.join(sorted(modules))}" for name, modules in sorted(where.items()) if len(modules) > 1]


def upward() -> list[str]:
    order = {nb.module: i for i, nb in enumerate(notebooks())}
    found = []
    for nb in notebooks():
        for source in filter(is_export, nb.code()):
            for module in re.findall(r"(?:from|import) pillsnap\.([\w.]+)", source):
                if module in order and order[module] >= order[nb.module]:
                    found.append(f"{nb.name} imports {module}")
    return found


def unread() -> list[str]:
    import unread_keys

    return sorted(unread_keys.unread_keys())


LISTS = {
    "wide": wide,
    "chains": chains,
    "long": long,
    "long_scripts": long_scripts,
    "modules": modules,
    "demos": demos,
    "rows": longest_rows,
    "contract": contract,
    "words": words,
    "twice": twice,
    "upward": upward,
    "unread": unread,
}


@cache
def found(what: str) -> list[str]:
    "The places behind one count, of the files as they were when this was first asked."
    return LISTS[what]()


def count(what: str) -> float:
    "One count; for `rows` the longest run."
    if what == "median":
        return median()
    if what == "rows":
        runs = [int(re.search(r": (\d+) before", place)[1]) for place in found("rows")]
        return max(runs, default=3)
    return len(found(what))


def main() -> int:
    "Exit status 1 when a count is above its ceiling."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", choices=LISTS, help="show every place behind one count")
    asked = parser.parse_args()
    if asked.list:
        print("\n".join(LISTS[asked.list]()))
        return 0
    grown = False
    for what, ceiling in CEILINGS.items():
        n = count(what)
        grown |= n > ceiling
        print(f"{n:6g}  (at most {ceiling:g})  {MEANING[what]}{'   ABOVE' if n > ceiling else ''}")
    return int(grown)


if __name__ == "__main__":
    sys.exit(main())
