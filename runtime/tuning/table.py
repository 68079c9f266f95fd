"""The table of what was chosen for one kernel on one GPU: JSON beside the log that it was chosen by."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tilemla.config import KernelConfig
from tilemla.costs import SHAPE_CLASSES, ScheduleCosts
from tilemla.spec import KernelSpec

TABLE_FORMAT = 1


class TableError(ValueError):
    """A file that is no table; says which, and what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Why something was chosen, or why the default stays.

    Parameters
    ----------
    best : str
        What did best of all that was tried, whether chosen or not.
    over_default : float
        Geometric mean of the default's time over its time: above 1, it was faster.
    margin : float
        How much of that noise explains: it had to be above ``1 + margin``.
    worst : float
        The ratio of the case that it does worst in.
    num_cases : int
        Cases that were measured.
    lines : str
        Lines of the log with its times and the default's, such as ``"1-14,29"``.
    """

    best: str
    over_default: float
    margin: float
    worst: float
    num_cases: int
    lines: str


@dataclasses.dataclass(frozen=True)
class Choice:
    """Costs for one class of shapes; None stays with the formula."""

    costs: ScheduleCosts | None
    evidence: Evidence


@dataclasses.dataclass(frozen=True)
class Table:
    """What was chosen for one kernel on one GPU.

    Parameters
    ----------
    spec : KernelSpec
        The kernel.
    gpu : str
        The GPU's name, as the driver gives it.
    log : str
        File name of the log, beside the table.
    date : str
        Of the newest measurement that it was chosen by, ISO 8601.
    versions : dict of str to str or None
        What it was measured with.
    config : KernelConfig
        What modules are tuned by.
    config_evidence : Evidence or None
        None where no other configuration was measured.
    costs : dict of str to Choice
        What schedules are made with, by class of shapes.
    """

    spec: KernelSpec
    gpu: str
    log: str
    date: str
    versions: dict[str, str | None]
    config: KernelConfig
    config_evidence: Evidence | None
    costs: dict[str, Choice]

    @property
    def chosen_costs(self) -> dict[str, ScheduleCosts]:
        """The costs that replace the formula's, by class of shapes."""
        return {name: choice.costs for name, choice in self.costs.items() if choice.costs is not None}

    def to_json(self) -> str:
        """The table as indented JSON with a final newline."""
        fields = {
            "format": TABLE_FORMAT,
            "spec": self.spec.to_dict(),
            "gpu": self.gpu,
            "log": self.log,
            "date": self.date,
            "versions": self.versions,
            "config": self.config.to_dict(),
            "config_evidence": self.config_evidence and dataclasses.asdict(self.config_evidence),
            "costs": {
                name: {
                    "costs": choice.costs and choice.costs._asdict(),
                    "evidence": dataclasses.asdict(choice.evidence),
                }
                for name, choice in self.costs.items()
            },
        }
        return json.dumps(fields, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Table:
        """Parse what ``to_json`` wrote.

        Raises
        ------
        TableError
            On anything else, with what is wrong; ``where`` names it in the message.
        """
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise TableError(f"{where}: not JSON: {error}") from error
        try:
            return _parse(fields)
        except KeyError as error:
            raise TableError(f"{where}: the field {error} is missing") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise TableError(f"{where}: {error}") from error


def _parse(fields: Any) -> Table:
    if not isinstance(fields, dict):
        raise ValueError(f"a table must be an object, got {type(fields).__name__}")
    if fields.get("format") != TABLE_FORMAT:
        raise ValueError(f"expected table format {TABLE_FORMAT}, got {fields.get('format')!r}: tune anew")
    unknown = set(fields) - {field.name for field in dataclasses.fields(Table)} - {"format"}
    if unknown:
        raise ValueError(f"a table has no field {', '.join(sorted(unknown))}")
    spec = KernelSpec.from_dict(fields["spec"])
    config = KernelConfig.from_dict(fields["config"])
    reason = config.why_invalid(spec)
    if reason is not None:
        raise ValueError(f"config: {reason}")
    return Table(
        spec=spec,
        gpu=_text(fields, "gpu"),
        log=_text(fields, "log"),
        date=_text(fields, "date"),
        versions=dict(fields["versions"]),
        config=config,
        config_evidence=None if fields["config_evidence"] is None else Evidence(**fields["config_evidence"]),
        costs={name: _parse_choice(name, choice) for name, choice in fields["costs"].items()},
    )


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, got {value!r}")
    return value


def _parse_choice(name: str, fields: Mapping[str, Any]) -> Choice:
    if name not in SHAPE_CLASSES:
        raise ValueError(f"costs: a class must be one of {', '.join(SHAPE_CLASSES)}, got {name!r}")
    costs = None if fields["costs"] is None else ScheduleCosts.from_dict(fields["costs"])
    reason = None if costs is None else costs.why_invalid()
    if reason is not None:
        raise ValueError(f"costs of {name}: {reason}")
    return Choice(costs, Evidence(**fields["evidence"]))


def gpu_slug(name: str) -> str:
    """How files of a GPU are called: ``"NVIDIA H100 80GB HBM3"`` is ``h100``, ``"NVIDIA H100 PCIe"`` is ``h100_pcie``.

    Maker and memory are left out; the form of a product, which decides its clocks and bandwidth, is not.
    """
    words = [word for word in name.lower().replace("/", " ").split() if word != "nvidia"]
    kept = [word for word in words if not word.endswith("gb") and not word.startswith("hbm")]
    return "_".join(kept or words)


def log_path(folder: Path, spec: KernelSpec, gpu: str) -> Path:
    """The log of a kernel's trials on a GPU."""
    return folder / spec.name / f"{gpu_slug(gpu)}.jsonl"


def table_path(folder: Path, spec: KernelSpec, gpu: str) -> Path:
    """The table of what was chosen for a kernel on a GPU."""
    return folder / spec.name / f"{gpu_slug(gpu)}.json"


def read_table(path: Path) -> Table:
    """Read a table.

    Raises
    ------
    TableError
        When the file cannot be read or is no table, or lies where another kernel's is looked for.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TableError(f"{path}: cannot be read: {error}") from error
    table = Table.from_json(text, str(path))
    if table_path(path.parent.parent, table.spec, table.gpu).parts[-2:] != path.parts[-2:]:
        raise TableError(f"{path}: it holds what was chosen for {table.spec.name} on {table.gpu}")
    return table


def write_table(path: Path, table: Table) -> None:
    """Write a table: whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(table.to_json())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
