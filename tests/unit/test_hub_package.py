"""The kernel-hub build of rayft_kernels: what the client loads computes what the package computes; names, refusals, uploads."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import rayft_kernels
from hub import upload as hub_upload
from hub.build import KERNELS, VARIANTS, Package, build, hub_source, main
from hub.upload import Refused

SOURCE = KERNELS / "rayft_kernels"
REPO = "someone/rayft-kernels"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "built"
    build(Package.read(SOURCE, REPO, 1), out, revision="none")
    return out


def forward_and_backward(module: Any) -> dict[str, list[Tensor]]:
    """Outputs and gradients of every operation of a package, on inputs that are always the same."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    targets, weights = torch.tensor([1, 4, 0]), torch.tensor([1.0, 0.0, 0.5])
    x, a, b, up, down = draw(3, 8), draw(2, 8), draw(12, 2), draw(12, 8).detach(), draw(8, 12).detach()
    one = module.Projection(up, a=a, b=b, dropout=module.TokenDropout(torch.arange(3), torch.tensor(7), 0.25))
    q, w, cos, sin, head, gate = draw(1, 3, 2, 8), draw(8), draw(1, 3, 8).detach(), draw(1, 3, 8).detach(), draw(5, 8), draw(3, 6)
    calls = {
        "norm_rope": lambda: (module.norm_rope(q, w, cos, sin),),
        "qkv_norm_rope": lambda: module.qkv_norm_rope(q, q, q, w, None, cos, sin),
        "rms_norm": lambda: (module.rms_norm(x, w),),
        "glu": lambda: (module.glu(gate, gate),),
        "glu_packed": lambda: (module.glu_packed(gate, "gelu"),),
        "weighted_nll_sum": lambda: (module.weighted_nll_sum(x, head, targets, weights),),
        "token_logprobs": lambda: module.token_logprobs(x, head, targets),
        "lora_linears": lambda: module.lora_linears(x, [one, one]),
        "lora_linear": lambda: (module.lora_linear(x, one),),
        "lora_mlp": lambda: (module.lora_mlp(x, one, one, module.Projection(down), "silu"),),
    }
    found = {}
    for name, call in calls.items():
        outputs = call()
        grads = torch.autograd.grad(sum(y.square().sum() for y in outputs), [x, a, b, q, w, head, gate], allow_unused=True)
        found[name] = [*outputs, *(g for g in grads if g is not None)]
        assert len(found[name]) > len(outputs)
    return found


def test_the_client_loads_it_beside_the_package(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder kernels/ of the repository is on the path here, and does not hide the client of that name."""
    pytest.importorskip("kernels._rust", reason="the kernel-hub client is not installed")
    import kernels

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert kernels.__file__ is not None and not Path(kernels.__file__).is_relative_to(KERNELS)
    loaded = kernels.get_local_kernel(built)
    assert loaded.__name__.startswith("_rayft_kernels_") and loaded.glu is not rayft_kernels.glu
    assert set(rayft_kernels.__all__) <= set(dir(loaded)) and loaded.__all__ == rayft_kernels.__all__
    ours, theirs = forward_and_backward(rayft_kernels), forward_and_backward(loaded)
    for name, expected in ours.items():
        assert len(expected) == len(theirs[name])
        assert all(torch.equal(x, y) for x, y in zip(theirs[name], expected, strict=True)), name
    operators = getattr(torch.ops, loaded.__name__)
    assert operators.glu.default is not torch.ops.rayft_kernels.glu.default


def test_the_client_reads_build_and_metadata(built: Path) -> None:
    rust = pytest.importorskip("kernels._rust", reason="the kernel-hub client is not installed")
    assert rust.Build.open(built).general.backends == [rust.Backend.CPU, rust.Backend.CUDA]
    for variant, backend in VARIANTS.items():
        folder = built / "build" / variant
        metadata = rust.Metadata.read_from_file(folder / "metadata.json")
        assert (metadata.version, metadata.license, metadata.python_depends) == (1, "Apache-2.0", [])
        assert metadata.backend.backend_type == rust.Backend.from_str(backend)
        assert metadata.name.python_name == "rayft_kernels" and metadata.id.startswith("_rayft_kernels_")
        metadata.digest.validate(rust.Digest.hash_variant(rust.DigestAlgorithm.SHA256, folder))


def test_every_file_is_there_and_none_names_the_package(built: Path) -> None:
    sources = {str(file.relative_to(SOURCE)) for file in SOURCE.rglob("*.py")}
    for variant in VARIANTS:
        folder = built / "build" / variant
        files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
        assert files == sources | {"_ops.py", "metadata.json"}
        assert not [f for f in sources if "import rayft_kernels" in (text := (folder / f).read_text()) or "from rayft_kernels" in text]
    card = (built / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: kernels\n") and f'get_kernel("{REPO}", version=1)' in card
    assert all(Package.read(SOURCE, REPO, 1).namespace(variant) in card for variant in VARIANTS)


def test_the_card_names_every_operation_and_its_example_runs() -> None:
    text = (KERNELS / "README.md").read_text(encoding="utf-8")
    assert [name for name in rayft_kernels.__all__ if f"`{name}`" not in text] == []
    (example,) = re.findall(r"```python\n(.+?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["x"].grad is not None and names["head"].grad is not None


def test_sources_alone_make_the_name(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        (folder / "__pycache__").mkdir(parents=True)
        (folder / "__init__.py").write_text("x = 1\n")
    (second / "__pycache__" / "old.pyc").write_bytes(b"1")
    names = [Package.read(*given).namespace("torch-cpu") for given in ((first, "a/b", 1), (second, "c/d", 2))]
    (second / "__init__.py").write_text("x = 2\n")
    assert names[0] == names[1] != Package.read(second, "a/b", 1).namespace("torch-cpu")


def test_sources_are_rewritten_by_depth() -> None:
    text = (
        '"""In prose: "rayft_kernels" and rayft_kernels::x."""\n\nfrom __future__ import annotations\n\n'
        "from rayft_kernels.glu.op import glu\n\n"
        'def f(n):\n    from rayft_kernels import rms_norm\n    return op("rayft_kernels::a"), op(f"rayft_kernels::{n}_b")\n'
    )
    found = hub_source("a/b.py", text)
    assert "\nfrom .._ops import add_op_namespace_prefix\n" in found and "\nfrom ..glu.op import glu\n" in found
    assert '    from .. import rms_norm\n    return op(add_op_namespace_prefix("a")), op(add_op_namespace_prefix(f"{n}_b"))\n' in found
    assert hub_source("__init__.py", "from rayft_kernels.glu.op import glu\n") == "from .glu.op import glu\n"


@pytest.mark.parametrize("text", ["import rayft_kernels\n", "x = torch.ops.rayft_kernels.glu\n", "y = 'rayft_kernels::glu'\n"])
def test_what_would_reach_the_installed_package_is_refused(text: str) -> None:
    with pytest.raises(Refused, match=r"a/b.py:1: must reach its own package"):
        hub_source("a/b.py", text)


def test_refusals_end_with_one_line_and_leave_what_was_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "mine.txt").write_text("mine")
    empty = tmp_path / "empty"
    empty.mkdir()
    new = str(tmp_path / "new")
    for argv, words in (
        ([str(kept), "--force"], "exists already"),
        ([new, "--source", str(empty)], "no __init__.py"),
        ([new, "--repo", "nameless"], "must be OWNER/NAME"),
        ([new, "--version", "0"], "must be at least 1"),
    ):
        assert main(argv) == 1
        assert (error := capsys.readouterr().err).startswith("error: ") and words in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "kept", "mine.txt"]


def test_an_earlier_build_is_replaced_when_told_so(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([str(out)]) == 0 and main([str(out)]) == 1
    (out / "build" / "torch-cpu" / "stale.py").write_text("")
    assert main([str(out), "--force"]) == 0
    assert not list(out.rglob("stale.py"))


def test_a_dry_run_prints_what_it_would_ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "out"), "--repo", REPO, "--version", "3", "--upload", "--dry-run", "--private"]) == 0
    asked = [line.split("(")[0].split()[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("would call")]
    assert asked == ["create_repo", "upload_folder", "create_branch", "upload_folder"]


class Hub:
    """An HfApi that notes what it is asked, and fails from `refusal` on."""

    def __init__(self, refusal: Exception | None = None) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.refusal = refusal

    def create_repo(self, repo: str, **options: Any) -> str:
        if self.refusal is not None:
            raise self.refusal
        self.asked.append((repo, options["repo_type"]))
        return f"https://hub/{repo}"

    def create_branch(self, repo: str, **options: Any) -> None:
        self.asked.append((options["branch"], options["repo_type"]))

    def upload_folder(self, **options: Any) -> None:
        self.asked.append((options["revision"], options["delete_patterns"]))


def test_uploads_go_to_main_and_then_to_the_versions_branch() -> None:
    hub = Hub()
    assert hub_upload.upload(hub, Path("x"), REPO, ["main", "v2"], private=False) == f"https://hub/{REPO}"
    assert hub.asked == [(REPO, "kernel"), ("main", "*"), ("v2", "kernel"), ("v2", "*")]


def answered(status: int | None) -> Exception:
    """What a client raises for a status, or without a connection."""
    problem = OSError("the server said no\nwith more lines")
    problem.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    return problem


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "HF_TOKEN"), (403, "may not write"), (409, "name is taken"), (400, "hub refuses"), (None, "cannot be reached")],
)
def test_a_refusal_of_the_hub_is_a_sentence(status: int | None, words: str) -> None:
    with pytest.raises(Refused, match=words) as caught:
        hub_upload.upload(Hub(answered(status)), Path("x"), REPO, ["main"], private=False)
    assert "the server said no" in str(caught.value) and "\n" not in str(caught.value)


def test_a_mistake_of_ours_is_no_refusal() -> None:
    with pytest.raises(KeyError):
        hub_upload.upload(Hub(KeyError("x")), Path("x"), REPO, ["main"], private=False)


def test_clients_that_cannot_upload_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(Refused, match="HF_TOKEN"):
        hub_upload.hub_client()
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.delattr(constants, "REPO_TYPES_WITH_KERNEL")
    with pytest.raises(Refused, match=rf"{huggingface_hub.__version__} of .*python.* pip install -U"):
        hub_upload.hub_client()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(Refused, match="does not have"):
        hub_upload.hub_client()
