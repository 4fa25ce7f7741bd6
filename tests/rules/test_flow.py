"""docs/flow.md tells the truth: few functions and one process boundary lie between the command line and the gradient."""

from __future__ import annotations

import ast
import re

import pytest

from rules.source_tree import ROOT, FunctionNode, Source, imports, parse

MOST_FUNCTIONS, BOUNDARIES = 5, 1
STEP = re.compile(r"^(?P<path>[\w/]+\.py):(?P<function>\w+)", re.MULTILINE)
RECIPE = "recipes/sft.py"


def trace(page: str) -> tuple[list[tuple[str, str]], int]:
    """((file, function) in order, number of process boundaries) of the block below the heading Trace."""
    block = page.split("\n## Trace\n", 1)[1].split("```", 2)[1]
    return [(match["path"], match["function"]) for match in STEP.finditer(block)], block.count("process boundary")


def reached(source: Source, name: str) -> list[ast.AST]:
    """The nodes of a function and of the private functions of its file that it names, directly or through each other."""
    defined = {node.name: node for node in source.tree.body if isinstance(node, FunctionNode)}
    waiting, seen, nodes = [name], {name}, list[ast.AST]()
    while waiting:
        found = list(ast.walk(defined[waiting.pop()]))
        nodes += found
        named = {node.id for node in found if isinstance(node, ast.Name) and node.id.startswith("_") and node.id in defined} - seen
        seen |= named
        waiting += named
    return nodes


def names(nodes: list[ast.AST]) -> set[str]:
    """Everything that the nodes refer to by name or as an attribute."""
    return {node.id for node in nodes if isinstance(node, ast.Name)} | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def broken_links(steps: list[tuple[Source, str]]) -> list[str]:
    """Steps whose function does not exist, that no earlier step refers to, or a last step without a backward."""
    known, problems = set[str](), []
    for index, (source, name) in enumerate(steps):
        if name not in {node.name for node in source.tree.body if isinstance(node, FunctionNode)}:
            problems.append(f"{source.path} defines no {name}")
            continue
        if index and name not in known:
            problems.append(f"nothing before {source.path}:{name} refers to it")
        known |= names(reached(source, name))
    return problems if "backward" in known else [*problems, "no step calls backward"]


@pytest.fixture(scope="module")
def steps() -> list[tuple[Source, str]]:
    """The trace of the page, with the sources."""
    pairs, _ = trace((ROOT / "docs" / "flow.md").read_text(encoding="utf-8"))
    return [(parse(path, (ROOT / path).read_text(encoding="utf-8")), name) for path, name in pairs]


def test_the_trace_is_short() -> None:
    pairs, boundaries = trace((ROOT / "docs" / "flow.md").read_text(encoding="utf-8"))
    assert pairs[0] == ("rayft/cli.py", "main") and 2 <= len(pairs) <= MOST_FUNCTIONS
    assert boundaries == BOUNDARIES


def test_each_function_exists_and_an_earlier_one_leads_to_it(steps: list[tuple[Source, str]]) -> None:
    assert broken_links(steps) == []


def test_the_recipe_calls_what_the_trace_names(steps: list[tuple[Source, str]]) -> None:
    """Its driver hands its worker over; whatever it calls in other files is imported from the file that the trace names."""
    own = [(source, name) for source, name in steps if source.path == RECIPE]
    others = [(source, name) for source, name in steps if source.path not in (RECIPE, "rayft/cli.py")]
    assert [name for _, name in own] == ["main", "train"] and others
    recipe = own[0][0]
    imported = {module for _, module in imports(recipe)}
    calls = [node for _, name in own for node in reached(recipe, name) if isinstance(node, ast.Call)]
    called = {ast.unparse(call.func): call for call in calls}
    for source, name in others:
        assert f"{source.path.removesuffix('.py').replace('/', '.')}.{name}" in imported
        assert name in called
    (handed, *_) = called["fit"].args
    assert ast.unparse(handed) == "train"


def test_the_rules_can_fail() -> None:
    page = "# Flow\n\n## Trace\n\nText.\n\n```\na.py:main\n  -- process boundary --\nb.py:work   x.backward()\n```\n\nc.py:more\n"
    assert trace(page) == ([("a.py", "main"), ("b.py", "work")], 1)
    main = parse("a.py", "def main(): _go()\ndef _go(): b.work()\ndef other(): lost()\n")
    work = parse("b.py", "def work(x): x.backward()\ndef lost(x): x.backward()\n")
    assert broken_links([(main, "main"), (work, "work")]) == []
    assert broken_links([(main, "main"), (work, "lost")]) == ["nothing before b.py:lost refers to it"]
    assert broken_links([(main, "main"), (work, "gone")]) == ["b.py defines no gone", "no step calls backward"]
