"""The triton kernel: its cases run in the interpreter, and on a GPU if there is one; and it compiles."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton (extra `test`) is not installed")

CASES = Path(__file__).parent / "packed_triton_cases.py"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("interpret", ["1", pytest.param("0", marks=needs_gpu)], ids=["interpreter", "GPU"])
def test_the_kernel_agrees_with_dense_matrices(interpret):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    environment = os.environ | {"TRITON_INTERPRET": interpret}
    result = subprocess.run(
        command, cwd=CASES.parents[2], env=environment, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


def compiled(width, dtype, with_slopes, nesterov):
    """The kernel of `fused_step`, compiled for compute capability 9.0."""
    import triton
    from triton.backends.compiler import GPUTarget

    from minifisher.kernels import packed_triton

    kernel = packed_triton._kernel
    numbers = dict.fromkeys(("count", "tiles", "length"), "i32") | dict.fromkeys(
        ("decay", "damping", "momentum_decay", "moment_decay", "epsilon"), "fp32"
    )
    flags = {"relative": True, "nesterov": nesterov, "with_first_order": True, "with_slopes": with_slopes}
    constants = {**flags, **packed_triton.constants(width, 16)}
    kinds = {"packed": dtype, **numbers, **dict.fromkeys(constants, "constexpr")}
    signature = {name: kinds.get(name, "*fp32") for name in kernel.arg_names}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=packed_triton.options(width))


@pytest.mark.parametrize("dtype", ["*fp32", "*bf16"])
@pytest.mark.parametrize("width", [2, 9])
@pytest.mark.parametrize(("with_slopes", "nesterov"), [(False, False), (True, False), (True, True)])
def test_it_compiles_for_a_gpu(with_slopes, nesterov, width, dtype, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    code = compiled(width, dtype, with_slopes, nesterov)
    assert code.asm["cubin"]
    assert ("cvt.rn.bf16" in code.asm["ptx"]) == (dtype == "*bf16")
    # Threads exchange only the entries of weights; sums over the entries of a block need no exchange.
    assert code.asm["ptx"].count("shfl.sync") < (100 + 250 * with_slopes + 100 * nesterov)
