"""Python environments that hold what a test chooses and nothing else, made without a download.

What is linked into them is installed where the tests run; wheels are installed by that interpreter's pip. So
`import tilelang` fails there as it does on a machine that never had it.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("runtime", "dsl", "codegen", "tuning_logs", "pyproject.toml", "README.md", "LICENSE")


@dataclasses.dataclass(frozen=True)
class Environment:
    """An environment of its own; `home` is where its processes run and keep what they keep."""

    folder: Path
    home: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        return next((self.folder / "lib").glob("python*")) / "site-packages"

    @property
    def cache_dir(self) -> Path:
        """Where its processes would keep modules; nothing makes it but them."""
        return self.home / "cache"

    def run(self, *words, **variables):
        """Run its interpreter with no program in PATH and none of this process's settings."""
        settings = {"PATH": str(self.home / "no-programs"), "HOME": str(self.home), "LANG": "C.UTF-8"}
        settings |= {"TILEMLA_BUILD": "never", "TILEMLA_CACHE_DIR": str(self.cache_dir), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [self.python, *words],
            cwd=self.home,
            env=settings | variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    def run_script(self, script, *arguments, **variables):
        """Run a script and return the JSON document that it prints."""
        done = self.run("-c", script, *map(str, arguments), **variables)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def install(self, *wheels):
        """Install wheels; what they require must be here already."""
        pip("--python", self.python, "install", "--quiet", "--no-index", *wheels)

    def uninstall(self, *distributions):
        # A linked distribution's files are those of the environment that runs the tests.
        for name in distributions:
            found = next(self.site_packages.glob(f"{name.replace('-', '_')}-*.dist-info"))
            assert not found.is_symlink(), f"{name} is linked"
        pip("--python", self.python, "uninstall", "--quiet", "--yes", *distributions)

    def listing(self):
        """Relative paths of everything in its site-packages, links not followed."""
        found = []
        for folder, folders, files in os.walk(self.site_packages):
            found += [str((Path(folder) / name).relative_to(self.site_packages)) for name in (*folders, *files)]
        return sorted(found)


def pip(*words):
    """Run this interpreter's pip without its configuration and without an index."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("needs pip")
    settings = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    settings |= {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}
    command = [sys.executable, "-m", "pip", *map(str, words)]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def make_environment(folder, requirements: Iterable[str] = ()):
    """Make an environment with the installed distributions that meet some requirements, and what those require."""
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
    environment = Environment(Path(folder), Path(folder) / "home")
    (environment.home / "no-programs").mkdir(parents=True)
    for distribution in closure_of(requirements):
        for name in top_level_names(distribution):
            link = environment.site_packages / name
            if not link.exists():  # wheels of one namespace share a folder
                link.symlink_to(Path(distribution.locate_file(name)).resolve())
    return environment


def closure_of(requirements):
    """The installed distributions that some requirements and, through them, others ask for."""
    found = {}
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        extras = requirement.extras or {""}
        marker = requirement.marker
        if marker is not None and not any(
            marker.evaluate(default_environment() | {"extra": extra}) for extra in extras
        ):
            continue
        name = canonicalize_name(requirement.name)
        if name in found:
            continue
        found[name] = distribution = importlib.metadata.distribution(name)
        assert requirement.specifier.contains(distribution.version, prereleases=True), requirement
        waiting += map(Requirement, distribution.requires or ())
    return found.values()


def top_level_names(distribution):
    """Files and folders that a distribution has in site-packages, its metadata among them."""
    names = {path.parts[0] for path in distribution.files or ()} - {"..", "__pycache__"}
    assert names, f"{distribution.metadata['Name']} does not say which files it has"
    return sorted(name for name in names if not name.endswith(".pth"))


def build_base_wheel(folder):
    """Build the wheel of tilemla as it is in the checkout, without touching the checkout."""
    copy = Path(folder) / "checkout"
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            copy.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy)
    wheels = Path(folder) / "wheels"
    pip("wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", wheels, copy)
    return next(wheels.glob("tilemla-*.whl"))


def requirements_of_wheel(wheel):
    """What a wheel's metadata requires, without its extras."""
    (found,) = importlib.metadata.MetadataPathFinder().find_distributions(
        importlib.metadata.DistributionFinder.Context(path=[str(wheel)])
    )
    parsed = map(Requirement, found.requires or ())
    return [str(each) for each in parsed if each.marker is None or each.marker.evaluate({"extra": ""})]
