"""Write a module's second ways into its decode programs: the same arguments in the shapes of the public interface."""

from __future__ import annotations

from pathlib import Path

from tilemla.codegen.errors import BuildError
from tilemla.codegen.lower import LoweredProgram
from tilemla.spec import UNFOLDED_PROGRAMS

_FOLDED_ROWS = ("q", "out")
_FOLDED_LSE = "softmax_lse"


def write_unfolded(programs: tuple[LoweredProgram, ...]) -> str:
    """Write ``mla_decode_unfolded`` and the like for a module that holds these programs.

    Each takes what its program takes, in the same order, but q ``(b, s_q, h_q, head_dim_qk)``, out
    ``(b, s_q, h_q, head_dim_v)`` and softmax_lse ``(b, h_q, s_q)``, and folds them by strides alone. It refuses what
    the program would have to trust: cuts that do not fit into the partial buffers, a short ``num_splits``, a cache or
    a block table without pages, a ``seq_len_q`` or ``group_size`` other than the tensors say.

    Parameters
    ----------
    programs : tuple of LoweredProgram
        The programs of the module.

    Returns
    -------
    str
        C++ that follows the exported programs; empty for a module of others.

    Raises
    ------
    BuildError
        When a program lacks an argument that is to be folded.
    """
    written = [_write_one(program) for program in programs if program.name in UNFOLDED_PROGRAMS]
    if not written:
        return ""
    return "\n".join([(Path(__file__).parent / "launcher_unfolded.h").read_text(encoding="utf-8"), *written])


def _write_one(program: LoweredProgram) -> str:
    name = f"{program.name}_unfolded"
    positions = {arg.name: index for index, arg in enumerate(program.args)}

    def argument(wanted: str) -> str:
        if wanted not in positions:
            raise BuildError(
                f"{program.name} must have an argument {wanted} to be called unfolded, got {list(positions)}"
            )
        return f"folded[{positions[wanted]}]"

    sizes = ", ".join(map(argument, ("q", "kcache", "seq_len_q", "group_size")))
    rooms = ", ".join(map(argument, ("block_table", "tile_scheduler_metadata", "num_splits", "out_accum")))
    lines = [
        f'if (num_args != {len(positions)}) tilemla::bad_count("{name}", {len(positions)}, num_args);',
        f"TVMFFIAny folded[{len(positions)}];",
        f"for (int i = 0; i < {len(positions)}; ++i) folded[i] = args[i];",
        f'const tilemla::Heads heads("{name}", {sizes});',
        f'tilemla::expect_room("{name}", heads.batch_size(), {rooms});',
    ]
    for wanted in _FOLDED_ROWS:
        lines += [
            f"tilemla::Folded<4> folded_{wanted};",
            f'heads.fold_rows("{wanted}", {argument(wanted)}, folded_{wanted});',
        ]
    lines += [
        "tilemla::Folded<3> folded_lse;",
        f'heads.fold_lse("{_FOLDED_LSE}", {argument(_FOLDED_LSE)}, folded_lse);',
        f"if (int code = __tvm_ffi_{program.name}(self, folded, num_args, result)) return code;",
    ]
    body = "\n".join(f"  {line}" for line in lines)
    return (
        f'extern "C" TVM_FFI_DLL_EXPORT int __tvm_ffi_{name}(void* self, const TVMFFIAny* args, int32_t num_args,\n'
        f"                                                   TVMFFIAny* result) {{\n"
        f"  TVM_FFI_SAFE_CALL_BEGIN();\n{body}\n  TVM_FFI_SAFE_CALL_END();\n}}\n"
    )
