"""Names say what a thing is: no vague words, no notes to self, no catch-all handlers."""

from __future__ import annotations

import ast
import re

from rules.source_tree import ROOT, FunctionNode, Source, parse, sources

VAGUE = {word + ending for word in ("manager", "helper", "util", "handler", "processor") for ending in ("", "s")}
NOTE = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X")) + r")\b")
NOTED_SUFFIXES = {".py", ".md", ".toml", ".yaml", ".yml", ".jinja", ""}
NOTED_FOLDERS = ("rayft", "kernels", "recipes", "tests", "cluster", "docs", ".ci")


def words(name: str) -> set[str]:
    """The words of a snake_case or CamelCase name, in lower case."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


def vague_names(source: Source) -> list[str]:
    """Files, folders, classes and functions named by a word that fits everything."""
    found = [f"{source.path}: {part}" for part in source.path.removesuffix(".py").split("/") if words(part) & VAGUE]
    found += [
        f"{source.path}:{node.lineno}: {node.name}"
        for node in ast.walk(source.tree)
        if isinstance(node, FunctionNode | ast.ClassDef) and words(node.name) & VAGUE
    ]
    return found


def broad_handlers(source: Source) -> list[str]:
    """`except` clauses that catch everything and do not raise it again."""
    return [
        f"{source.path}:{node.lineno}"
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or {"Exception", "BaseException"} & set(re.findall(r"\w+", ast.unparse(node.type))))
        and not any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
    ]


def unfinished(source: Source) -> list[str]:
    """Functions that do nothing but raise NotImplementedError."""
    return [
        f"{source.path}:{node.lineno}: {node.name}"
        for node in ast.walk(source.tree)
        if isinstance(node, FunctionNode) and isinstance(node.body[-1], ast.Raise) and "NotImplemented" in ast.unparse(node.body[-1])
    ]


def test_names_are_specific() -> None:
    assert [error for source in sources() for error in vague_names(source)] == []


def test_no_notes_to_self() -> None:
    files = [file for folder in NOTED_FOLDERS for file in sorted((ROOT / folder).rglob("*")) if file.is_file()]
    texts = ((file, file.read_text(encoding="utf-8")) for file in files if file.suffix in NOTED_SUFFIXES)
    assert [str(file.relative_to(ROOT)) for file, text in texts if NOTE.search(text)] == []


def test_errors_are_not_swallowed() -> None:
    assert [error for source in sources() for error in broad_handlers(source)] == []


def test_nothing_is_left_unfinished() -> None:
    assert [error for source in sources() for error in unfinished(source)] == []


def test_the_rules_can_fail() -> None:
    """Each rule finds its offence in a made-up source, and not in a lawful neighbour."""
    assert words("HTTPServer_runUtils2") == {"http", "server", "run", "utils"}
    bad = "class DataManager: ...\nclass Managed: ...\ndef load_helper(): ...\ndef utilisation(): ...\n"
    assert [error.split()[-1] for error in vague_names(parse("rayft/io_utils.py", bad))] == ["io_utils", "DataManager", "load_helper"]

    tries = "try: f()\nexcept {}: {}\n"
    assert broad_handlers(parse("x.py", tries.format("Exception", "pass"))) == ["x.py:2"]
    assert broad_handlers(parse("x.py", tries.format("(ValueError, BaseException) as e", "log(e)"))) == ["x.py:2"]
    assert broad_handlers(parse("x.py", tries.format("Exception", "raise"))) == []
    assert broad_handlers(parse("x.py", tries.format("RuntimeError", "pass"))) == []

    assert unfinished(parse("x.py", "def f():\n    raise NotImplementedError('later')\n")) == ["x.py:1: f"]
    assert NOTE.search("# TO" + "DO: later")
    assert not NOTE.search("todo list")
