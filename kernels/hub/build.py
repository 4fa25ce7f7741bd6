"""Build the Hugging Face kernel-hub repository of `rayft_kernels`: the same sources, loadable by the client named `kernels`.

    PYTHONPATH=kernels python kernels/hub/build.py FOLDER --repo OWNER/NAME [--upload [--dry-run]]

The folder holds build.toml, README.md (kernels/README.md with what was built on top) and one copy of the package for each entry of
VARIANTS. A copy differs from the sources in two ways: it imports its own modules relatively, and its operators live in a namespace made
of the package's name, the backend and a hash of the sources, so that two builds, or a build and the installed package, can be loaded in
one process. The same sources always give the same names.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from hub.upload import DryRun, Refused, hub_client, upload

KERNELS = Path(__file__).resolve().parents[1]
PACKAGE = "rayft_kernels"
NAME = PACKAGE.replace("_", "-")
LICENSE = "Apache-2.0"
VARIANTS = {"torch-cuda": "cuda", "torch-cpu": "cpu", "torch-universal": "cpu"}
"""Folder under build/ -> backend named in its metadata. Clients take the universal one wherever no folder is for their backend."""
FUTURE = "from __future__ import annotations\n"
OPS = '''"""The namespace of this build's operators: another for other sources, so that two builds can be loaded in one process."""

from __future__ import annotations

import torch

NAMESPACE = "{namespace}"
ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(name: str) -> str:
    """The operator's full name."""
    return f"{{NAMESPACE}}::{{name}}"
'''


@dataclass(frozen=True)
class Package:
    """What is built: file -> text, by path inside the package, and where it goes."""

    files: dict[str, str]
    repo: str
    version: int

    @staticmethod
    def read(source: Path, repo: str, version: int) -> Package:
        """The Python files of a package; caches and everything compiled stay behind.

        Raises:
            Refused: no package there, no repository's name, or a version below 1.
        """
        if not (source / "__init__.py").is_file():
            raise Refused(f"source = {source}: must be a Python package, and it has no __init__.py. Name the folder {PACKAGE}.")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
            raise Refused(f"--repo = {repo!r}: must be OWNER/NAME. Give a repository of the hub.")
        if version < 1:
            raise Refused(f"--version = {version}: must be at least 1. Raise it whenever a signature changes.")
        files = {str(file.relative_to(source)): file.read_text(encoding="utf-8") for file in sorted(source.rglob("*.py"))}
        return Package(files, repo, version)

    @property
    def hash(self) -> str:
        """Hash of the sorted paths and contents."""
        digest = hashlib.sha256()
        for path, text in sorted(self.files.items()):
            digest.update(f"{path}\0{len(text.encode())}\0{text}".encode())
        return digest.hexdigest()[:12]

    def namespace(self, variant: str) -> str:
        """Of the operators, and the name under which the client imports the copy."""
        return f"_{PACKAGE}_{variant.removeprefix('torch-')}_{self.hash}"


def hub_source(path: str, text: str) -> str:
    """A source file as a hub package wants it: relative imports, names of operators made by `add_op_namespace_prefix`.

    Args:
        path: inside the package, as in norm_rope/op.py.
        text: of the file.

    Raises:
        Refused: the package is still named somewhere that code reads.
    """
    dots = "." * len(Path(path).parts)
    found = re.sub(rf"^(\s*)from {PACKAGE}\.?([\w.]*) import ", rf"\1from {dots}\2 import ", text, flags=re.MULTILINE)
    found, operators = re.subn(rf'(?<!")(f?)"{PACKAGE}::([\w{{}}]+)"', r'add_op_namespace_prefix(\1"\2")', found)
    if operators:
        found = found.replace(FUTURE, f"{FUTURE}\nfrom {dots}_ops import add_op_namespace_prefix\n", 1)
    for node in ast.walk(ast.parse(found)):
        if (line := _names_the_package(node)) is not None:
            rule = "must reach its own package by 'from ... import' and name operators by one literal"
            raise Refused(f"{path}:{line}: {rule}. Write it as the other files do.")
    return found


def _names_the_package(node: ast.AST) -> int | None:
    """The line of a node that would reach the installed package or its operators."""
    match node:
        case ast.Import():
            found = any(alias.name.split(".")[0] == PACKAGE for alias in node.names)
        case ast.ImportFrom():
            found = node.level == 0 and (node.module or "").split(".")[0] == PACKAGE
        case ast.Attribute():
            found = node.attr == PACKAGE
        case ast.Constant():
            found = isinstance(node.value, str) and node.value.startswith(f"{PACKAGE}::")
        case _:
            return None
    return node.lineno if found else None


def digest_of(folder: Path) -> dict[str, object]:
    """Hashes of the files, as metadata.json records them."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    hashes = {str(file.relative_to(folder)): base64.b64encode(hashlib.sha256(file.read_bytes()).digest()).decode() for file in files}
    return {"algorithm": "sha256", "files": hashes}


def write_variant(package: Package, variant: str, folder: Path) -> None:
    """One copy of the package, its namespace and its metadata."""
    namespace = package.namespace(variant)
    for path, text in {**package.files, "_ops.py": OPS.format(namespace=namespace)}.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text if path == "_ops.py" else hub_source(path, text), encoding="utf-8")
    metadata = {
        "name": NAME,
        "id": namespace,
        "version": package.version,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": VARIANTS[variant]},
        "digest": digest_of(folder),
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def build_toml(package: Package) -> str:
    """What kernel-builder and the hub read about the whole repository."""
    lines = ["[general]", f'name = "{NAME}"', f"version = {package.version}", "edition = 5", f'license = "{LICENSE}"']
    lines += ['backends = ["cpu", "cuda"]', "", "[general.hub]", f'repo-id = "{package.repo}"', "", "[torch-noarch]", 'pyext = ["py"]']
    return "\n".join(lines) + "\n"


def card(package: Package, revision: str) -> str:
    """README.md: front matter, how to load this build, then kernels/README.md."""
    tags = "\n".join(f"- {tag}" for tag in ("kernels", "triton", "lora", "rmsnorm", "rope", "cross-entropy"))
    namespaces = "\n".join(f"| namespace of {variant} | `{package.namespace(variant)}` |" for variant in VARIANTS)
    return (
        f"---\nlibrary_name: kernels\nlicense: apache-2.0\ntags:\n{tags}\n---\n\n"
        f'```python\nfrom kernels import get_kernel\n\n{PACKAGE} = get_kernel("{package.repo}", version={package.version})\n```\n\n'
        f"| build | |\n|---|---|\n| version | {package.version} |\n| revision | `{revision}` |\n"
        f"| sources | `{package.hash}` |\n{namespaces}\n\n"
    ) + (KERNELS / "README.md").read_text(encoding="utf-8")


def revision_of(folder: Path) -> str:
    """Commit of the sources, with a mark when they were changed since; unknown outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def build(package: Package, out: Path, *, revision: str, force: bool = False) -> None:
    """Write the repository into `out`, whole or not at all.

    Raises:
        Refused: `out` exists and is no earlier build that may be replaced, or a source cannot be turned into a hub package.
    """
    if out.exists() and not (force and (out / "build.toml").is_file()):
        raise Refused(f"{out}: exists already. Give --force to replace an earlier build, or another folder.")
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for variant in VARIANTS:
        write_variant(package, variant, part / "build" / variant)
    (part / "build.toml").write_text(build_toml(package), encoding="utf-8")
    (part / "README.md").write_text(card(package, revision), encoding="utf-8")
    if out.exists():
        shutil.rmtree(out)
    part.rename(out)


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Build, and perhaps upload, the kernel-hub repository of rayft_kernels.")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--repo", default="rayft/rayft-kernels", help="repository of the hub, OWNER/NAME")
    parser.add_argument("--source", type=Path, default=KERNELS / PACKAGE, help="the package")
    parser.add_argument("--version", type=int, default=1, help="raised whenever a signature changes; the branch is named v<version>")
    parser.add_argument("--force", action="store_true", help="replace the folder")
    parser.add_argument("--upload", action="store_true", help="put it on the hub: main, then the version's branch")
    parser.add_argument("--private", action="store_true", help="make the repository private if it is new")
    parser.add_argument("--skip-version-branch", action="store_true", help="upload to main alone")
    parser.add_argument("--dry-run", action="store_true", help="with --upload: print what would be asked of the hub")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Exit code 1 and one line that begins with error: when something is refused."""
    asked = arguments(argv)
    try:
        package = Package.read(asked.source, asked.repo, asked.version)
        build(package, asked.out, revision=revision_of(KERNELS), force=asked.force)
        print(f'{asked.out}: kernels.get_local_kernel(Path("{asked.out}")) loads it; sources {package.hash}')
        if asked.upload:
            branches = ["main"] if asked.skip_version_branch else ["main", f"v{package.version}"]
            hub = DryRun() if asked.dry_run else hub_client()
            print(upload(hub, asked.out, package.repo, branches, private=asked.private))
    except Refused as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
