"""Tile programs: the math of MLA decode, written once and lowered by ``tilemla.codegen``.

`make_programs` is the door; importing this package imports no TileLang.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tilemla.config import DEFAULT_CONFIG, KernelConfig

if TYPE_CHECKING:
    from tilemla.dsl.program import Program
    from tilemla.spec import KernelSpec


def make_programs(spec: KernelSpec, config: KernelConfig = DEFAULT_CONFIG) -> dict[str, Program]:
    """Make the tile programs of a module.

    Parameters
    ----------
    spec : KernelSpec
        What the module is specialised on.
    config : KernelConfig
        What it is tuned by.

    Returns
    -------
    dict of str to Program
        In the order of ``spec.programs``.

    Raises
    ------
    ValueError
        When there is no tile program for the spec and configuration.
    """
    reason = spec.why_invalid() or config.why_invalid(spec)
    if reason is not None:
        raise ValueError(f"no tile program for {spec.name}: {reason}")
    if spec.kernel == "read_pages":
        from tilemla.dsl.sm90.read_pages import make_read_program

        return {"read_pages": make_read_program(spec)}
    if spec.kernel == "mla_sparse_prefill":
        if spec.arch == "cpu":
            from tilemla.dsl.sparse_prefill_cpu import make_sparse_prefill_program
        else:
            from tilemla.dsl.sm90.sparse_prefill import make_sparse_prefill_program

        return {"mla_sparse_prefill": make_sparse_prefill_program(spec)}
    from tilemla.dsl.batch_invariant import make_batch_invariant_program_cpu, make_batch_invariant_program_cuda
    from tilemla.dsl.merge import make_merge_program_cpu, make_merge_program_cuda
    from tilemla.dsl.metadata_cpu import make_metadata_program_cpu
    from tilemla.dsl.metadata_cuda import make_metadata_program_cuda

    if spec.kernel == "mla_sparse_decode":
        if spec.arch == "cpu":
            from tilemla.dsl.sparse_decode_cpu import make_sparse_decode_program

            return {
                "get_mla_metadata": make_metadata_program_cpu(),
                "get_batch_invariant_metadata": make_batch_invariant_program_cpu(),
                "mla_sparse_decode": make_sparse_decode_program(spec),
                **_appending(spec),
            }
        from tilemla.dsl.sm90.sparse_decode import make_sparse_decode_program as make_sparse_decode_program_sm90

        programs = {
            "get_mla_metadata": make_metadata_program_cuda(),
            "get_batch_invariant_metadata": make_batch_invariant_program_cuda(),
            "mla_sparse_decode": make_sparse_decode_program_sm90(spec, config),
        }
        if "mla_sparse_decode_paired" in spec.programs:
            programs["mla_sparse_decode_paired"] = make_sparse_decode_program_sm90(spec, config, paired=True)
        return {**programs, **_appending(spec)}
    if spec.arch == "cpu":
        from tilemla.dsl.decode_cpu import make_decode_program

        decode = make_decode_program(spec)
        return {
            "get_mla_metadata": make_metadata_program_cpu(),
            "get_batch_invariant_metadata": make_batch_invariant_program_cpu(),
            "mla_decode": decode,
            "mla_decode_plain": _without_options(decode),
            "merge_states": make_merge_program_cpu(spec),
        }
    if spec.arch == "sm_90a" and spec.kv_format == "dense_fp8":
        from tilemla.dsl.sm90.e4m3_decode import make_decode_program as make_decode_program_cuda
    elif spec.arch == "sm_90a" and spec.kv_format != "dense":
        from tilemla.dsl.sm90.bytes_decode import make_decode_program as make_decode_program_cuda
    elif spec.arch == "sm_90a":
        from tilemla.dsl.sm90.decode import make_decode_program as make_decode_program_cuda
    else:
        from tilemla.dsl.decode_mma import make_decode_program as make_decode_program_cuda

    decode = make_decode_program_cuda(spec, config)
    narrow = {}
    if "mla_decode_narrow" in spec.programs:
        from tilemla.dsl.sm90.bytes_narrow import make_decode_program as make_narrow_program

        narrow = {"mla_decode_narrow": make_narrow_program(spec, config)}
    return {
        "get_mla_metadata": make_metadata_program_cuda(),
        "get_batch_invariant_metadata": make_batch_invariant_program_cuda(),
        "mla_decode": decode,
        "mla_decode_plain": _without_options(decode),
        "merge_states": make_merge_program_cuda(spec),
        **narrow,
    }


def _appending(spec: KernelSpec) -> dict[str, Program]:
    """The program that quantises new tokens into a cache of bytes; nothing for other caches."""
    if "append_kv" not in spec.programs:
        return {}
    from tilemla.dsl.append import make_append_program_cpu, make_append_program_cuda

    make = make_append_program_cpu if spec.arch == "cpu" else make_append_program_cuda
    return {"append_kv": make(spec)}


def _without_options(decode: Program) -> Program:
    """The decode program for calls without an attention sink and without a bound to the left: nearly all of them.

    What those two need costs a short call some hundred nanoseconds, wanted or not: even instructions that are skipped
    have to be fetched.
    """
    from tilemla.dsl.specialise import fix_arguments

    return fix_arguments(decode, "mla_decode_plain", window_left=-1, has_sink=0)
