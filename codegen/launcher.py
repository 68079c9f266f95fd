"""Write the host launcher of a module: C++ over TVM-FFI, one exported function per program and a second for decode."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tilelang import tvm

from tilemla.codegen.cpp_expr import free_vars, print_cpp
from tilemla.codegen.errors import BuildError
from tilemla.codegen.lower import MAX_SMEM_BYTES, BufferArg, KernelLaunch, LoweredProgram, ScalarArg, TensorMap
from tilemla.codegen.unfolded import write_unfolded

tirx = tvm.tirx

_HERE = Path(__file__).parent
_DLPACK_CODES = {"int": "kDLInt", "uint": "kDLUInt", "float": "kDLFloat", "bfloat": "kDLBfloat", "bool": "kDLBool"}
_C_TYPES = {"int32": "int32_t", "int64": "int64_t", "float32": "float", "float64": "double", "bool": "bool"}
# Architecture-specific code (sm_90a) runs on that compute capability alone, other code on later minor ones too.
_SM = {arch: int(arch.removeprefix("sm_").removesuffix("a")) for arch in MAX_SMEM_BYTES}


def make_launcher(
    programs: tuple[LoweredProgram, ...],
    cubins: Mapping[str, str],
    dtype: str | None = None,
    avx2_suffix: str | None = None,
) -> str:
    """Write the launcher of a module.

    Parameters
    ----------
    programs : tuple of LoweredProgram
        The programs of the module, all of one architecture.
    cubins : mapping of str to str
        Path of each program's cubin as the assembler will see it; empty for a CPU module.
    dtype : str, optional
        Storage dtype of the spec. With ``"bfloat16"`` an argument that a program declares as uint16 also takes DLPack's
        bfloat16, whose bits those are.
    avx2_suffix : str, optional
        On x86-64, what the names of the CPU functions that need AVX2 end in.

    Returns
    -------
    str
        C++17 source that needs TVM-FFI's headers, and for CUDA ``cuda.h``.

    Raises
    ------
    BuildError
        On a shape or a launch that has no C++ form.
    """
    arch = programs[0].arch
    parts = [f"// Host launcher of {', '.join(program.name for program in programs)} for {arch}. Generated.\n"]
    if arch in _SM:
        parts.append(f"#define TILEMLA_SM {_SM[arch]}\n#define TILEMLA_SM_EXACT {int(arch.endswith('a'))}\n")
    parts.append((_HERE / "launcher_common.h").read_text(encoding="utf-8"))
    if arch in _SM:
        parts.append((_HERE / "launcher_cuda.h").read_text(encoding="utf-8"))
    for program in programs:
        parts.append(_ProgramWriter(program, cubins.get(program.name), dtype == "bfloat16", avx2_suffix).write())
    parts.append(write_unfolded(programs))
    return "\n".join(parts)


def dlpack_dtype(dtype: str) -> tuple[str, int]:
    """DLPack type code (as a C name) and bits of a TVM dtype."""
    match = re.fullmatch(r"(bfloat|float|uint|int|bool)(\d*)", dtype)
    if match is None or (not match[2] and match[1] != "bool"):
        raise BuildError(f"dtype {dtype} has no DLPack form here")
    return _DLPACK_CODES[match[1]], int(match[2] or 8)


class _ProgramWriter:
    """Write one exported function."""

    def __init__(
        self, program: LoweredProgram, cubin: str | None, bf16_as_uint16: bool, avx2_suffix: str | None
    ) -> None:
        self.program = program
        self.cubin = cubin
        self.bf16_as_uint16 = bf16_as_uint16
        self.avx2_suffix = avx2_suffix
        self.cuda = program.arch in _SM
        self.lines: list[str] = []
        self.buffers = {arg.data_name: arg for arg in program.args if isinstance(arg, BufferArg)}
        self.symbols: dict[str, tuple[Any, str]] = {}
        self.maps = {tensor_map.name: tensor_map for tensor_map in program.tensor_maps}

    def write(self) -> str:
        name, args = self.program.name, self.program.args
        self.emit(f"if (num_args != {len(args)}) tilemla::bad_count({_quote(name)}, {len(args)}, num_args);")
        for index, arg in enumerate(args):
            if isinstance(arg, BufferArg):
                self.take_tensor(index, arg)
            else:
                self.take_scalar(index, arg)
        self.bind_symbols()
        self.check_layouts()
        if self.cuda:
            self.launch_kernels()
        else:
            self.call_functions()
        body = "\n".join(f"  {line}" for line in self.lines)
        return (
            f"{self.file_scope()}\n"
            f'extern "C" TVM_FFI_DLL_EXPORT int __tvm_ffi_{name}(void*, const TVMFFIAny* args, int32_t num_args,\n'
            f"                                                   TVMFFIAny* result) {{\n"
            f"  TVM_FFI_SAFE_CALL_BEGIN();\n{body}\n"
            f"  result->type_index = kTVMFFINone;\n  result->zero_padding = 0;\n  result->v_int64 = 0;\n"
            f"  TVM_FFI_SAFE_CALL_END();\n}}\n"
        )

    def emit(self, *lines: str) -> None:
        self.lines += lines

    def where(self, argument: str) -> str:
        return f"tilemla::Where{{{_quote(self.program.name)}, {_quote(argument)}}}"

    # Arguments

    def take_tensor(self, index: int, arg: BufferArg) -> None:
        accepted = [dlpack_dtype(arg.dtype)]
        expected = arg.dtype
        if self.bf16_as_uint16 and arg.dtype == "uint16":
            accepted.insert(0, ("kDLBfloat", 16))
            expected = "bfloat16"
        table = f"dtypes_{_identifier(arg.name)}"
        pairs = ", ".join(f"{{{code}, {bits}}}" for code, bits in accepted)
        self.emit(
            f"static constexpr tilemla::DType {table}[] = {{{pairs}}};",
            f"const tilemla::Tensor<{len(arg.shape)}> {self.tensor(arg)}({self.where(arg.name)}, args[{index}], "
            f"{table}, {_quote(expected)}, {self.alignment(arg)});",
        )

    def alignment(self, arg: BufferArg) -> int:
        """Alignment of the data: TMA and 16-byte vector accesses need 16 on the GPU, elsewhere an element's own."""
        return 16 if self.cuda and (self.is_vectorised(arg) or self.has_map(arg)) else _item_bytes(arg)

    def is_vectorised(self, arg: BufferArg) -> bool:
        """Whether a kernel may read rows of the tensor 16 bytes at a time; a cache of bytes has rows of any length."""
        if arg.dtype == "uint8":
            return True
        return isinstance(arg.shape[-1], tirx.IntImm) and int(arg.shape[-1]) * _item_bytes(arg) % 16 == 0

    def has_map(self, arg: BufferArg) -> bool:
        return any(tensor_map.data_name == arg.data_name for tensor_map in self.program.tensor_maps)

    def take_scalar(self, index: int, arg: ScalarArg) -> None:
        variable = f"s_{_identifier(arg.name)}"
        if arg.dtype.startswith("float"):
            self.emit(f"const double {variable} = tilemla::float_arg({self.where(arg.name)}, args[{index}]);")
        else:
            self.emit(f"const int64_t {variable} = tilemla::int_arg({self.where(arg.name)}, args[{index}]);")
        self.symbols[arg.name] = (None, variable)

    def tensor(self, arg: BufferArg) -> str:
        return f"t_{_identifier(arg.name)}"

    # Shapes

    def bind_symbols(self) -> None:
        """Give every symbol the first extent, else the first stride, that is exactly that symbol."""
        self.origins: dict[str, tuple[str, str, int]] = {}
        for kind in ("dim", "stride"):
            for arg in self.buffers.values():
                for axis, extent in enumerate(arg.shape if kind == "dim" else arg.strides):
                    if isinstance(extent, tirx.Var):
                        self.bind(extent, arg, kind, axis)

    def bind(self, var: Any, arg: BufferArg, kind: str, axis: int) -> None:
        known = self.symbols.get(var.name)
        if known is not None:
            if known[0] is not None and not known[0].same_as(var):
                raise BuildError(f"{self.program.name}: two different symbols are called {var.name}")
            return
        variable = f"v_{_identifier(var.name)}"
        self.symbols[var.name] = (var, variable)
        self.origins[var.name] = (arg.name, kind, axis)
        self.emit(f"[[maybe_unused]] const int64_t {variable} = {self.tensor(arg)}.{kind}({axis});")

    def look_up(self, var: Any) -> str:
        if var.name in self.symbols:
            return self.symbols[var.name][1]
        if var in self.program.bindings:
            return self.cpp(self.program.bindings[var])
        raise BuildError(f"{self.program.name}: nothing gives a value to {var.name}")

    def cpp(self, expr: Any) -> str:
        return print_cpp(expr, self.look_up)

    def meaning(self, expr: Any) -> str:
        if not free_vars(expr):
            return ""
        text = str(expr)
        origin = self.origins.get(text)
        if origin is None:
            return f" ({text})"
        argument, kind, axis = origin
        return f" ({text}, from {argument}.{'shape' if kind == 'dim' else 'stride'}[{axis}])"

    def check_layouts(self) -> None:
        device = None
        for arg in self.buffers.values():
            tensor = self.tensor(arg)
            if not self.cuda:
                self.emit(f"{tensor}.expect_device(DLDevice{{kDLCPU, 0}});")
            elif device is None:
                device = tensor
                self.emit(
                    f"const DLDevice device{{kDLCUDA, {tensor}.tensor->device.device_id}};",
                    f"{tensor}.expect_device(device);",
                )
            else:
                self.emit(f"{tensor}.expect_device(device);")
            any_stride = False
            for kind, extents in (("dim", arg.shape), ("stride", arg.strides)):
                for axis, extent in enumerate(extents):
                    if isinstance(extent, tirx.Var) and self.origins.get(extent.name) == (arg.name, kind, axis):
                        any_stride |= kind == "stride"
                        continue
                    self.emit(f"{tensor}.expect_{kind}({axis}, {self.cpp(extent)}, {_quote(self.meaning(extent))});")
            if not arg.strides:
                self.emit(f"{tensor}.expect_compact();")
            if any_stride and self.cuda and self.is_vectorised(arg) and not self.has_map(arg):  # encoding checks maps
                self.emit(f"{tensor}.expect_aligned_rows({16 // _item_bytes(arg)});")

    # Launches

    def narrow(self, expr: Any, c_type: str) -> str:
        if c_type not in _C_TYPES:
            raise BuildError(f"{self.program.name}: a kernel takes a {c_type}, which no launcher can pass")
        if c_type.startswith("float") and not isinstance(expr, tirx.Var):
            raise BuildError(f"{self.program.name}: a kernel takes the floating-point expression {expr}")
        value = self.cpp(expr)
        if c_type == "int32" and not isinstance(expr, (int, tirx.IntImm)):
            return f"tilemla::to_int32({_quote(self.program.name)}, {_quote(str(expr))}, {value})"
        return f"static_cast<{_C_TYPES[c_type]}>({value})"

    def pointer(self, var: Any) -> str:
        if var.name not in self.buffers:
            raise BuildError(f"{self.program.name}: a kernel takes the pointer {var}, which is no argument's data")
        return f"{self.tensor(self.buffers[var.name])}.data"

    def call_functions(self) -> None:
        for launch in self.program.launches:
            values = [self.pointer(arg) if kind == "pointer" else self.narrow(arg, kind) for arg, kind in launch.args]
            function = launch.name
            if self.avx2_suffix is not None:
                function = f"(tilemla::has_avx2() ? {launch.name}{self.avx2_suffix} : {launch.name})"
            self.emit(
                f"if (int32_t code = {function}({', '.join(values)})) {{",
                f'  TVM_FFI_THROW(RuntimeError) << "{launch.name} returned " << code;',
                "}",
            )

    def launch_kernels(self) -> None:
        self.emit(
            "const tilemla::Driver& driver = tilemla::Driver::get();",
            f"const auto& state = cubin_{self.program.name}.on_device(driver, device.device_id);",
            "tilemla::ContextGuard guard(driver, state.primary, state.device);",
            "CUstream stream = static_cast<CUstream>(TVMFFIEnvGetStream(kDLCUDA, device.device_id));",
        )
        for tensor_map in self.program.tensor_maps:
            self.encode(tensor_map)
        # Everything that can be refused is refused before the first launch.
        params = [self.pack_params(index, launch) for index, launch in enumerate(self.program.launches)]
        if len(self.program.launches) > 1:
            # What one kernel leaves for the next may lie in memory that the stream's calls share.
            self.emit("std::lock_guard<std::mutex> in_turn(tilemla::turn_of(stream));")
        for index, launch in enumerate(self.program.launches):
            self.launch_kernel(index, launch, params[index])

    def encode(self, tensor_map: TensorMap) -> None:
        buffer = self.buffers[tensor_map.data_name]
        tensor, rank, variable = self.tensor(buffer), len(tensor_map.dims), f"m_{_identifier(tensor_map.name)}"
        dims = ", ".join(f"static_cast<cuuint64_t>({self.cpp(dim)})" for dim in tensor_map.dims)
        strides = ", ".join(self.cpp(stride) for stride in tensor_map.strides_bytes)
        box = ", ".join(f"static_cast<cuuint32_t>({self.cpp(extent)})" for extent in tensor_map.box)
        steps = ", ".join(f"static_cast<cuuint32_t>({self.cpp(step)})" for step in tensor_map.element_strides)
        self.emit(
            f"alignas(64) CUtensorMap {variable};",
            "{",
            f"  const cuuint64_t dims[{rank}] = {{{dims}}};",
            f"  const int64_t strides_bytes[{rank}] = {{{strides}}};",
            f"  const cuuint32_t box[{rank}] = {{{box}}};",
            f"  const cuuint32_t element_strides[{rank}] = {{{steps}}};",
            f"  tilemla::encode_tensor_map<{rank}>(driver, &{variable}, {tensor}.where,",
            f"      static_cast<CUtensorMapDataType>({tensor_map.dtype_code}), {tensor}.data, {tensor}.empty, dims,",
            "      strides_bytes, box, element_strides,",
            f"      static_cast<CUtensorMapInterleave>({tensor_map.interleave}),",
            f"      static_cast<CUtensorMapSwizzle>({tensor_map.swizzle}),",
            f"      static_cast<CUtensorMapL2promotion>({tensor_map.l2_promotion}),",
            f"      static_cast<CUtensorMapFloatOOBfill>({tensor_map.oob_fill}));",
            "}",
        )

    def pack_params(self, index: int, launch: KernelLaunch) -> list[str]:
        """Put a kernel's parameters into variables and return their addresses."""
        addresses = []
        for position, (arg, kind) in enumerate(launch.args):
            if kind == "tensor_map":
                if arg.name not in self.maps:
                    raise BuildError(f"{self.program.name}: kernel {launch.name} takes the unknown tensor map {arg}")
                addresses.append(f"&m_{_identifier(arg.name)}")
                continue
            variable = f"p{index}_{position}"
            value = self.pointer(arg) if kind == "pointer" else self.narrow(arg, kind)
            self.emit(f"{'void*' if kind == 'pointer' else _C_TYPES[kind]} {variable} = {value};")
            addresses.append(f"&{variable}")
        return addresses

    def launch_kernel(self, index: int, launch: KernelLaunch, params: list[str]) -> None:
        cubin = f"cubin_{self.program.name}"
        grid, block, cluster = (
            "{" + ", ".join(self.cpp(extent) for extent in dims) + "}"
            for dims in (launch.grid, launch.block, launch.cluster)
        )
        self.emit(
            f"void* params_{index}[] = {{{', '.join(params)}}};",
            f"tilemla::launch(driver, {cubin}.kernel({index}), {cubin}.name({index}), stream, {grid},",
            f"                {block}, {cluster}, {launch.dynamic_smem_bytes}, {_bool(launch.programmatic)},",
            f"                params_{index});",
        )

    # File scope

    def file_scope(self) -> str:
        name = self.program.name
        if not self.cuda:
            return "\n".join(self.declare(launch) for launch in self.program.launches)
        infos = ", ".join(
            f"{{{_quote(launch.name)}, {launch.dynamic_smem_bytes}, {_bool(_count(launch.cluster) > 8)}}}"
            for launch in self.program.launches
        )
        symbol = f"tilemla_cubin_{name}"
        return (
            f'asm(".pushsection .rodata\\n.balign 64\\n.hidden {symbol}\\n.globl {symbol}\\n{symbol}:\\n"\n'
            f'    ".incbin \\"{self.cubin}\\"\\n.popsection\\n");\n'
            f'extern "C" const unsigned char {symbol}[] __attribute__((visibility("hidden")));\n'
            f"static const tilemla::KernelInfo kernels_{name}[] = {{{infos}}};\n"
            f"static tilemla::Cubin<{len(self.program.launches)}> cubin_{name}({symbol}, kernels_{name});\n"
        )

    def declare(self, launch: KernelLaunch) -> str:
        types = ["void*" if kind == "pointer" else _C_TYPES[kind] for _, kind in launch.args]
        names = [launch.name] + ([f"{launch.name}{self.avx2_suffix}"] if self.avx2_suffix is not None else [])
        return "\n".join(f'extern "C" int32_t {name}({", ".join(types)});' for name in names)


def _item_bytes(arg: BufferArg) -> int:
    return max(dlpack_dtype(arg.dtype)[1] // 8, 1)


def _identifier(name: str) -> str:
    return re.sub(r"\W", "_", name)


def _quote(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") + '"'


def _bool(value: bool) -> str:
    return "true" if value else "false"


def _count(dims: tuple[int, int, int]) -> int:
    return dims[0] * dims[1] * dims[2]
