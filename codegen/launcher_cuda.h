// The CUDA side of a launcher: the driver by dlopen, kernels per device, tensor maps, launches.
#include <cuda.h>
#include <dlfcn.h>

#include <atomic>
#include <mutex>

namespace tilemla {

// Driver functions, looked up when a kernel is first launched so that the module opens without a driver.
struct Driver {
  CUresult (*init)(unsigned);
  CUresult (*get_error_string)(CUresult, const char**);
  CUresult (*device_get)(CUdevice*, int);
  CUresult (*device_get_attribute)(int*, CUdevice_attribute, CUdevice);
  CUresult (*primary_ctx_retain)(CUcontext*, CUdevice);
  CUresult (*ctx_get_current)(CUcontext*);
  CUresult (*ctx_get_device)(CUdevice*);
  CUresult (*ctx_push)(CUcontext);
  CUresult (*ctx_pop)(CUcontext*);
  CUresult (*library_load_data)(CUlibrary*, const void*, CUjit_option*, void**, unsigned, CUlibraryOption*, void**,
                                unsigned);
  CUresult (*library_get_kernel)(CUkernel*, CUlibrary, const char*);
  CUresult (*kernel_get_function)(CUfunction*, CUkernel);
  CUresult (*kernel_set_attribute)(CUfunction_attribute, int, CUkernel, CUdevice);
  CUresult (*launch_kernel_ex)(const CUlaunchConfig*, CUfunction, void**, void**);
  CUresult (*tensor_map_encode_tiled)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                      const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                      CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) TVM_FFI_THROW(RuntimeError) << "libcuda.so.1 cannot be opened (" << dlerror() << ")";
    auto bind = [library](auto& function, const char* symbol) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, symbol));
      if (!function) TVM_FFI_THROW(RuntimeError) << "libcuda.so.1 has no " << symbol << "; the driver is too old";
    };
    bind(init, "cuInit");
    bind(get_error_string, "cuGetErrorString");
    bind(device_get, "cuDeviceGet");
    bind(device_get_attribute, "cuDeviceGetAttribute");
    bind(primary_ctx_retain, "cuDevicePrimaryCtxRetain");
    bind(ctx_get_current, "cuCtxGetCurrent");
    bind(ctx_get_device, "cuCtxGetDevice");
    bind(ctx_push, "cuCtxPushCurrent_v2");
    bind(ctx_pop, "cuCtxPopCurrent_v2");
    bind(library_load_data, "cuLibraryLoadData");
    bind(library_get_kernel, "cuLibraryGetKernel");
    bind(kernel_get_function, "cuKernelGetFunction");
    bind(kernel_set_attribute, "cuKernelSetAttribute");
    bind(launch_kernel_ex, "cuLaunchKernelEx");
    bind(tensor_map_encode_tiled, "cuTensorMapEncodeTiled");
    check(init(0), "cuInit");
  }

  void check(CUresult result, const char* call, const char* subject = "") const {
    if (result != CUDA_SUCCESS) fail(result, call, subject);
  }

  [[noreturn, gnu::cold, gnu::noinline]] void fail(CUresult result, const char* call, const char* subject) const {
    const char* text = nullptr;
    get_error_string(result, &text);
    TVM_FFI_THROW(RuntimeError) << call << (*subject ? " of " : "") << subject << " failed with CUDA error "
                                << int(result) << ": " << (text ? text : "unknown");
    __builtin_unreachable();
  }

  static const Driver& get() {
    static const Driver driver;
    return driver;
  }
};

// Make a context of the device current for one call, unless the caller already has one.
class ContextGuard {
 public:
  ContextGuard(const Driver& driver, CUcontext primary, CUdevice device) : driver_(driver), pushed_(false) {
    CUcontext current = nullptr;
    driver.check(driver.ctx_get_current(&current), "cuCtxGetCurrent");
    if (current == primary) return;
    CUdevice current_device = -1;
    if (current && driver.ctx_get_device(&current_device) == CUDA_SUCCESS && current_device == device) return;
    driver.check(driver.ctx_push(primary), "cuCtxPushCurrent");
    pushed_ = true;
  }
  ~ContextGuard() {
    CUcontext popped;
    if (pushed_) driver_.ctx_pop(&popped);
  }
  ContextGuard(const ContextGuard&) = delete;
  ContextGuard& operator=(const ContextGuard&) = delete;

 private:
  const Driver& driver_;
  bool pushed_;
};

struct KernelInfo {
  const char* name;
  int dynamic_smem_bytes;
  bool large_cluster;
};

// The kernels of one cubin: loaded once, prepared once per device, thread-safe.
template <int kNumKernels>
class Cubin {
 public:
  struct Device {
    std::atomic<bool> ready{false};
    CUdevice device;
    CUcontext primary;
  };

  Cubin(const unsigned char* image, const KernelInfo (&info)[kNumKernels]) : image_(image), info_(info) {}

  const Device& on_device(const Driver& driver, int id) {
    if (id < 0 || id >= kMaxDevices) {
      TVM_FFI_THROW(ValueError) << "device id must be in [0, " << kMaxDevices << "), got " << id;
    }
    Device& device = devices_[id];
    if (!device.ready.load(std::memory_order_acquire)) prepare(driver, device, id);
    return device;
  }

  CUfunction kernel(int index) const { return reinterpret_cast<CUfunction>(kernels_[index]); }
  const char* name(int index) const { return info_[index].name; }

 private:
  static constexpr int kMaxDevices = 64;

  [[gnu::cold, gnu::noinline]] void prepare(const Driver& driver, Device& device, int id) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (device.ready.load(std::memory_order_relaxed)) return;
    driver.check(driver.device_get(&device.device, id), "cuDeviceGet");
    int major = 0, minor = 0;
    driver.check(driver.device_get_attribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device.device),
                 "cuDeviceGetAttribute");
    driver.check(driver.device_get_attribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device.device),
                 "cuDeviceGetAttribute");
    // Machine code runs on its compute capability and, unless it uses what is specific to it, on later minor ones.
    const bool runs = TILEMLA_SM_EXACT ? major * 10 + minor == TILEMLA_SM
                                       : major == TILEMLA_SM / 10 && minor >= TILEMLA_SM % 10;
    if (!runs) {
      TVM_FFI_THROW(NotImplementedError) << "this module is built for compute capability " << TILEMLA_SM / 10 << "."
                                         << TILEMLA_SM % 10 << (TILEMLA_SM_EXACT ? "" : " and later minor ones")
                                         << ", but cuda:" << id << " has " << major << "." << minor;
    }
    driver.check(driver.primary_ctx_retain(&device.primary, device.device), "cuDevicePrimaryCtxRetain");
    ContextGuard guard(driver, device.primary, device.device);
    if (!library_) {
      CUlibrary library = nullptr;
      driver.check(driver.library_load_data(&library, image_, nullptr, nullptr, 0, nullptr, nullptr, 0),
                   "cuLibraryLoadData");
      for (int i = 0; i < kNumKernels; ++i) {
        driver.check(driver.library_get_kernel(&kernels_[i], library, info_[i].name), "cuLibraryGetKernel",
                     info_[i].name);
      }
      library_ = library;
    }
    for (int i = 0; i < kNumKernels; ++i) {
      CUfunction loaded_now_rather_than_during_a_capture;
      driver.check(driver.kernel_get_function(&loaded_now_rather_than_during_a_capture, kernels_[i]),
                   "cuKernelGetFunction", info_[i].name);
      if (info_[i].dynamic_smem_bytes > 0) {
        driver.check(driver.kernel_set_attribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                                 info_[i].dynamic_smem_bytes, kernels_[i], device.device),
                     "cuKernelSetAttribute (dynamic shared memory)", info_[i].name);
      }
      if (info_[i].large_cluster) {
        driver.check(driver.kernel_set_attribute(CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1, kernels_[i],
                                                 device.device),
                     "cuKernelSetAttribute (cluster size)", info_[i].name);
      }
    }
    device.ready.store(true, std::memory_order_release);
  }

  const unsigned char* image_;
  const KernelInfo (&info_)[kNumKernels];
  CUlibrary library_ = nullptr;
  CUkernel kernels_[kNumKernels] = {};
  std::mutex mutex_;
  Device devices_[kMaxDevices];
};

TILEMLA_COLD void bad_tma_stride(Where where, int64_t received) {
  TVM_FFI_THROW(ValueError) << where.program << ": argument " << where.argument
                            << " must have strides that are positive multiples of 16 bytes (TMA), got one of "
                            << received << " bytes";
  __builtin_unreachable();
}

// Encode a tiled tensor map. strides[0] is the element size, as in TileLang's host IR. An empty tensor is never loaded
// from, and the stride of a dimension of one is never used: both get values that the driver accepts.
template <int kRank>
static inline void encode_tensor_map(const Driver& driver, CUtensorMap* map, Where where, CUtensorMapDataType dtype,
                                     void* data, bool empty, const cuuint64_t (&shape)[kRank],
                                     const int64_t (&strides_bytes)[kRank], const cuuint32_t (&box)[kRank],
                                     const cuuint32_t (&element_strides)[kRank], CUtensorMapInterleave interleave,
                                     CUtensorMapSwizzle swizzle, CUtensorMapL2promotion l2_promotion,
                                     CUtensorMapFloatOOBfill oob_fill) {
  cuuint64_t dims[kRank];
  cuuint64_t strides[kRank];
  cuuint64_t compact = strides_bytes[0];
  for (int i = 0; i < kRank; ++i) {
    dims[i] = shape[i] ? shape[i] : 1;
    if (i > 0) {
      const bool unused = empty || dims[i] == 1;
      if (!unused && (strides_bytes[i] <= 0 || strides_bytes[i] % 16)) bad_tma_stride(where, strides_bytes[i]);
      strides[i] = unused ? (compact + 15) / 16 * 16 : strides_bytes[i];
      compact = strides[i];
    }
    compact *= dims[i];
  }
  void* address = empty ? map : data;  // aligned, not null, never read through
  driver.check(driver.tensor_map_encode_tiled(map, dtype, kRank, address, dims, strides + 1, box, element_strides,
                                              interleave, swizzle, l2_promotion, oob_fill),
               "cuTensorMapEncodeTiled", where.argument);
}

TILEMLA_COLD void bad_grid(const char* kernel, const int64_t* grid) {
  TVM_FFI_THROW(ValueError) << "kernel " << kernel << " must have a grid within (2147483647, 65535, 65535), got "
                            << show(grid, 3);
  __builtin_unreachable();
}

// Held while the kernels of one call are enqueued, so that another thread's calls on the stream come before or after them.
static inline std::mutex& turn_of(CUstream stream) {
  static std::mutex turns[64];  // streams may share one: it is held for microseconds
  const uintptr_t address = reinterpret_cast<uintptr_t>(stream);
  return turns[(address >> 4 ^ address >> 10 ^ address >> 16) % 64];
}

struct Dim3 {
  int64_t x, y, z;
};

static inline void launch(const Driver& driver, CUfunction kernel, const char* name, CUstream stream, Dim3 grid,
                          Dim3 block, Dim3 cluster, unsigned dynamic_smem_bytes, bool programmatic, void** params) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (grid.x < 0 || grid.y < 0 || grid.z < 0 || grid.x > 2147483647 || grid.y > 65535 || grid.z > 65535) {
    const int64_t received[] = {grid.x, grid.y, grid.z};
    bad_grid(name, received);
  }
  CUlaunchAttribute attributes[2];
  CUlaunchConfig config{};
  config.gridDimX = static_cast<unsigned>(grid.x);
  config.gridDimY = static_cast<unsigned>(grid.y);
  config.gridDimZ = static_cast<unsigned>(grid.z);
  config.blockDimX = static_cast<unsigned>(block.x);
  config.blockDimY = static_cast<unsigned>(block.y);
  config.blockDimZ = static_cast<unsigned>(block.z);
  config.sharedMemBytes = dynamic_smem_bytes;
  config.hStream = stream;
  config.attrs = attributes;
  if (programmatic) {
    CUlaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attribute.value.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster.x * cluster.y * cluster.z > 1) {
    CUlaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    attribute.value.clusterDim.x = static_cast<unsigned>(cluster.x);
    attribute.value.clusterDim.y = static_cast<unsigned>(cluster.y);
    attribute.value.clusterDim.z = static_cast<unsigned>(cluster.z);
  }
  driver.check(driver.launch_kernel_ex(&config, kernel, params, nullptr), "cuLaunchKernelEx", name);
}

}  // namespace tilemla
