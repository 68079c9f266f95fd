"""Stand-ins of real kinds: a driver library that can be told what to answer, and modules that are never opened."""

import os
import subprocess

from tilemla import __version__, toolchain
from tilemla.config import DEFAULT_CONFIG
from tilemla.fingerprint import source_fingerprint
from tilemla.manifest import Manifest, Requirements, manifest_path, sha256_of

ANY_MACHINE = Requirements()

# What it answers comes from the environment, so that one library serves every case. cuInit leaves a mark.
_DRIVER = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static int number(const char* name, int otherwise) { return getenv(name) ? atoi(getenv(name)) : otherwise; }
int cuDriverGetVersion(int* version) {
  *version = number("FAKE_VERSION", 13000);
  return number("FAKE_VERSION_ERROR", 0);
}
int cuInit(unsigned flags) {
  if (getenv("FAKE_MARK")) {
    FILE* mark = fopen(getenv("FAKE_MARK"), "w");
    fprintf(mark, "%d %s", getpid(), getenv("CUDA_VISIBLE_DEVICES") ? getenv("CUDA_VISIBLE_DEVICES") : "unset");
    fclose(mark);
  }
  if (getenv("FAKE_CRASH")) abort();
  if (getenv("FAKE_HANG")) sleep(60);
  return number("FAKE_INIT_ERROR", 0);
}
int cuDeviceGetCount(int* count) { *count = number("FAKE_GPUS", 2); return 0; }
int cuDeviceGet(int* device, int index) { *device = index; return 0; }
int cuDeviceGetName(char* name, int size, int device) { snprintf(name, size, "Fake GPU %d", device); return 0; }
int cuDeviceTotalMem_v2(size_t* bytes, int device) { *bytes = 80ull << 30; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  if (attribute == 16) *value = 132 - device;
  else if (attribute == 75) *value = number("FAKE_MAJOR", 9);
  else if (attribute == 76) *value = 0;
  else return 1;
  return 0;
}
int cuGetErrorName(int error, const char** name) {
  *name = error == 803 ? "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH" : 0;
  return *name ? 0 : 1;
}
int cuGetErrorString(int error, const char** text) {
  *text = error == 803 ? "system has unsupported display driver / cuda driver combination" : 0;
  return *text ? 0 : 1;
}
"""


def compile_library(folder, name, source, *options):
    """A shared library of that file name and soname in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [toolchain.find_cxx(), "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", folder / name, *options]
    subprocess.run([*command, "-x", "c", "-"], input=source, text=True, check=True)
    return folder


def make_driver(folder):
    """A folder for LD_LIBRARY_PATH with a ``libcuda.so.1`` that has two GPUs like an H100."""
    return compile_library(folder, "libcuda.so.1", _DRIVER)


def make_entry(store, spec, *, requires=ANY_MACHINE, version=__version__, age_s=0):
    """An entry of a store that checks: real files with real hashes, in which the library is no library."""
    directory = store / spec.name
    directory.mkdir(parents=True)
    library = directory / f"{spec.name}.so"
    library.write_bytes(b"no library " * 100)
    manifest = Manifest(
        name=spec.name,
        spec=spec.to_dict(),
        config=DEFAULT_CONFIG.to_dict(),
        library=library.name,
        sha256=sha256_of(library),
        fingerprint=source_fingerprint(),
        programs=spec.programs,
        files={},
        kernels=(),
        tools={"tilelang": "0.1.15", "g++": "12.2.0"},
        flags={},
        requires=requires,
        tilemla_version=version,
    )
    path = manifest_path(directory, spec.name)
    path.write_text(manifest.to_json())
    made = path.stat().st_mtime - age_s
    os.utime(path, (made, made))
    return directory
