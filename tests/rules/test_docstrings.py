"""Every module, public class and public function says what it is for, in ASCII."""

from __future__ import annotations

import ast

from rules.source_tree import FunctionNode, Source, methods, parse, sources


def is_stub(node: ast.AST) -> bool:
    """Whether a protocol method has `...` for a body: its protocol describes it."""
    return isinstance(node, FunctionNode) and ast.unparse(node.body[-1]) == "..."


def public_definitions(body: list[ast.stmt]) -> list[FunctionNode | ast.ClassDef]:
    """Public functions and classes among the statements, and the public methods of those classes; not nested functions."""
    found: list[FunctionNode | ast.ClassDef] = []
    for node in body:
        if isinstance(node, FunctionNode | ast.ClassDef) and not node.name.startswith("_"):
            found.append(node)
            if isinstance(node, ast.ClassDef):
                found += [method for method in methods(node) if not method.name.startswith("_")]
    return found


def undocumented(source: Source) -> list[str]:
    """Modules with content, and public definitions, that have no docstring."""
    missing = [source.path] if source.tree.body and not ast.get_docstring(source.tree) else []
    for node in public_definitions(source.tree.body):
        if not ast.get_docstring(node) and not is_stub(node):
            missing.append(f"{source.path}:{node.lineno}: {node.name}")
    return missing


def non_ascii(source: Source) -> list[str]:
    """Lines with a character outside ASCII."""
    return [f"{source.path}:{number}: {line.strip()}" for number, line in enumerate(source.text.splitlines(), 1) if not line.isascii()]


def test_public_names_have_docstrings() -> None:
    assert [error for source in sources() for error in undocumented(source)] == []


def test_test_modules_have_docstrings() -> None:
    assert [source.path for source in sources("tests") if source.tree.body and not ast.get_docstring(source.tree)] == []


def test_sources_are_ascii() -> None:
    assert [error for source in sources("rayft", "kernels", "recipes", "tests") for error in non_ascii(source)] == []


def test_the_rules_can_fail() -> None:
    """Each rule finds its offence in a made-up source, and nothing in what needs no docstring."""
    bare = "class A:\n    def b(self): return 1\n    def _c(self): return 1\ndef d(): return 1\ndef _e():\n    def f(): return 1\n"
    assert [error.split(": ")[-1] for error in undocumented(parse("x.py", bare))] == ["x.py", "A", "b", "d"]
    assert undocumented(parse("x.py", '"""x"""\nclass P(Protocol):\n    """p"""\n    def m(self) -> int: ...\n')) == []
    assert undocumented(parse("__init__.py", "")) == []
    assert non_ascii(parse("x.py", "a = 'x'\nb = '\N{MULTIPLICATION SIGN}'\n")) == ["x.py:2: b = '\N{MULTIPLICATION SIGN}'"]
