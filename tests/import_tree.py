"""What every file imports and when, read from its syntax tree without running it."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Import:
    """One imported name. `when`: "import" (with the file), "call", "optional" (ImportError is caught) or "types"."""

    name: str
    when: str
    line: int

    @property
    def top(self) -> str:
        return self.name.partition(".")[0]


RUNTIME = {"import", "call"}
Tree = Mapping[str, list[Import]]
"""Module -> what it imports."""


class _Reader(ast.NodeVisitor):
    """Collects the imports of one file, relative ones made absolute."""

    def __init__(self, package: str) -> None:
        self.package, self.when = package.split("."), "import"
        self.found: list[Import] = []

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [Import(alias.name, self.when, node.lineno) for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            kept = self.package[: len(self.package) + 1 - node.level]
            base = ".".join([*(kept or ["<outside>"]), *([base] if base else [])])
        self.found += [Import(f"{base}.{alias.name}", self.when, node.lineno) for alias in node.names]

    def visit_Call(self, node: ast.Call) -> None:
        function = ast.unparse(node.func).rpartition(".")[2]
        if function in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
            self.found.append(Import(str(node.args[0].value), self.when, node.lineno))
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        types = ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        self._visit_all(node.body, "types" if types else self.when)
        self._visit_all(node.orelse, self.when)

    def visit_Try(self, node: ast.Try) -> None:
        caught = " ".join(ast.unparse(handler.type) for handler in node.handlers if handler.type)
        optional = "ImportError" in caught or "ModuleNotFoundError" in caught
        self._visit_all(node.body, "optional" if optional else self.when)
        self._visit_all([*node.handlers, *node.orelse, *node.finalbody], self.when)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._visit_all(node.body, "call")

    visit_AsyncFunctionDef = visit_FunctionDef

    def _visit_all(self, nodes: Sequence[ast.AST], when: str) -> None:
        before, self.when = self.when, when
        for node in nodes:
            self.visit(node)
        self.when = before


def read(sources: Mapping[str, str]) -> Tree:
    """Path relative to the root -> source, to module -> imports."""
    tree: dict[str, list[Import]] = {}
    for path, source in sources.items():
        module = path.removesuffix(".py").replace("/", ".")
        reader = _Reader(module.rpartition(".")[0])  # of a package's __init__, the package itself
        reader.visit(ast.parse(source, path))
        tree[module.removesuffix(".__init__")] = reader.found
    return tree


def resolve(tree: Tree, name: str) -> str | None:
    """The file behind an imported name: `trainer.loop.train` -> `trainer.loop`; None for other packages."""
    while name and name not in tree:
        name = name.rpartition(".")[0]
    return name or None


def loads(tree: Tree, module: str, when: set[str]) -> set[str]:
    """The modules of ours that a module names in its imports."""
    return {name for i in tree[module] if i.when in when and (name := resolve(tree, i.name))} - {module}


def closure(tree: Tree, starts: list[str], when: set[str]) -> set[str]:
    """All modules of ours that importing `starts` loads, packages above them included."""
    seen: set[str] = set()
    waiting = [module for module in starts if module in tree]
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            parent = module.rpartition(".")[0]
            waiting += [*loads(tree, module, when), *([parent] if parent in tree else [])]
    return seen
