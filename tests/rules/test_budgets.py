"""Sizes of files, functions and classes, and annotations on every function."""

from __future__ import annotations

import ast

from rules.source_tree import FunctionNode, Source, classes, functions, length, methods, parse, sources

FILE_LINES = 500
MEDIAN_FILE_LINES = 150
FUNCTION_LINES = 80
LARGE_FUNCTION_LINES = 35
"""Nine functions in ten are no longer than this."""
CLASS_METHODS = 12


def quantile(values: list[int], share: float) -> int:
    """The smallest value that at least `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def oversize(source: Source) -> list[str]:
    """Files, functions and classes beyond their budgets."""
    found = [f"{source.path}: {source.lines} lines"] if source.lines > FILE_LINES else []
    found += [f"{source.path}:{f.lineno}: {f.name} has {length(f)} lines" for f in functions(source) if length(f) > FUNCTION_LINES]
    found += [
        f"{source.path}:{c.lineno}: {c.name} has {len(methods(c))} methods" for c in classes(source) if len(methods(c)) > CLASS_METHODS
    ]
    return found


def is_kernel(node: FunctionNode) -> bool:
    """Whether the function is Triton source, whose pointer arguments have no Python type."""
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def unannotated(source: Source) -> list[str]:
    """Functions with an argument or a result that has no type; self and cls need none."""
    found = []
    for node in functions(source):
        arguments = node.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        bare = [a.arg for a in every if a is not None and a.annotation is None and a.arg not in {"self", "cls"}]
        if not is_kernel(node) and (bare or node.returns is None):
            found.append(f"{source.path}:{node.lineno}: {node.name} lacks the type of {', '.join(bare) or 'its result'}")
    return found


def test_files_functions_and_classes_are_within_budget() -> None:
    assert [error for source in sources() for error in oversize(source)] == []


def test_half_of_the_files_are_short() -> None:
    assert quantile([source.lines for source in sources()], 0.5) <= MEDIAN_FILE_LINES


def test_nine_functions_in_ten_are_short() -> None:
    assert quantile([length(f) for source in sources() for f in functions(source)], 0.9) <= LARGE_FUNCTION_LINES


def test_every_function_is_annotated() -> None:
    assert [error for source in sources() for error in unannotated(source)] == []


def test_the_rules_can_fail() -> None:
    """Each rule finds its offence in a made-up source, and passes at exactly the limit."""
    assert quantile([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 0.9) == 9
    assert quantile([3, 1, 2], 0.5) == 2

    at_limit = "def f() -> None:\n" + "    pass\n" * (FUNCTION_LINES - 1)
    assert oversize(parse("x.py", at_limit)) == []
    assert oversize(parse("x.py", at_limit + "    pass\n")) == ["x.py:1: f has 81 lines"]
    assert oversize(parse("x.py", "\n" * (FILE_LINES + 1))) == ["x.py: 501 lines"]
    fat = "class C:\n" + "".join(f"    def m{i}(self) -> None: ...\n" for i in range(CLASS_METHODS + 1))
    assert oversize(parse("x.py", fat)) == ["x.py:1: C has 13 methods"]

    assert unannotated(parse("x.py", "def f(a, *b: int, **c) -> None: ...")) == ["x.py:1: f lacks the type of a, c"]
    assert unannotated(parse("x.py", "class C:\n    async def f(self): ...")) == ["x.py:2: f lacks the type of its result"]
    assert unannotated(parse("x.py", "@triton.jit\ndef k(x_ptr, n): ...")) == []
