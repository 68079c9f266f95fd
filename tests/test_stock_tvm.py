"""Stock Apache TVM, in a process of its own, loads a generated CPU module and gets the same numbers."""

import math
import os
import subprocess
import sys
import textwrap

import numpy as np
import torch

from cases import Case, make_inputs
from tilemla.loader import ensure_module, open_module
from tilemla.spec import KernelSpec

CASE = Case(lengths=(3000, 0, 64, 1), num_heads_q=6, num_heads_k=2, dtype=torch.float16)
NUM_SM_PARTS = 8
SCALE_LOG2 = 576**-0.5 * 1.4426950408889634

IN_STOCK_TVM = """
    import sys

    import numpy as np
    import tvm

    assert tvm.__version__ == "0.25.0.post1", tvm.__version__
    assert "tilelang" not in sys.modules
    library, arguments, results = sys.argv[1:]
    module = tvm.runtime.load_module(library)
    tensors = {name: tvm.runtime.tensor(value) for name, value in np.load(arguments).items()}
    schedule = [tensors[name] for name in ("cache_seqlens", "tile_scheduler_metadata", "num_splits")]
    module["get_mla_metadata"](*schedule, 1, 16, 8, 0, 1, -1, 1)
    names = ("q", "kcache", "block_table", "cache_seqlens", "tile_scheduler_metadata", "num_splits", "out",
             "softmax_lse", "out_accum", "lse_accum_log2", "attn_sink")
    scalars = (576**-0.5 * 1.4426950408889634, 0.6931471805599453, 1, 3, -1, -1, 0)
    module["mla_decode"](*(tensors[name] for name in names), *scalars)
    np.savez(results, **{name: tensors[name].numpy() for name in ("out", "softmax_lse", "num_splits")})
    assert "tilelang" not in sys.modules
"""


def make_arguments():
    """Arguments of the module's own functions, in order, by name."""
    inputs = make_inputs(CASE)
    b, h_k, h_q = CASE.batch_size, CASE.num_heads_k, CASE.num_heads_q
    rows = h_q // h_k
    max_splits = b + NUM_SM_PARTS
    return dict(
        q=inputs.q.view(b, 1, h_k, rows, 576)[:, 0].contiguous(),
        kcache=inputs.k_cache,
        block_table=inputs.block_table,
        cache_seqlens=inputs.cache_seqlens,
        tile_scheduler_metadata=torch.full((NUM_SM_PARTS, 8), -1, dtype=torch.int32),
        num_splits=torch.full((b + 1,), -1, dtype=torch.int32),
        out=torch.full((b, h_k, rows, 512), torch.nan, dtype=CASE.dtype),
        softmax_lse=torch.full((b, h_k, rows), torch.nan),
        out_accum=torch.full((max_splits, h_k, rows, 512), torch.nan),
        lse_accum_log2=torch.full((max_splits, h_k, rows), torch.nan),
        attn_sink=torch.full((h_k, rows), torch.nan),
    )


def test_stock_tvm_gets_the_same_numbers(tmp_path):
    entry = ensure_module(KernelSpec(arch="cpu", dtype="float16")).entry
    arguments = make_arguments()
    np.savez(tmp_path / "arguments.npz", **{name: tensor.numpy() for name, tensor in arguments.items()})
    # Importing TileLang, as other tests of this process do, points PYTHONPATH and TVM_LIBRARY_PATH at its own TVM.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TVM_")}
    command = [sys.executable, "-I", "-c", textwrap.dedent(IN_STOCK_TVM), entry.library]
    done = subprocess.run(
        [*map(str, command), str(tmp_path / "arguments.npz"), str(tmp_path / "results.npz")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr

    functions = open_module(entry).functions
    functions["get_mla_metadata"](
        *(arguments[name] for name in ("cache_seqlens", "tile_scheduler_metadata", "num_splits")), 1, 16, 8, 0, 1, -1, 1
    )
    functions["mla_decode"](*arguments.values(), SCALE_LOG2, math.log(2.0), 1, 3, -1, -1, 0)
    results = np.load(tmp_path / "results.npz")
    for name in ("out", "softmax_lse", "num_splits"):
        np.testing.assert_array_equal(results[name], arguments[name].numpy())
    assert not np.isnan(results["out"]).any()
    assert int(results["num_splits"][-1]) > CASE.batch_size, "no request was split"
