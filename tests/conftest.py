"""What every test gets: a seed of its own, the devices of this machine, and a cache inside the checkout."""

import hashlib
import os
import signal
from pathlib import Path

import hypothesis
import pytest
import torch

from tilemla import env
from tilemla.store import cache_store, make_private
from tuned_tables import forget

ROOT = Path(__file__).resolve().parent.parent

# Modules that tests generate are kept beside the checkout's other caches, so that the next run finds them.
os.environ.setdefault("TILEMLA_CACHE_DIR", str(ROOT / ".cache" / "tilemla"))

# A shell's background job ignores interrupts, and with it the processes that tests start and interrupt would.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_COMMON = dict(
    deadline=None,  # the first example of a process may build a module
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile("default", max_examples=60, **_COMMON)
hypothesis.settings.register_profile("quick", max_examples=10, **_COMMON)
hypothesis.settings.register_profile("thorough", max_examples=1000, **(_COMMON | {"derandomize": False}))
hypothesis.settings.load_profile("default")


def has_sm90() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def pytest_collection_modifyitems(config, items):
    if "slow" not in config.option.markexpr:
        skip = pytest.mark.skip(reason="takes long: run with -m slow")
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(skip)
    if not has_sm90():
        skip = pytest.mark.skip(reason="needs a GPU of compute capability 9.0")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return torch.device(request.param, 0) if request.param == "cuda" else torch.device("cpu")


@pytest.fixture
def seed(request):
    """The same in every run and process, another for each test."""
    return int.from_bytes(hashlib.sha256(request.node.nodeid.encode()).digest()[:4], "little")


@pytest.fixture(autouse=True)
def seeded(seed):
    torch.manual_seed(seed)


@pytest.fixture
def tuning_dir(tmp_path, monkeypatch):
    """A folder of tables that is read here, and nothing remembered of others."""
    folder = tmp_path / "tuning"
    folder.mkdir()
    monkeypatch.setenv("TILEMLA_TUNING_DIR", str(folder))
    forget()
    yield folder
    forget()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, and nothing else that modules could come from."""
    for name in env.NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TILEMLA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("tilemla.wheel.installed_module_stores", list)
    return tmp_path / "cache"


@pytest.fixture
def store(cache):
    """The cache's store that CPU modules are looked for in here."""
    path = cache_store("cpu")
    make_private(path)
    return path


@pytest.fixture
def old_store(cache):
    """A store of another version."""
    path = cache / "0.0.9-cpu-tilelang0.1.14-apache-tvm-ffi0.1.12-g++12.2.0-0123456789abcdef"
    make_private(path)
    return path


@pytest.fixture
def serving_machine(cache, monkeypatch):
    """A machine whose cache is empty and where nothing is generated."""
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TILEMLA_BUILD", "never")
