"""Imports point one way, and each heavy library is imported in its rooms only, lazily or not."""

from __future__ import annotations

import ast
import subprocess
import sys

from rules.source_tree import ROOT, Source, imports, parse, sources

LEVELS: tuple[frozenset[str], ...] = (
    frozenset({"rayft.errors", "rayft.types", "rayft_kernels"}),
    frozenset({"rayft.config", "rayft.observe"}),
    frozenset({"rayft.models", "rayft.parallel", "rayft.data", "rayft.optim", "rayft.losses"}),
    frozenset({"rayft.train", "rayft.rollout", "rayft.rewards", "rayft.experience", "rayft.weight_sync", "rayft.checkpoint"}),
    frozenset({"rayft.actors"}),
    frozenset({"rayft.recipes"}),
    frozenset({"rayft.commands", "rayft.cli", "rayft.__main__"}),
)
"""Rooms from the bottom up. A room imports rooms of its own level and of lower ones."""

ROOMS_OF_LIBRARY: dict[str, tuple[str, ...]] = {
    "ray": ("rayft/actors/", "rayft/data/pipeline.py", "rayft/data/waiting.py"),
    "vllm": ("rayft/rollout/", "rayft/weight_sync/"),
    "transformers": ("rayft/models/",),
    "tokenizers": ("rayft/models/",),
    "huggingface_hub": ("rayft/models/", "kernels/hub/"),
    "peft": ("rayft/models/",),
    "trl": (),
    "datasets": ("rayft/data/",),
    "fsspec": ("rayft/data/",),
    "s3fs": ("rayft/data/",),
    "triton": ("kernels/rayft_kernels/", "kernels/bench/"),
    "yaml": ("rayft/config/",),
    "argparse": ("rayft/config/", "rayft/cli.py", "kernels/hub/"),
    "math_verify": ("rayft/rewards/",),
    "reasoning_gym": ("rayft/data/",),
    "aiohttp": ("rayft/rewards/", "rayft/rollout/environments/"),
    "wandb": ("rayft/observe/",),
    "mlflow": ("rayft/observe/",),
    "trackio": ("rayft/observe/",),
    "tensorboard": ("rayft/observe/",),
    "tensorboardX": ("rayft/observe/",),
}
ENVIRONMENT_READERS = ("rayft/config/", "rayft/cli.py")
KERNELS_MAY_IMPORT = {"torch", "triton", "rayft_kernels"}
RECIPE_LINES = 80


def room(path: str) -> str:
    """The room of a file: rayft/train/step.py is in rayft.train, recipes/sft.py in rayft.recipes."""
    parts = path.removesuffix(".py").split("/")
    if parts[0] == "recipes":
        return "rayft.recipes"
    if parts[0] == "kernels":
        return "rayft_kernels"
    return ".".join(parts[:2])


def level(module: str) -> int | None:
    """Level of the room that a dotted module lies in, None outside rayft."""
    for number, rooms in enumerate(LEVELS):
        if module in rooms or any(module.startswith(f"{name}.") for name in rooms):
            return number
    return None


def upward_imports(source: Source) -> list[str]:
    """Imports of a room above the file's own."""
    own = level(room(source.path))
    if own is None:
        return [] if source.path == "rayft/__init__.py" else [f"{source.path}: {room(source.path)} has no level in LEVELS"]
    found = ((line, module, level(module)) for line, module in imports(source))
    return [f"{source.path}:{line}: imports {module}, which lies above" for line, module, other in found if (other or 0) > own]


def misplaced_libraries(source: Source) -> list[str]:
    """Imports of a heavy library outside its rooms."""
    return [
        f"{source.path}:{line}: {module} may only be imported in {ROOMS_OF_LIBRARY[name] or 'tests'}"
        for line, module in imports(source)
        if (name := module.split(".")[0]) in ROOMS_OF_LIBRARY and not source.path.startswith(ROOMS_OF_LIBRARY[name] or "-")
    ]


def environment_reads(source: Source) -> list[str]:
    """Reads of environment variables outside the configuration; setting one for a child process is no read."""
    if source.path.startswith(ENVIRONMENT_READERS):
        return []
    writes = {
        id(node.value if isinstance(node, ast.Subscript) else node.func.value)
        for node in ast.walk(source.tree)
        if (isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load))
        or (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in {"setdefault", "update"})
    }
    return [
        f"{source.path}:{node.lineno}: reads {ast.unparse(node)} outside rayft/config"
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {"os.environ", "os.getenv"} and id(node) not in writes
    ]


def test_imports_point_one_way() -> None:
    assert [error for source in sources() for error in upward_imports(source)] == []


def test_heavy_libraries_stay_in_their_rooms() -> None:
    assert [error for source in sources() for error in misplaced_libraries(source)] == []


def test_environment_is_read_in_config_only() -> None:
    assert [error for source in sources() for error in environment_reads(source)] == []


def test_kernels_need_only_torch_and_triton() -> None:
    foreign = [
        f"{source.path}:{line}: {module}"
        for source in sources("kernels/rayft_kernels")
        for line, module in imports(source)
        if (name := module.split(".")[0]) not in KERNELS_MAY_IMPORT and name not in sys.stdlib_module_names
    ]
    assert foreign == []
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow the package 'kernels' that transformers imports"


def test_recipes_are_short() -> None:
    assert [f"{source.path}: {source.lines} lines" for source in sources("recipes") if source.lines > RECIPE_LINES] == []


def test_command_line_starts_without_heavy_libraries() -> None:
    heavy = ["torch", "ray", "vllm", "transformers", "peft", "datasets"]
    program = (
        "import sys, rayft.cli\n"
        "try: rayft.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        f"print('LOADED', [name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED []", done.stdout


def test_the_rules_can_fail() -> None:
    """Each rule finds its offence in a small bad source, and nothing in the lawful line beside it."""
    upward = parse("rayft/data/bad.py", "import rayft.train.step\nfrom rayft import actors\nfrom rayft.config import load\n")
    assert [error.split(":")[1] for error in upward_imports(upward)] == ["1", "2"]
    assert upward_imports(parse("rayft/attic/x.py", "")) == ["rayft/attic/x.py: rayft.attic has no level in LEVELS"]

    lazy = "def f():\n    import ray.data\n    from transformers import AutoModel\n    import numpy\n"
    assert len(misplaced_libraries(parse("recipes/bad.py", lazy))) == 2
    assert len(misplaced_libraries(parse("rayft/actors/group.py", lazy))) == 1
    checked = "if TYPE_CHECKING:\n    import vllm\nelse:\n    import peft\n"
    assert [error.split()[1] for error in misplaced_libraries(parse("rayft/train/x.py", checked))] == ["peft"]

    reads = "a = os.environ['A']\nb = os.getenv('B')\nos.environ['C'] = 'c'\nos.environ.setdefault('D', 'd')\nx = {**os.environ}\n"
    assert [error.split(":")[1] for error in environment_reads(parse("rayft/train/x.py", reads))] == ["1", "2", "5"]
    assert environment_reads(parse("rayft/config/load.py", reads)) == []
