"""Lower a tile program to device source and to a plan of what its host side has to do.

TileLang's host IR is written for its own runtime. What a launcher needs from it is small, and `lower_program` extracts
it: the arguments and their shapes, the tensor maps to encode and the kernels to launch, in order.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import tilelang
from tilelang import tvm

from tilemla.codegen.errors import BuildError

tirx = tvm.tirx

# sm_90 is no architecture of a spec: what is written for other GPUs is built for it where it is to run on an H100.
MAX_SMEM_BYTES = {
    "sm_80": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_90a": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
}
ARCH_TARGETS: dict[str, dict[str, str]] = {
    **{arch: {"kind": "cuda", "arch": arch} for arch in MAX_SMEM_BYTES},
    "cpu": {"kind": "c"},
}
COMPILER_ONLY_OPTIONS = frozenset(
    {"tl.ptxas_register_usage_level", "tilemla.ptxas_flags", "tilemla.disable_fence_injection"}
)

_TENSORMAP = "__tvm_tensormap_create_tiled"
_IGNORED_PACKED = frozenset({"__tvm_set_device"})
_SCALARS = frozenset({"float32", "float64", "int32", "int64", "bool"})


@dataclasses.dataclass(frozen=True)
class BufferArg:
    """A tensor argument; shape and strides are TVM expressions, no strides means contiguous."""

    name: str
    data_name: str
    dtype: str
    shape: tuple[Any, ...]
    strides: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class ScalarArg:
    """A scalar argument."""

    name: str
    dtype: str


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """One tiled tensor map to encode; ``strides_bytes[0]`` is the element size, as in the host IR."""

    name: str
    data_name: str
    dtype_code: int
    dims: tuple[Any, ...]
    strides_bytes: tuple[Any, ...]
    box: tuple[Any, ...]
    element_strides: tuple[Any, ...]
    interleave: int
    swizzle: int
    l2_promotion: int
    oob_fill: int


@dataclasses.dataclass(frozen=True)
class KernelLaunch:
    """One kernel launch, or on the CPU one call; ``args`` are expressions beside the C type that takes each."""

    name: str
    args: tuple[tuple[Any, str], ...]
    grid: tuple[Any, Any, Any] = (1, 1, 1)
    block: tuple[Any, Any, Any] = (1, 1, 1)
    cluster: tuple[int, int, int] = (1, 1, 1)
    dynamic_smem_bytes: int = 0
    programmatic: bool = False


@dataclasses.dataclass(frozen=True)
class LoweredProgram:
    """A program after lowering: its device source and what the host must do."""

    name: str
    arch: str
    source: str
    args: tuple[BufferArg | ScalarArg, ...]
    tensor_maps: tuple[TensorMap, ...]
    launches: tuple[KernelLaunch, ...]
    bindings: Mapping[Any, Any]
    fast_math: bool
    ptxas_flags: tuple[str, ...]


def lower_program(name: str, program: Any, arch: str) -> LoweredProgram:
    """Lower one program.

    Parameters
    ----------
    name : str
        Name of the TVM-FFI function that the module will export.
    program : Program
        Holds ``func`` (a PrimFunc), and optionally ``pass_config`` (dict). A kernel that waits for the grid before it
        (``T.pdl_sync``) is launched with programmatic stream serialization.
    arch : str
        A key of ``ARCH_TARGETS``.

    Returns
    -------
    LoweredProgram

    Raises
    ------
    BuildError
        When TileLang refuses the program, or its host side does something that a launcher cannot.
    """
    if arch not in ARCH_TARGETS:
        raise BuildError(f"arch must be one of {sorted(ARCH_TARGETS)}, got {arch!r}")
    config = dict(getattr(program, "pass_config", None) or {})
    lowering_config = {key: value for key, value in config.items() if key not in COMPILER_ONLY_OPTIONS}
    target = tvm.target.Target(ARCH_TARGETS[arch])
    fences = _without_fence_injection() if config.get("tilemla.disable_fence_injection") else contextlib.nullcontext()
    try:
        with tvm.transform.PassContext(opt_level=3, config=lowering_config), target, fences:
            artifact = tilelang.lower(program.func, target=target)
    except Exception as error:
        raise BuildError(f"{name}: TileLang cannot lower this program for {arch}: {error}") from error
    args = _describe_args(name, program.func)
    host = _HostWalk(name, artifact.device_mod, args)
    for function in artifact.host_mod.functions.values():
        host.visit(function.body)
    if not host.launches:
        raise BuildError(f"{name}: the lowered program launches no kernel")
    return LoweredProgram(
        name=name,
        arch=arch,
        source=artifact.kernel_source,
        args=args,
        tensor_maps=tuple(host.tensor_maps),
        launches=tuple(host.launches),
        bindings=host.bindings,
        fast_math=bool(config.get("tl.enable_fast_math", False)),
        ptxas_flags=_ptxas_flags(config),
    )


@contextlib.contextmanager
def _without_fence_injection() -> Iterator[None]:
    """Leave out TileLang's pass that puts a proxy fence before whatever the async proxy reads or writes.

    It has no option of its own. It cannot see that a warpgroup which wrote a tile has fenced it before it arrived at
    the barrier, and has every reader fence once more: each waits for all memory accesses of its thread.
    """
    transform = tilelang.cuda.transform
    injection = transform.InjectFenceProxy
    transform.InjectFenceProxy = lambda: tvm.transform.module_pass(lambda mod, _: mod, opt_level=0)
    try:
        yield
    finally:
        transform.InjectFenceProxy = injection


def _ptxas_flags(config: Mapping[str, Any]) -> tuple[str, ...]:
    flags = list(config.get("tilemla.ptxas_flags", ()))
    level = config.get("tl.ptxas_register_usage_level")
    if level is not None:
        flags.append(f"--register-usage-level={int(level)}")
    return tuple(flags)


def _describe_args(name: str, func: Any) -> tuple[BufferArg | ScalarArg, ...]:
    args: list[BufferArg | ScalarArg] = []
    for param in func.params:
        if param in func.buffer_map:
            buffer = func.buffer_map[param]
            args.append(
                BufferArg(
                    name=buffer.name,
                    data_name=buffer.data.name,
                    dtype=str(buffer.dtype),
                    shape=tuple(buffer.shape),
                    strides=tuple(buffer.strides),
                )
            )
        elif str(param.dtype) in _SCALARS:
            args.append(ScalarArg(name=param.name, dtype=str(param.dtype)))
        else:
            raise BuildError(f"{name}: parameter {param.name} must be a tensor or a scalar, got {param.dtype}")
    return tuple(args)


class _HostWalk:
    """Collect tensor maps and launches from a host function, refusing what a launcher cannot repeat."""

    def __init__(self, program: str, device_mod: tvm.IRModule, args: tuple[BufferArg | ScalarArg, ...]) -> None:
        self.program = program
        self.kernels = {var.name_hint: func for var, func in device_mod.functions.items()}
        self.pointers = {arg.data_name for arg in args if isinstance(arg, BufferArg)}
        self.tensor_maps: list[TensorMap] = []
        self.map_names: dict[Any, str] = {}  # unique: boxes of different widths make several maps of one argument
        self.launches: list[KernelLaunch] = []
        self.bindings: dict[Any, Any] = {}

    def visit(self, stmt: Any) -> None:
        if isinstance(stmt, tirx.SeqStmt):
            for child in stmt.seq:
                self.visit(child)
        elif isinstance(stmt, tirx.Evaluate):
            self._visit_expr(stmt.value)
        elif isinstance(stmt, tirx.Bind):
            if not self._visit_call(stmt.value):
                self.bindings[stmt.var] = stmt.value
        elif isinstance(stmt, tirx.AttrStmt):
            self.visit(stmt.body)
        elif isinstance(stmt, (tirx.AssertStmt, tirx.DeclBuffer)):
            body = getattr(stmt, "body", None)
            if body is not None:
                self.visit(body)
        else:
            raise BuildError(
                f"{self.program}: the host side holds a {type(stmt).__name__}, which no launcher can do:\n{stmt}"
            )

    def _visit_expr(self, expr: Any) -> None:
        if isinstance(expr, tirx.Call) and not self._visit_call(expr) and str(expr.op.name) != "tirx.ret":
            raise BuildError(f"{self.program}: the host side calls {expr.op}, which no launcher can do: {expr}")

    def _visit_call(self, expr: Any) -> bool:
        """Take a call apart; False for an expression that is not a call with an effect."""
        if not isinstance(expr, tirx.Call):
            return False
        if isinstance(expr.op, tvm.ir.GlobalVar) and expr.op.name_hint in self.kernels:
            self._add_call(expr.op.name_hint, list(expr.args))
            return True
        if str(expr.op.name) not in ("tirx.tvm_call_packed", "tirx.call_extern"):
            return False
        callee, args = expr.args[0].value, list(expr.args[1:])
        if callee == _TENSORMAP:
            self._add_tensor_map(args)
        elif callee in self.kernels and str(expr.op.name) == "tirx.call_extern":
            self._add_call(callee, args)
        elif callee in self.kernels:
            self._add_launch(callee, args)
        elif callee not in _IGNORED_PACKED:
            raise BuildError(f"{self.program}: the host side calls {callee}, which no launcher can do")
        return True

    def _add_tensor_map(self, args: list[Any]) -> None:
        name, dtype_code, rank, address = args[0].name, int(args[1]), int(args[2]), args[3]
        if getattr(address, "name", None) not in self.pointers:
            raise BuildError(f"{self.program}: tensor map {name} must describe an argument, got {address}")
        groups = [tuple(args[4 + rank * i : 4 + rank * (i + 1)]) for i in range(4)]
        modes = [int(value) for value in args[4 + 4 * rank :]]
        if len(modes) != 4:
            raise BuildError(f"{self.program}: tensor map {name} has {len(args)} operands, expected {8 + 4 * rank}")
        dims, strides, box, steps = groups
        if name in self.map_names.values():
            name = f"{name}_{len(self.tensor_maps)}"
        self.map_names[args[0]] = name
        self.tensor_maps.append(TensorMap(name, address.name, dtype_code, dims, strides, box, steps, *modes))

    def _typed_args(self, kernel: str, args: list[Any]) -> tuple[tuple[Any, str], ...]:
        typed = []
        for arg, param in zip(args, self.kernels[kernel].params, strict=True):
            c_type = _c_type(param)
            is_map = c_type == "tensor_map" and arg in self.map_names
            typed.append((tirx.Var(self.map_names[arg], "handle") if is_map else arg, c_type))
        return tuple(typed)

    def _add_call(self, kernel: str, args: list[Any]) -> None:
        self.launches.append(KernelLaunch(kernel, self._typed_args(kernel, args)))

    def _add_launch(self, kernel: str, operands: list[Any]) -> None:
        function = self.kernels[kernel]
        count = len(function.params)
        where = dict(zip(map(str, function.attrs["tirx.kernel_launch_params"]), operands[count:], strict=True))
        attrs = function.attrs
        cluster = [int(where.pop(f"tir.cluster_dim_{axis}", 1)) for axis in "xyz"]
        if not _is_of_cluster(function):
            cluster = [1, 1, 1]  # TileLang launches all kernels of a program in the clusters of the first
        if attrs.get("use_cooperative_groups"):
            raise BuildError(f"{self.program}: kernel {kernel} needs a cooperative launch, which no launcher can do")
        smem = where.pop("tirx.use_dyn_shared_memory", 0)
        grid = tuple(where.pop(f"blockIdx.{axis}", 1) for axis in "xyz")
        block = tuple(where.pop(f"threadIdx.{axis}", 1) for axis in "xyz")
        if where:
            raise BuildError(f"{self.program}: kernel {kernel} has unknown launch parameters {sorted(where)}")
        self.launches.append(
            KernelLaunch(
                name=kernel,
                args=self._typed_args(kernel, operands[:count]),
                grid=grid,
                block=block,
                cluster=(cluster[0], cluster[1], cluster[2]),
                dynamic_smem_bytes=int(smem),
                programmatic=bool(attrs.get("has_cuda_pdl_sync", 0)),
            )
        )


def _is_of_cluster(function: Any) -> bool:
    """Whether a kernel synchronises its cluster."""
    found = []

    def visit(node: Any) -> None:
        if isinstance(node, tirx.Call) and str(getattr(node.op, "name", "")).startswith("tl.cluster_"):
            found.append(node)

    tirx.stmt_functor.post_order_visit(function.body, visit)
    return bool(found)


def _c_type(param: Any) -> str:
    annotation = param.ty if hasattr(param, "ty") else param.type_annotation
    if isinstance(annotation, tvm.ir.PointerType):
        return "tensor_map" if annotation.storage_scope == "grid_constant" else "pointer"
    return str(param.dtype)
