"""How many CTAs fit on a streaming multiprocessor: by hand, and beside NVIDIA's own calculator."""

import random
import subprocess

import pytest

from tilemla.errors import ToolchainError
from tilemla.manifest import KernelReport
from tilemla.occupancy import SM_LIMITS, occupancy_of
from tilemla.spec import SUPPORTED_SPECS
from tilemla.toolchain import find_cuda_toolkit, find_cxx


def kernel_of(threads, registers, smem_static_bytes=0, smem_dynamic_bytes=0):
    return KernelReport("kernel", "program", registers, 0, 0, 0, smem_static_bytes, smem_dynamic_bytes, threads)


@pytest.mark.parametrize(
    "kernel, ctas, warps, limited_by",
    [
        (kernel_of(32, 16), 32, 32, ("CTAs",)),
        (kernel_of(1024, 32), 2, 64, ("registers", "warps")),
        (kernel_of(1024, 64), 1, 32, ("registers",)),
        (kernel_of(1024, 65), 0, 0, ("registers",)),  # does not fit at all
        (kernel_of(288, 89), 2, 18, ("registers",)),
        (kernel_of(128, 16, 0, 232448), 1, 4, ("shared memory",)),  # all of it, with the kilobyte that is reserved
        (kernel_of(128, 16, 1, 232448), 0, 0, ("shared memory",)),
        (kernel_of(33, 16, 49152, 0), 4, 8, ("shared memory",)),
    ],
)
def test_occupancy(kernel, ctas, warps, limited_by):
    found = occupancy_of(kernel, "sm_90a")
    assert (found.ctas_per_sm, found.warps_per_sm, found.limited_by) == (ctas, warps, limited_by)


def test_occupancy_of_what_is_not_known():
    with pytest.raises(ValueError, match="arch must be one of sm_90a, .*, got 'sm_70'"):
        occupancy_of(kernel_of(32, 16), "sm_70")
    with pytest.raises(ValueError, match="kernel: threads must be 1 or more, got 0"):
        occupancy_of(kernel_of(0, 16), "sm_90a")


NVIDIA_CALCULATOR = r"""
#include <cstdio>
#include <cuda_occupancy.h>

int main() {
  cudaOccDeviceProp device;
  int smem_kb;
  // compute capability, threads and shared memory (KiB) of a multiprocessor
  if (scanf("%d %d %d %d", &device.computeMajor, &device.computeMinor, &device.maxThreadsPerMultiprocessor,
            &smem_kb) != 4) return 1;
  device.maxThreadsPerBlock = 1024;
  device.regsPerBlock = device.regsPerMultiprocessor = 65536;
  device.warpSize = 32;
  device.sharedMemPerBlock = 49152;
  device.sharedMemPerBlockOptin = (smem_kb - 1) * 1024;
  device.sharedMemPerMultiprocessor = smem_kb * 1024;
  device.reservedSharedMemPerBlock = 1024;
  device.numSms = 132;
  cudaOccDeviceState state;
  state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
  int threads, registers, smem_static, smem_dynamic;
  while (scanf("%d %d %d %d", &threads, &registers, &smem_static, &smem_dynamic) == 4) {
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024;
    kernel.numRegs = registers;
    kernel.sharedSizeBytes = smem_static;
    kernel.maxDynamicSharedSizeBytes = device.sharedMemPerBlockOptin;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, smem_dynamic)) return 1;
    printf("%d %u\n", result.activeBlocksPerMultiprocessor, result.limitingFactors);
  }
}
"""


# Threads and KiB of shared memory of a multiprocessor: "Technical Specifications per Compute Capability".
DEVICES = {
    "sm_80": (8, 0, 2048, 164),
    "sm_89": (8, 9, 1536, 100),
    "sm_90a": (9, 0, 2048, 228),
    "sm_100": (10, 0, 2048, 228),
    "sm_120": (12, 0, 1536, 100),
}


def test_occupancy_is_what_nvidia_computes(tmp_path, seed):
    """The toolkit's own calculator, which needs no GPU."""
    try:
        folders = find_cuda_toolkit().include_dirs
    except ToolchainError:
        pytest.skip("needs the CUDA headers")
    if not any((folder / "cuda_occupancy.h").is_file() for folder in folders):
        pytest.skip("needs cuda_occupancy.h")
    (tmp_path / "calculator.cc").write_text(NVIDIA_CALCULATOR)
    includes = [f"-I{folder}" for folder in folders]
    subprocess.run([find_cxx(), *includes, "calculator.cc", "-o", "calculator"], cwd=tmp_path, check=True)
    numbers = random.Random(seed)
    flags = {"warps": 1, "registers": 2, "shared memory": 4, "CTAs": 8}
    for arch, device in DEVICES.items():
        kernels = [
            kernel_of(
                numbers.choice((1, 32, 64, 96, 128, 160, 256, 288, 384, 512, 1024, numbers.randint(1, 1024))),
                numbers.randint(1, 255),
                numbers.choice((0, 16, numbers.randint(0, 49152))),
                numbers.choice((0, numbers.randint(0, (device[-1] - 49) * 1024))),
            )
            for _ in range(2000)
        ]
        fields = [(each.threads, each.registers, each.smem_static_bytes, each.smem_dynamic_bytes) for each in kernels]
        given = "".join(" ".join(map(str, row)) + "\n" for row in (device, *fields))
        done = subprocess.run([tmp_path / "calculator"], input=given, capture_output=True, text=True, check=True)
        for kernel, line in zip(kernels, done.stdout.splitlines(), strict=True):
            found = occupancy_of(kernel, arch)
            limiting = sum(flags[name] for name in found.limited_by)
            assert line == f"{found.ctas_per_sm} {limiting}", (arch, kernel)


def test_every_gpu_architecture_has_limits():
    assert set(SM_LIMITS) == {spec.arch for spec in SUPPORTED_SPECS} - {"cpu"}
