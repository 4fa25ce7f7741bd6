"""Checks on one GPU of what surrounds the operations, in about a minute: `python kernels/bench/gpu_k7.py`.

The calls that go round torch's dispatcher against those that do not, the decoder norm, strides, operators and sizes of fused LoRA, the
hub package; then what a call costs the host. Prints PASS or FAIL for each check; exit code 1 if one fails.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

from bench import check_glu, check_lora, check_norm_rope, check_rms_norm, host
from bench.checks import assert_equal, failures, results
from hub.build import KERNELS, Package, build

LOW = torch.bfloat16


def check_ways() -> None:
    """Bit for bit the same with and without the dispatcher."""
    inputs = check_norm_rope.Inputs.of(check_norm_rope.CASES[1], "cuda", LOW)
    gate_up, grad = check_glu.pair((65, 2049), "cuda", LOW), torch.ones(65, 2049, device="cuda", dtype=LOW)
    shapes = ((80, 48), (80, 48), (48, 80))
    ones = [check_lora.converted(one, LOW) for one in check_lora.cases(("hash", "bias", "plain"), shapes, 70, "cuda")]
    x = torch.randn(70, 48, device="cuda", dtype=LOW)

    def every() -> list[Tensor]:
        found = inputs.run(check_norm_rope.qkv_norm_rope) + results(check_glu.glu, gate_up, [grad])
        return found + check_lora.values(partial(check_lora.mlp, "silu"), x, ones)

    direct = every()
    with ExitStack() as stack:
        for module in host.OBSERVED:
            stack.enter_context(mock.patch(f"rayft_kernels.{module}.unobserved", lambda *_: False))
        assert_equal(every(), direct)


def loaded(folder: Path) -> ModuleType:
    """The CUDA copy of a hub build, imported as the client does: the folder by its own name, nothing else on the path."""
    name = Package.read(KERNELS / "rayft_kernels", "someone/rayft-kernels", 1).namespace("torch-cuda")
    spec = importlib.util.spec_from_file_location(name, folder / "build" / "torch-cuda" / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_hub_package() -> None:
    """A build loaded beside the package gives the same, bit for bit."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "hub"
        build(Package.read(KERNELS / "rayft_kernels", "someone/rayft-kernels", 1), folder, revision="none")
        copy = loaded(folder)
        inputs = check_norm_rope.Inputs.of(check_norm_rope.CASES[1], "cuda", LOW)
        assert_equal(inputs.run(copy.qkv_norm_rope), inputs.run(check_norm_rope.qkv_norm_rope))
        gate_up, grad = check_glu.pair((65, 2049), "cuda", LOW), torch.ones(65, 2049, device="cuda", dtype=LOW)
        for name in ("glu", "glu_packed"):
            tensors = gate_up if name == "glu" else [torch.cat(gate_up, -1)]
            assert_equal(results(getattr(copy, name), tensors, [grad]), results(getattr(check_glu, name), tensors, [grad]))
        hidden, head = (torch.randn(n, 64, device="cuda", dtype=LOW) for n in (40, 1000))
        targets, weights = torch.randint(0, 1000, (40,), device="cuda"), torch.ones(40, device="cuda")
        from rayft_kernels import weighted_nll_sum

        losses = [
            results(lambda h, w, fn=fn: fn(h, w, targets, weights), [hidden, head], [weights[0]])
            for fn in (copy.weighted_nll_sum, weighted_nll_sum)
        ]
        assert_equal(*losses)


def checks() -> dict[str, Callable[[], None]]:
    """By name, in the order in which they run."""
    found: dict[str, Callable[[], None]] = {"direct and dispatched": check_ways, "hub package": check_hub_package}
    found |= check_rms_norm.checks("cuda", (LOW, torch.float16, torch.float32))
    found |= {f"norm_rope error {case.name}": partial(check_norm_rope.check_error, case, LOW, "cuda") for case in check_norm_rope.CASES}
    found["norm_rope operator"] = partial(check_norm_rope.check_operator, "cuda")
    found["norm_rope gradients kept"] = partial(check_norm_rope.check_gradients_kept, "cuda")
    found["norm_rope compile"] = partial(check_norm_rope.check_surroundings, "cuda", "inductor")
    found |= check_glu.checks("cuda", (LOW,), ((3, 5, 4104), (0, 64)))
    found["lora operators"] = partial(check_lora.check_operators, "cuda")
    found |= {f"lora strides {dtype}": partial(check_lora.check_strides, "cuda", dtype) for dtype in (LOW, torch.float32)}
    found["lora twice"] = partial(check_lora.check_twice, "cuda", LOW)
    found["lora compile, checkpoint"] = partial(check_lora.check_surroundings, "cuda", torch.float32, "inductor")
    found["rms_norm above 2^31 elements"] = partial(check_rms_norm.check_large, "cuda")
    found["lora above 2^31 elements"] = partial(check_lora.check_large, "cuda")
    return found


def main() -> int:
    """Exit code of the script."""
    print(torch.__version__, torch.cuda.get_device_name(), flush=True)
    failed = failures(checks())
    torch.cuda.empty_cache()
    failed += failures({"host time": lambda: [print(line, flush=True) for line in host.lines()]})
    print("FAILED" if failed else "ALL PASSED", *failed, sep="\n", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
