"""Read what ``ptxas -v`` reports and refuse kernels that are not good enough."""

from __future__ import annotations

import dataclasses
import re

from tilemla.codegen.errors import BuildError

_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_PROPERTIES = re.compile(r"Function properties for (\S+)")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SMEM = re.compile(r"(\d+) bytes smem")
# C75xx and C76xx say that wgmma was serialised, that a register budget was ignored, and the like.
_LOSS = re.compile(r"\(C7[56]\d\d\)|Potential Performance Loss")


@dataclasses.dataclass
class PtxasUsage:
    """Resources of one function, per thread in bytes and registers; ``smem_bytes`` is static shared memory of a CTA."""

    name: str
    is_entry: bool
    registers: int = 0
    stack_bytes: int = 0
    spill_store_bytes: int = 0
    spill_load_bytes: int = 0
    smem_bytes: int = 0


def parse_ptxas(text: str) -> tuple[list[PtxasUsage], list[str]]:
    """Parse the output of ``ptxas -v``.

    Returns
    -------
    usages : list of PtxasUsage
        Every function that was compiled, in order.
    losses : list of str
        The lines that report a loss of performance.
    """
    usages: dict[str, PtxasUsage] = {}
    entry: PtxasUsage | None = None
    current: PtxasUsage | None = None
    losses = []
    for line in text.splitlines():
        if _LOSS.search(line):
            losses.append(line.strip())
        if match := _ENTRY.search(line):
            entry = current = usages.setdefault(match[1], PtxasUsage(match[1], is_entry=True))
        elif match := _PROPERTIES.search(line):
            current = usages.setdefault(match[1], PtxasUsage(match[1], is_entry=False))
        elif (match := _STACK.search(line)) and current is not None:
            current.stack_bytes, current.spill_store_bytes, current.spill_load_bytes = map(int, match.groups())
        elif (match := _REGISTERS.search(line)) and entry is not None:
            entry.registers = int(match[1])
            smem = _SMEM.search(line)
            entry.smem_bytes = int(smem[1]) if smem else 0
    return list(usages.values()), losses


def check_ptxas(program: str, usages: list[PtxasUsage], losses: list[str]) -> None:
    """Fail the build on a spill, a stack frame or a reported loss of performance.

    Raises
    ------
    BuildError
        Names each kernel and its numbers, or quotes the compiler.
    """
    problems = [
        f"{usage.name}: spills of {usage.spill_store_bytes} bytes stored and {usage.spill_load_bytes} loaded, "
        f"a stack frame of {usage.stack_bytes} bytes, {usage.registers} registers"
        for usage in usages
        if usage.stack_bytes or usage.spill_store_bytes or usage.spill_load_bytes
    ]
    problems += losses
    if problems:
        raise BuildError(f"{program}: ptxas compiled a kernel that is not good enough:\n  " + "\n  ".join(problems))
