"""Reads the machine code of a cubin: its loops and what they are made of."""

import re
import subprocess
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);", re.MULTILINE)


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str
    operands: str


def disassemble(cubin: bytes, folder: Path) -> list[Instruction]:
    """The instructions of a cubin that holds one kernel (or the first of several)."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    command = [_tool("cuobjdump"), "-sass", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [Instruction(int(a, 16), opcode, rest) for a, opcode, rest in _INSTRUCTION.findall(done.stdout)]


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The instructions between a backward branch's target and the branch, innermost loops included."""
    found = []
    for branch in code:
        target = re.search(r"0x([0-9a-f]+)", branch.operands) if branch.opcode.startswith("BRA") else None
        if target and int(target[1], 16) < branch.address:
            begin = int(target[1], 16)
            found.append([i for i in code if begin <= i.address <= branch.address])
    return found


def opcodes(code: list[Instruction]) -> Counter[str]:
    return Counter(instruction.opcode.split(".")[0] for instruction in code)


def _tool(name: str) -> str:
    packages = Path(sysconfig.get_paths()["purelib"])
    return str(next(packages.glob(f"nvidia/cu*/bin/{name}"), name))
