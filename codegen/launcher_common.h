// Argument checks that every launcher shares. The good path builds no strings; messages are made out of line.
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>

#include <cstdint>
#include <limits>
#include <sstream>
#include <string>

#define TILEMLA_COLD [[noreturn, gnu::cold, gnu::noinline]] static

namespace tilemla {

static inline int64_t floor_div(int64_t a, int64_t b) { return a / b - ((a % b != 0) & ((a < 0) != (b < 0))); }
static inline int64_t floor_mod(int64_t a, int64_t b) { return a - floor_div(a, b) * b; }
static inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

#if defined(__x86_64__)
static inline bool has_avx2() {
  static const bool supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return supported;
}
#endif

struct Where {
  const char* program;
  const char* argument;
};

struct DType {
  uint8_t code;
  uint8_t bits;
};

static inline std::string show(DLDataType dtype) {
  const char* name = dtype.code == kDLInt      ? "int"
                     : dtype.code == kDLUInt   ? "uint"
                     : dtype.code == kDLFloat  ? "float"
                     : dtype.code == kDLBfloat ? "bfloat"
                     : dtype.code == kDLBool   ? "bool"
                                               : nullptr;
  std::ostringstream os;
  if (name) {
    os << name;
  } else {
    os << "DLPack type code " << int(dtype.code) << ", bits ";
  }
  os << int(dtype.bits);
  if (dtype.lanes != 1) os << "x" << dtype.lanes;
  return os.str();
}

static inline std::string show(DLDevice device) {
  std::ostringstream os;
  if (device.device_type == kDLCPU) return "cpu";
  if (device.device_type == kDLCUDA) {
    os << "cuda:" << device.device_id;
  } else {
    os << "DLPack device type " << int(device.device_type) << ", id " << device.device_id;
  }
  return os.str();
}

static inline std::string show(const int64_t* values, int count) {
  std::ostringstream os;
  os << "(";
  for (int i = 0; i < count; ++i) os << (i ? ", " : "") << values[i];
  os << (count == 1 ? ",)" : ")");
  return os.str();
}

TILEMLA_COLD void bad_count(const char* program, int expected, int received) {
  TVM_FFI_THROW(TypeError) << program << ": expected " << expected << " arguments, got " << received;
  __builtin_unreachable();
}

TILEMLA_COLD void bad_kind(Where where, const char* expected, const TVMFFIAny& received) {
  TVM_FFI_THROW(TypeError) << where.program << ": argument " << where.argument << " must be " << expected << ", got "
                           << ::tvm::ffi::TypeIndexToTypeKey(received.type_index);
  __builtin_unreachable();
}

TILEMLA_COLD void bad_ndim(Where where, int expected, const DLTensor* tensor) {
  TVM_FFI_THROW(ValueError) << where.program << ": argument " << where.argument << " must have " << expected
                            << " dimensions, got shape " << show(tensor->shape, tensor->ndim);
  __builtin_unreachable();
}

TILEMLA_COLD void bad_dtype(Where where, const char* expected, const DLTensor* tensor) {
  TVM_FFI_THROW(TypeError) << where.program << ": argument " << where.argument << " must have dtype " << expected
                           << ", got " << show(tensor->dtype);
  __builtin_unreachable();
}

TILEMLA_COLD void bad_device(Where where, const std::string& expected, const DLTensor* tensor) {
  TVM_FFI_THROW(ValueError) << where.program << ": argument " << where.argument << " must be on " << expected
                            << ", got " << show(tensor->device);
  __builtin_unreachable();
}

TILEMLA_COLD void bad_dim(Where where, int axis, const char* meaning, int64_t expected, const DLTensor* tensor) {
  TVM_FFI_THROW(ValueError) << where.program << ": argument " << where.argument << " must have shape[" << axis
                            << "] = " << expected << meaning << ", got shape " << show(tensor->shape, tensor->ndim);
  __builtin_unreachable();
}

TILEMLA_COLD void bad_stride(Where where, int axis, const char* meaning, int64_t expected, const int64_t* strides,
                             int ndim) {
  TVM_FFI_THROW(ValueError) << where.program << ": argument " << where.argument << " must have stride[" << axis
                            << "] = " << expected << meaning << ", got strides " << show(strides, ndim);
  __builtin_unreachable();
}

TILEMLA_COLD void bad_pointer(Where where, int64_t alignment, const void* received) {
  if (received) {
    TVM_FFI_THROW(ValueError) << where.program << ": argument " << where.argument << " must be aligned to " << alignment
                              << " bytes, got address " << received;
  }
  TVM_FFI_THROW(ValueError) << where.program << ": argument " << where.argument
                            << " must point to data, got a null pointer";
  __builtin_unreachable();
}

TILEMLA_COLD void bad_stride_alignment(Where where, int64_t multiple, const int64_t* strides, int ndim) {
  TVM_FFI_THROW(ValueError) << where.program << ": argument " << where.argument
                            << " must have strides that are multiples of " << multiple << " elements, got strides "
                            << show(strides, ndim);
  __builtin_unreachable();
}

TILEMLA_COLD void bad_range(const char* program, const char* what, int64_t received) {
  TVM_FFI_THROW(ValueError) << program << ": " << what << " must fit into 32 bits, got " << received;
  __builtin_unreachable();
}

// Take a tensor argument as a DLTensor, whichever of the two ways it was passed.
static inline const DLTensor* tensor_arg(Where where, const TVMFFIAny& arg) {
  if (arg.type_index == kTVMFFITensor) {
    return reinterpret_cast<const DLTensor*>(reinterpret_cast<const char*>(arg.v_obj) + sizeof(TVMFFIObject));
  }
  if (arg.type_index != kTVMFFIDLTensorPtr) bad_kind(where, "a tensor", arg);
  return static_cast<const DLTensor*>(arg.v_ptr);
}

static inline double float_arg(Where where, const TVMFFIAny& arg) {
  if (arg.type_index == kTVMFFIFloat) return arg.v_float64;
  if (arg.type_index != kTVMFFIInt) bad_kind(where, "a number", arg);
  return static_cast<double>(arg.v_int64);
}

static inline int64_t int_arg(Where where, const TVMFFIAny& arg) {
  if (arg.type_index != kTVMFFIInt && arg.type_index != kTVMFFIBool) bad_kind(where, "an integer", arg);
  return arg.v_int64;
}

static inline int32_t to_int32(const char* program, const char* what, int64_t value) {
  if (value != static_cast<int32_t>(value)) bad_range(program, what, value);
  return static_cast<int32_t>(value);
}

// A checked tensor argument: rank, dtype, device and data pointer are right; strides are always there.
template <int kNdim>
struct Tensor {
  Where where;
  const DLTensor* tensor;
  void* data;
  bool empty;
  int64_t strides[kNdim];

  template <int kNumDTypes>
  Tensor(Where where, const TVMFFIAny& arg, const DType (&dtypes)[kNumDTypes], const char* dtype_name, int alignment)
      : where(where), tensor(tensor_arg(where, arg)), empty(false) {
    if (tensor->ndim != kNdim) bad_ndim(where, kNdim, tensor);
    bool known = false;
    for (const DType& dtype : dtypes) known |= tensor->dtype.code == dtype.code && tensor->dtype.bits == dtype.bits;
    if (!known || tensor->dtype.lanes != 1) bad_dtype(where, dtype_name, tensor);
    int64_t compact = 1;
    for (int i = kNdim - 1; i >= 0; --i) {
      strides[i] = tensor->strides ? tensor->strides[i] : compact;
      compact *= tensor->shape[i];
    }
    empty = compact == 0;
    data = static_cast<char*>(tensor->data) + tensor->byte_offset;
    if (!empty && (!tensor->data || reinterpret_cast<uintptr_t>(data) % alignment)) {
      bad_pointer(where, alignment, tensor->data ? data : nullptr);
    }
  }

  int64_t dim(int axis) const { return tensor->shape[axis]; }
  int64_t stride(int axis) const { return strides[axis]; }

  void expect_dim(int axis, int64_t expected, const char* meaning) const {
    if (tensor->shape[axis] != expected) bad_dim(where, axis, meaning, expected, tensor);
  }
  // The stride of a dimension with at most one index says nothing.
  void expect_stride(int axis, int64_t expected, const char* meaning) const {
    if (strides[axis] != expected && tensor->shape[axis] > 1 && !empty) {
      bad_stride(where, axis, meaning, expected, strides, kNdim);
    }
  }
  void expect_compact() const {
    int64_t compact = 1;
    for (int i = kNdim - 1; i >= 0; --i) {
      expect_stride(i, compact, " (contiguous)");
      compact *= tensor->shape[i];
    }
  }
  // Rows that are read in vectors must begin at multiples of their length; the last stride is 1.
  void expect_aligned_rows(int64_t multiple) const {
    for (int i = 0; i + 1 < kNdim; ++i) {
      if (strides[i] % multiple && tensor->shape[i] > 1 && !empty) {
        bad_stride_alignment(where, multiple, strides, kNdim);
      }
    }
  }
  void expect_device(DLDevice device) const {
    if (tensor->device.device_type != device.device_type || tensor->device.device_id != device.device_id) {
      bad_device(where, show(device), tensor);
    }
  }
};

}  // namespace tilemla
