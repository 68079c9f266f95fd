"""What is installed, what an import costs, and that no room reaches into another."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

import tilemla

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_lazy():
    heavy = run(
        "import sys, tilemla, tilemla.spec; "
        "print([name for name in ('torch', 'numpy', 'tvm_ffi', 'tilelang', 'tvm', 'z3') if name in sys.modules])"
    )
    assert heavy == "[]"


def test_public_names():
    assert tilemla.__version__ == PYPROJECT["project"]["version"]
    for name in tilemla.__all__:
        assert getattr(tilemla, name) is not None
        assert name in dir(tilemla)
    with pytest.raises(AttributeError, match="has no attribute 'flash_mla'"):
        tilemla.flash_mla  # noqa: B018


def test_no_stray_top_level_modules():
    found = run(
        "import importlib.util as u; "
        "print([name for name in ('runtime', 'dsl', 'codegen', 'tuning_logs') if u.find_spec(name)])"
    )
    assert found == "[]"


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"tilemla.{alias.name}" for alias in node.names) if node.module == "tilemla" else [node.module]


# What the runtime imports where it is used, and says how to install.
OPTIONAL = {"packaging", "matplotlib"}
# What a room may import, beside the standard library and itself.
ROOMS = {
    "runtime": {"torch", "numpy", "tvm_ffi", "filelock", "platformdirs", "click", "rich", *OPTIONAL},
    "dsl": {"tilelang"},
    "codegen": {"tilelang", "tvm", "tvm_ffi", "numpy", "elftools"},
    "tuning_logs": set(),
}
TILEMLA_ROOMS = {
    "runtime": set(),
    "dsl": {"tilemla.spec", "tilemla.config", "tilemla.kv_formats", "tilemla.dsl"},
    "codegen": {
        "tilemla.dsl",
        "tilemla.codegen",
        "tilemla.spec",
        "tilemla.config",
        "tilemla.manifest",
        "tilemla.fingerprint",
        "tilemla.store",
        "tilemla.toolchain",
        "tilemla.errors",
        "tilemla.generate",
        "tilemla.__version__",
    },
    "tuning_logs": set(),
}


@pytest.mark.parametrize("room", ROOMS)
def test_room_imports(room):
    for path in (ROOT / room).rglob("*.py"):
        for name in imports_of(path):
            top = name.partition(".")[0]
            if top == "tilemla" and room == "runtime":
                assert not name.startswith(("tilemla.dsl", "tilemla.codegen")), f"{path} imports {name}"
            elif top == "tilemla":
                allowed = TILEMLA_ROOMS[room]
                assert any(name == door or name.startswith(door + ".") for door in allowed), f"{path} imports {name}"
            else:
                assert top in sys.stdlib_module_names or top in ROOMS[room], f"{path} imports {name}"


@pytest.mark.parametrize("module", ["spec", "config", "costs", "kv_formats"])
def test_words_that_rooms_share_are_standard_library_only(module):
    for name in imports_of(ROOT / "runtime" / f"{module}.py"):
        assert name.partition(".")[0] in sys.stdlib_module_names or name == "tilemla.spec"


def test_environment_is_read_in_one_file():
    readers = [
        path.relative_to(ROOT).as_posix()
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        if any(word in path.read_text() for word in ("os.environ", "getenv"))
    ]
    assert readers == ["runtime/env.py"]


def test_every_package_is_listed():
    """Setuptools takes what is listed and nothing else: a folder that is forgotten works in a checkout alone."""
    setuptools = PYPROJECT["tool"]["setuptools"]
    import_name = {room: name for name, room in setuptools["package-dir"].items() if room in ROOMS}
    assert set(import_name) == set(ROOMS)
    folders = {path.parent.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    packages = {".".join((import_name[folder.parts[0]], *folder.parts[1:])) for folder in folders}
    assert packages == set(setuptools["packages"])
    assert all((ROOT / folder / "__init__.py").is_file() for folder in folders)
