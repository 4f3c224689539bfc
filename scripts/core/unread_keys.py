"""List the settings that no code reads.

    python scripts/core/unread_keys.py        one line per such key; exit status 1 if there is one

The package's source is parsed, not run. A key is read where code takes it from a block of the configuration:
`cfg.train.seed`, `c.lr` after `c = cfg.train.classification`, `getattr(block, "lr")`. The block behind a name is
followed through annotations, assignments, attributes of classes and return types. `pillsnap/core/settings.py`
declares the keys, so what it says itself does not count. Keys that code reads in a way that this script cannot follow
stand in `ELSEWHERE`, each with the place that reads it. A key with one legal value needs no reader: there is nothing
to choose, and any other value is refused.
"""

import ast
import sys
import types
import typing
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from pillsnap.core.settings import Block, Config

DECLARES = "core/settings.py"
METHODS = {("Progressive", "stage"): "StageSpec"}  # methods of a block, and the block that they return
ELSEWHERE: dict[str, tuple[str, str]] = {  # key or block.* → the file that reads it, and a text that stands there
    "pack.*": ("photos/stagepack.py", 'pack.model_dump(exclude={"enabled"})'),  # the recipe of a pack
    "synth.*": ("dataset/conversion.py", "write_delivery(root, **synth.model_dump()"),
    "retrieval.brightness": ("training/retrieval.py", 'zip(("brightness", "contrast", "saturation", "hue")'),
    "retrieval.contrast": ("training/retrieval.py", 'zip(("brightness", "contrast", "saturation", "hue")'),
    "retrieval.saturation": ("training/retrieval.py", 'zip(("brightness", "contrast", "saturation", "hue")'),
    "retrieval.hue": ("training/retrieval.py", 'zip(("brightness", "contrast", "saturation", "hue")'),
}


def blocks_in(annotation: object) -> list[type[Block]]:
    "The blocks that an annotation names: `Ema`, `Ema|None`, `dict[str, StageOverride]`."
    plain = isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias)
    if plain and issubclass(annotation, Block):
        return [annotation]
    return [b for a in typing.get_args(annotation) for b in blocks_in(a)]


def choices(annotation: object) -> tuple:
    "The values of a `Literal`; empty for any other annotation."
    return typing.get_args(annotation) if typing.get_origin(annotation) is typing.Literal else ()


class Tree:
    "The settings tree: every block by its dotted path, and every key."

    def __init__(self, root: type[Block] = Config):
        self.block_at: dict[str, type[Block]] = {}
        self.keys: list[str] = []  # those with something to choose
        self.fixed: list[str] = []  # those with one legal value
        self._walk(root, "")
        self.paths: dict[str, set[str]] = defaultdict(set)
        for path, block in self.block_at.items():
            self.paths[block.__name__].add(path)

    def _walk(self, block: type[Block], path: str) -> None:
        self.block_at[path] = block
        for name, f in block.model_fields.items():
            dotted = f"{path}.{name}".lstrip(".")
            nested = blocks_in(f.annotation)
            if not nested and len(choices(f.annotation)) != 1:
                self.keys.append(dotted)
            if not nested and len(choices(f.annotation)) == 1:
                self.fixed.append(dotted)
            for b in nested:
                many = typing.get_origin(f.annotation) in (dict, list, tuple)
                self._walk(b, f"{dotted}.*" if many else dotted)


# What a name stands for, as a set of texts: "block:train.ema" is a block, "many:train.stage_overrides" a dict of
# blocks,
# "class:Plan" an object of a class of the package.
Value = frozenset[str]
NOTHING: Value = frozenset()


def is_text(e: ast.expr) -> bool:
    "Whether an expression is a literal string."
    return isinstance(e, ast.Constant) and isinstance(e.value, str)


def called_name(e: ast.expr) -> str:
    "The name of a called function or method, empty for any other expression."
    if isinstance(e, ast.Name):
        return e.id
    return e.attr if isinstance(e, ast.Attribute) else ""


class Reader:
    "Follows blocks through a package's source and notes every key that is taken from one."

    def __init__(self, tree: Tree):
        self.tree = tree
        self.read: dict[str, str] = {}  # key → file:line that reads it
        self.returns: dict[str, Value] = {}  # function → what it returns
        self.attributes: dict[tuple[str, str], Value] = defaultdict(lambda: NOTHING)  # (class, name) → what it holds
        self.classes: set[str] = set()
        self.where = ""

    def named(self, annotation: ast.expr | None) -> Value:
        "What an annotation in the source stands for."
        if annotation is None:
            return NOTHING
        text = annotation.value if is_text(annotation) else ast.unparse(annotation)
        words = {w.strip().split(".")[-1] for w in text.split("|")}
        found = {f"block:{p}" for w in words for p in self.tree.paths.get(w, ())}
        return frozenset(found | {f"class:{w}" for w in words & self.classes})

    def take(self, owner: Value, name: str, line: int) -> Value:
        "The attribute of a value; a key is noted."
        out: set[str] = set()
        for kind, _, path in (v.partition(":") for v in owner):
            if kind == "class":
                out |= self.attributes[(path, name)]
            if kind != "block":
                continue
            block = self.tree.block_at[path]
            dotted = f"{path}.{name}".lstrip(".")
            if (block.__name__, name) in METHODS:
                out |= {f"block:{p}" for p in self.tree.paths[METHODS[(block.__name__, name)]]}
            elif dotted in self.tree.block_at:
                out.add(f"block:{dotted}")
            elif f"{dotted}.*" in self.tree.block_at:
                out.add(f"many:{dotted}")
            elif name in block.model_fields:
                self.read.setdefault(dotted, f"{self.where}:{line}")
            elif name in ("model_copy",):
                out.add(f"block:{path}")
        return frozenset(out)

    def value(self, e: ast.expr | None, env: dict[str, Value]) -> Value:
        "What an expression stands for; its parts are visited."
        if e is None:
            return NOTHING
        match e:
            case ast.Name(id=name):
                return env.get(name, frozenset({"block:"}) if name == "cfg" else NOTHING)
            case ast.Attribute(value=owner, attr=name):
                return self.take(self.value(owner, env), name, e.lineno)
            case ast.NamedExpr(target=target, value=v):
                env[target.id] = self.value(v, env)
                return env[target.id]
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
                return self.comprehension(e, dict(env))
            case ast.Call():
                return self.call(e, env)
        return self.compound(e, env)

    def compound(self, e: ast.expr, env: dict[str, Value]) -> Value:
        "What an expression stands for that is made of others: a choice, an element, a lambda."
        match e:
            case ast.BoolOp(values=parts):
                return frozenset().union(*(self.value(p, env) for p in parts))
            case ast.IfExp(test=test, body=a, orelse=b):
                self.value(test, env)
                return self.value(a, env) | self.value(b, env)
            case ast.Subscript(value=owner, slice=index):
                self.value(index, env)
                return self.elements(self.value(owner, env))
            case ast.Lambda(args=args, body=body):
                inner = env | {a.arg: NOTHING for a in args.args if a.arg != "cfg"}
                for d in (*args.defaults, *args.kw_defaults):
                    self.value(d, env)
                self.value(body, inner)
                return NOTHING
        for part in ast.iter_child_nodes(e):
            if isinstance(part, ast.expr):
                self.value(part, env)
        return NOTHING

    @staticmethod
    def elements(owner: Value) -> Value:
        return frozenset(f"block:{v[5:]}.*" for v in owner if v.startswith("many:"))

    def comprehension(self, e: ast.expr, env: dict[str, Value]) -> Value:
        for g in e.generators:
            self.value(g.iter, env)
            self.bind(g.target, NOTHING, env)
            for test in g.ifs:
                self.value(test, env)
        for part in ("elt", "key", "value"):
            self.value(getattr(e, part, None), env)
        return NOTHING

    def call(self, e: ast.Call, env: dict[str, Value]) -> Value:
        owner = self.value(e.func, env)
        args = [self.value(a.value if isinstance(a, ast.Starred) else a, env) for a in e.args]
        for k in e.keywords:
            self.value(k.value, env)
        name = called_name(e.func)
        if name == "getattr" and len(e.args) > 1 and is_text(e.args[1]):
            return self.take(args[0], e.args[1].value, e.lineno)
        if name in ("get", "setdefault") and isinstance(e.func, ast.Attribute):
            return self.elements(self.value(e.func.value, env))
        if name in self.classes:
            return frozenset({f"class:{name}"})
        return owner or self.returns.get(name, NOTHING)

    def bind(self, target: ast.expr, v: Value, env: dict[str, Value]) -> None:
        match target:
            case ast.Name(id=name):
                env[name] = v
            case ast.Attribute(value=owner, attr=name):
                for kind, _, cls in (o.partition(":") for o in self.value(owner, env)):
                    if kind == "class":
                        self.attributes[(cls, name)] |= v
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                for p in parts:
                    self.bind(p.value if isinstance(p, ast.Starred) else p, NOTHING, env)

    def assign(self, target: ast.expr, value: ast.expr, env: dict[str, Value]) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            found = [self.value(v, env) for v in value.elts]
            for t, v in zip(target.elts, found):
                self.bind(t, v, env)
        else:
            self.bind(target, self.value(value, env), env)

    def function(self, f: ast.FunctionDef | ast.AsyncFunctionDef, env: dict[str, Value], cls: str | None) -> None:
        a = f.args
        inner = dict(env)
        for p in (*a.posonlyargs, *a.args, *a.kwonlyargs):
            inner[p.arg] = self.named(p.annotation) or (frozenset({"block:"}) if p.arg == "cfg" else NOTHING)
        if cls and a.args and a.args[0].arg == "self":
            inner["self"] = frozenset({f"class:{cls}"})
        for d in (*a.defaults, *a.kw_defaults):
            self.value(d, env)
        self.body(f.body, inner)

    def body(self, statements: Iterable[ast.stmt], env: dict[str, Value], cls: str | None = None) -> None:
        for s in statements:
            match s:
                case ast.FunctionDef() | ast.AsyncFunctionDef():
                    self.function(s, env, cls)
                case ast.ClassDef(name=name):
                    self.body(s.body, dict(env), name)
                case ast.Assign(targets=targets, value=v):
                    for t in targets:
                        self.assign(t, v, env)
                case ast.AnnAssign(target=t, annotation=n, value=v):
                    found = self.value(v, env) | self.named(n)
                    self.bind(t, found, env)
                    if cls and isinstance(t, ast.Name):
                        self.attributes[(cls, t.id)] |= self.named(n)
                case _:
                    self.others(s, env, cls)

    def others(self, s: ast.stmt, env: dict[str, Value], cls: str | None) -> None:
        "Loops, conditions, with and try: their expressions, then their bodies."
        for name, part in ast.iter_fields(s):
            parts = part if isinstance(part, list) else [part]
            if isinstance(s, (ast.For, ast.AsyncFor)) and name == "target":
                self.bind(s.target, NOTHING, env)
                continue
            for p in parts:
                if isinstance(p, ast.expr):
                    self.value(p, env)
                elif isinstance(p, ast.stmt):
                    self.body([p], env, cls)
                elif isinstance(p, ast.ExceptHandler):
                    self.body(p.body, env, cls)
                elif isinstance(p, ast.withitem):
                    found = self.value(p.context_expr, env)
                    if p.optional_vars is not None:
                        self.bind(p.optional_vars, found, env)
                elif isinstance(p, ast.match_case):
                    self.body(p.body, env, cls)


@dataclass(frozen=True)
class Source:
    "A file's syntax tree, the names of its classes, and its functions that say what they return."

    tree: ast.Module
    classes: frozenset[str]
    functions: tuple[ast.FunctionDef, ...]


@cache
def parsed(text: str) -> Source:
    "A file, read once however often it is asked for."
    tree = ast.parse(text)
    found = list(ast.walk(tree))
    functions = tuple(n for n in found if isinstance(n, ast.FunctionDef) and n.returns is not None)
    return Source(tree, frozenset(n.name for n in found if isinstance(n, ast.ClassDef)), functions)


def read_keys(package: Path, tree: Tree) -> dict[str, str]:
    "Every key that the package's code reads, with the first place."
    paths = [p for p in sorted(package.rglob("*.py")) if p.name != "_modidx.py"]
    everything = {p.relative_to(package).as_posix(): parsed(p.read_text(encoding="utf-8")) for p in paths}
    using = {name: source for name, source in everything.items() if name != DECLARES}
    r = Reader(tree)
    r.classes = set().union(*(source.classes for source in using.values()))
    for source in everything.values():
        for n in source.functions:
            if v := r.named(n.returns):
                r.returns[n.name] = v
    for _ in range(2):  # attributes of classes that a later file sets are known in the second round
        for r.where, source in using.items():
            r.body(source.tree.body, {})
    return r.read


def covers(pattern: str, key: str) -> bool:
    "Whether an entry of ELSEWHERE names a key."
    return key == pattern or (pattern.endswith(".*") and key.startswith(pattern[:-1]))


def unread_keys(package: Path = ROOT / "pillsnap", tree: Tree | None = None) -> list[str]:
    "Keys that no code reads."
    tree = tree or Tree()
    read = read_keys(package, tree)
    return [k for k in tree.keys if k not in read and not any(covers(p, k) for p in ELSEWHERE)]


def stale_entries(package: Path = ROOT / "pillsnap") -> list[str]:
    "Entries of ELSEWHERE that name no key, whose text is not in their file any more, or that are not needed."
    tree = Tree()
    read, out = read_keys(package, tree), []
    for pattern, (file, text) in ELSEWHERE.items():
        mine = [k for k in tree.keys if covers(pattern, k)]
        if not mine:
            out.append(f"{pattern}: there is no such key")
        elif text not in (package / file).read_text(encoding="utf-8"):
            out.append(f"{pattern}: {file} does not hold {text!r}")
        elif all(k in read for k in mine):
            out.append(f"{pattern}: this script sees the key being read; the entry is not needed")
    return out


if __name__ == "__main__":
    found = unread_keys() + stale_entries()
    print("\n".join(found) or "every key is read")
    sys.exit(bool(found))
