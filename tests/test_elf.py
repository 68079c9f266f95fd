"""What a library needs of a machine is read from it, and what is not known is not guessed."""

import re
import subprocess

import pytest

from tilemla.codegen.elf import needed_libraries, requirements_of
from tilemla.codegen.errors import BuildError
from tilemla.loader import ensure_module
from tilemla.spec import KernelSpec
from tilemla.toolchain import find_cxx


def test_requirements_are_those_in_the_library():
    """Beside another way of reading them: the names of versions are text in the file."""
    entry = ensure_module(KernelSpec(arch="cpu")).entry
    data, requires = entry.library.read_bytes(), entry.manifest.requires
    for prefix, version in (("GLIBC", requires.glibc), ("GLIBCXX", requires.libstdcxx)):
        found = {match.decode() for match in re.findall(rb"\0%b_([\d.]+)(?=\0)" % prefix.encode(), data)}
        assert version == max(found, key=lambda text: tuple(map(int, text.split("."))))
    assert requirements_of(entry.library) == (requires.glibc, requires.libstdcxx)
    needed = needed_libraries(entry.library)
    assert {"libtvm_ffi.so", "libstdc++.so.6", "libc.so.6"} <= set(needed)
    assert not any("cuda" in name or "torch" in name or "tvm_runtime" in name for name in needed)


def library_that_needs(version, folder):
    """A library that needs one symbol of a given version, and nothing else."""
    (folder / "map").write_text(f"{version} {{ global: symbol; }};\n")
    (folder / "provider.c").write_text("void symbol(void) {}\n")
    (folder / "user.c").write_text("void symbol(void);\nvoid user(void) { symbol(); }\n")
    bare = [str(find_cxx()), "-x", "c", "-shared", "-fPIC", "-nostdlib"]
    provider = ["provider.c", "-Wl,--version-script=map", "-Wl,-soname,libprovider.so", "-o", "libprovider.so"]
    subprocess.run([*bare, *provider], cwd=folder, check=True)
    subprocess.run([*bare, "user.c", "-L.", "-lprovider", "-o", "user.so"], cwd=folder, check=True)
    return folder / "user.so"


@pytest.mark.parametrize(
    "version, expected",
    [
        ("GLIBC_2.2.5", ("2.2.5", "")),
        ("GLIBC_ABI_DT_RELR", ("2.36", "")),
        ("GLIBCXX_3.4.9", ("", "3.4.9")),
        ("CXXABI_1.3.15", ("", "3.4.33")),
        ("GCC_3.0", ("", "")),
    ],
)
def test_requirements_by_version_name(tmp_path, version, expected):
    library = library_that_needs(version, tmp_path)
    assert requirements_of(library) == expected
    assert needed_libraries(library) == ("libprovider.so",)


@pytest.mark.parametrize("version", ["CXXABI_9.9", "GLIBC_PRIVATE", "GLIBCXX_LDBL_3.4"])
def test_requirement_that_is_not_known(tmp_path, version):
    """Better no module than one that is said to run where it does not."""
    with pytest.raises(BuildError, match=f"user.so: needs {version}, and which .* has it is not known"):
        requirements_of(library_that_needs(version, tmp_path))


def test_requirements_of_no_library(tmp_path):
    (tmp_path / "text.so").write_text("text")
    with pytest.raises(BuildError, match="text.so: not an ELF file"):
        requirements_of(tmp_path / "text.so")
