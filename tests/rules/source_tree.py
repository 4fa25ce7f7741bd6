"""The source files as syntax trees, and small walks over them that the rule tests share."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE_FOLDERS = ("rayft", "kernels", "recipes")
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """A Python file: its path from the root of the repository, its text and its syntax tree."""

    path: str
    text: str
    tree: ast.Module

    @property
    def lines(self) -> int:
        """Number of lines."""
        return len(self.text.splitlines())


def parse(path: str, text: str) -> Source:
    """A source from its text; tests of the rules themselves pass made-up paths."""
    return Source(path, text, ast.parse(text, filename=path))


def sources(*folders: str) -> list[Source]:
    """Every Python file under the folders, ordered by path."""
    files = (file for folder in folders or SOURCE_FOLDERS for file in (ROOT / folder).rglob("*.py"))
    return [parse(str(file.relative_to(ROOT)), file.read_text(encoding="utf-8")) for file in sorted(files)]


def functions(source: Source) -> Iterator[FunctionNode]:
    """Every function and method of a source, nested ones too."""
    return (node for node in ast.walk(source.tree) if isinstance(node, FunctionNode))


def classes(source: Source) -> Iterator[ast.ClassDef]:
    """Every class of a source, nested ones too."""
    return (node for node in ast.walk(source.tree) if isinstance(node, ast.ClassDef))


def methods(node: ast.ClassDef) -> list[FunctionNode]:
    """The methods that a class defines itself."""
    return [item for item in node.body if isinstance(item, FunctionNode)]


def length(node: FunctionNode) -> int:
    """Lines of a function, signature and docstring included, decorators not."""
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def imports(source: Source) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import, lazy ones too, except those that only a type checker reads.

    `from a.b import c` yields a.b.c, because c may be a module.
    """
    for node in _runtime_nodes(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source.path}:{node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def _runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield other
                yield from _runtime_nodes(other)
            continue
        yield child
        yield from _runtime_nodes(child)
