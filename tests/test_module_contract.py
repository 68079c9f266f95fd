"""A module needs TVM-FFI, libc and libstdc++, and nothing else: not TileLang, not TVM, not CUDA."""

import ctypes
import os
import re
import subprocess
import sys
import textwrap

import pytest
from tvm_ffi import libinfo

from small_programs import make_row_sum, make_tma_wgmma
from tilemla.codegen.build import build_programs
from tilemla.errors import ToolchainError
from tilemla.loader import ensure_module
from tilemla.spec import KernelSpec
from tilemla.toolchain import find_cuda_toolkit

SYSTEM_LIBRARIES = {"libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6", "libdl.so.2", "libpthread.so.0"}

IN_A_BARE_PROCESS = """
    import sys

    FORBIDDEN = ("tilelang", "tvm", "z3")

    class Refuse:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in FORBIDDEN:
                raise ImportError(f"{name} must not be imported here")

    sys.meta_path.insert(0, Refuse())
    try:
        import tilelang
    except ImportError:
        pass
    else:
        raise SystemExit("the import was not refused")

    import torch
    import tilemla

    torch.manual_seed(0)
    lengths = torch.tensor([130, 0, 64], dtype=torch.int32)
    q = torch.randn(3, 2, 4, 576).bfloat16()
    k_cache = torch.randn(8, 64, 1, 576).bfloat16()
    block_table = torch.tensor([[5, 0, 7], [-1, -1, -1], [2, -1, -1]], dtype=torch.int32)
    metadata, num_splits = tilemla.get_mla_metadata(lengths, 2 * 4, 1)
    out, lse = tilemla.flash_mla_with_kvcache(
        q, k_cache, block_table, lengths, 512, metadata, num_splits, causal=False
    )
    for request, length in enumerate(lengths.tolist()):
        if length == 0:
            continue
        keys = k_cache[block_table[request].clamp(min=0).long()].reshape(-1, 576)[:length].double()
        weights = torch.softmax(torch.einsum("shd,ld->shl", q[request].double(), keys) * 576**-0.5, -1)
        torch.testing.assert_close(out[request].double(), weights @ keys[:, :512], atol=2e-3, rtol=2e-2)
    assert bool((out[1] == 0).all()) and bool((lse[1] == float("inf")).all())
    assert not [name for name in sys.modules if name.partition(".")[0] in FORBIDDEN]
    print("served")
"""


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_a_process_that_cannot_import_tilelang_tvm_or_z3_is_served(tmp_path):
    entry = ensure_module(KernelSpec(arch="cpu")).entry
    done = run_python(
        IN_A_BARE_PROCESS,
        TILEMLA_MODULE_PATH=str(entry.directory.parent),
        TILEMLA_CACHE_DIR=str(tmp_path),
        TILEMLA_BUILD="never",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["served"]


@pytest.fixture(scope="module", params=["cpu", "sm_90a"])
def library(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "cpu":
        return build_programs("row_sum", {"row_sum": make_row_sum()}, "cpu", folder).library
    try:
        find_cuda_toolkit()
    except ToolchainError as error:
        pytest.skip(f"needs nvcc: {error}")
    return build_programs("scores", {"scores": make_tma_wgmma()}, "sm_90a", folder).library


def run_tool(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_library_needs_only_tvm_ffi_and_the_system(library):
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", run_tool("readelf", "-d", library)))
    assert "libtvm_ffi.so" in needed
    assert needed - {"libtvm_ffi.so"} <= SYSTEM_LIBRARIES


def test_every_undefined_symbol_is_found_there(library):
    providers = [ctypes.CDLL(libinfo.find_libtvm_ffi())]
    providers += [ctypes.CDLL(name) for name in sorted(SYSTEM_LIBRARIES)]
    undefined = [line.split() for line in run_tool("nm", "-D", "--undefined-only", library).splitlines()]
    assert undefined
    for kind, symbol in undefined:
        name = symbol.partition("@")[0]
        assert kind == "w" or any(hasattr(provider, name) for provider in providers), f"{name} is not resolved"


def test_a_library_exports_its_programs_and_nothing_else(library):
    exported = [line.split()[-1] for line in run_tool("nm", "-D", "--defined-only", library).splitlines()]
    assert exported == [{"row_sum": "__tvm_ffi_row_sum", "scores": "__tvm_ffi_scores"}[library.stem]]


def test_a_library_is_small(library):
    assert library.stat().st_size < 150_000
