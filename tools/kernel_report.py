"""What the Triton kernels compile to, without a GPU: registers, spills, instructions and bytes an element.

    python tools/kernel_report.py --capability 80 90 100

Kernels are compiled ahead of time, and the binary is taken apart with the tools that Triton brings. The bytes of the
eager baseline are what its operations read and write, forward and backward: those of
``torch.nn.functional.gumbel_softmax(hard=True)``, and for the norms the same formula in torch. The expected limit is
the slowest of what a kernel needs on the named card: moving the bytes; issuing the instructions; and each of the units
that execute them (the one for integers, comparisons and selections; that for float32 and integer multiplication; the
special functions). The baseline is taken to move its bytes at the card's full bandwidth. It is arithmetic, not a
measurement. A lane that has no element counts as one that does. A kernel with a loop is counted whole, so what stands
before and after the loop weighs on one step of it. What one kernel leaves for the next of 64 rows of 50,257 is 13 MB,
which the second-level cache of each card holds: what is read again or written over comes from there, at about twice the
memory's speed, and counts half (for the baseline, whose operations leave more than the cache holds, it does not).
Ragged rows are 50 long on average, and read again from the first-level cache.

The command fails if any kernel spills.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from prunegate.gumbel import kernels, norm_kernels
from prunegate.gumbel.norms import launch_warps, plain_norm
from prunegate.gumbel.triton import ELEMENTS, plan_rows

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Card(NamedTuple):
    """A card's limits, from its data sheet."""

    name: str
    bandwidth: float  # bytes a second
    processors: int
    clock: float  # cycles a second
    floats: int  # float32 operations a cycle and processor


CARDS = {
    80: Card("A100 80 GB", 2.04e12, 108, 1.41e9, 64),
    90: Card("H100 SXM", 3.35e12, 132, 1.83e9, 128),
    100: Card("B200", 8.0e12, 148, 1.85e9, 128),
}


# Which instructions run on which unit. Special functions include conversions but the fast one from integers.
UNITS = {
    "integer": r"(LOP|IADD|SHF|SHL|SHR|ISETP|FSETP|FSEL|SEL|IMNMX|VIMNMX|FMNMX|LEA|PRMT|PLOP|I2FP|VIADD|MOV\b|P2R|R2P)",
    "multiply": r"IMAD",
    "float": r"(FFMA|FMUL|FADD|IMAD)",
    "special": r"(MUFU|I2F\b|F2I|F2F|POPC|FLO)",
}


class Job(NamedTuple):
    """A kernel to compile: its name here, the kernel, its compile-time arguments, and its work."""

    name: str
    kernel: Any
    constants: dict[str, int | bool]
    elements: int
    moved: float  # bytes an element, read and written
    warps: int


class Binary(NamedTuple):
    """What was found in a binary."""

    registers: int
    spilled: int
    shared: int
    # Instructions an element: all, and those of each kind of unit.
    instructions: float
    integer: float
    multiply: float
    float_: float
    special: float


def jobs() -> list[Job]:
    """Forward and backward of each kind of rows, as the sampler launches them in float32."""
    found = []
    common: dict[str, int | bool] = {"POINTER": False, "FAST": True}
    plain, reinmax = {"DRAWS": 0, "REINMAX": False}, {"DRAWS": 0, "REINMAX": True}
    gates = {**common, "QUARTER": ELEMENTS // 4}
    found.append(Job("gates forward", kernels.gates_forward, {**gates, "HARD": True}, ELEMENTS, 8, 4))
    found.append(Job("gates backward", kernels.gates_backward, {**gates, **plain}, ELEMENTS, 12, 4))
    found.append(Job("reinmax gates backward", kernels.gates_backward, {**gates, **reinmax}, ELEMENTS, 12, 4))
    for columns in (4, 32, 1024, 4096):
        plan = plan_rows(columns)
        tile = {**common, "QUARTER": plan.quarter, "ROWS": plan.rows}
        real = columns * plan.rows
        name = f"rows of {columns}"
        found.append(Job(f"{name} forward", kernels.tile_forward, {**tile, "HARD": True}, real, 8, plan.warps))
        found.append(Job(f"{name} backward", kernels.tile_backward, {**tile, **plain}, real, 12, plan.warps))
    plan = plan_rows(50_257)
    block = {"QUARTER": plan.quarter}
    name, real = "64 rows of 50257", 50_257 // plan.parts
    found.append(Job(f"{name} forward", kernels.part_winners, {**block, "FAST": True}, real, 8, plan.warps))
    sums = {**block, **common, "GRADIENT": True}
    found.append(Job(f"{name} sums", kernels.part_sums, sums, real, 8 + 4 / 2, plan.warps))
    finish = {**block, "POINTER": False, "GRADIENT": True, "PARTS": 16}
    found.append(Job(f"{name} finish", kernels.part_finish, finish, real, 4 + 8 / 2, plan.warps))
    plan = plan_rows(50)
    ragged = {"QUARTER": plan.quarter, "ROWS": plan.rows, "FAST": True}
    real = 50 * plan.rows
    found.append(Job("ragged rows forward", kernels.ragged_winners, ragged, real, 8, plan.warps))
    sums = {**ragged, "POINTER": False, "GRADIENT": True}
    found.append(Job("ragged rows backward", kernels.ragged_sums, sums, real, 12, plan.warps))
    for columns in (384, 4096):
        constants = {"CENTRE": True, "HAS_WEIGHT": True, "WIDTH": 1 << (columns - 1).bit_length()}
        warps = launch_warps(columns)
        forward = {**constants, "HAS_BIAS": True}
        found.append(Job(f"masked norm of {columns} forward", norm_kernels.norm_forward, forward, columns, 8, warps))
        found.append(
            Job(f"masked norm of {columns} backward", norm_kernels.norm_backward, constants, columns, 12, warps)
        )
    return found


def examine(job: Job, capability: int) -> Binary:
    """Compiles a kernel for one kind of GPU and takes the binary apart."""
    types = {"state": "*i64", "offsets": "*i64", "winners": "*i32"} | dict.fromkeys(("tau", "eps"), "fp32")
    types |= dict.fromkeys(("count", "rows", "columns"), "i32")
    names = job.kernel.arg_names
    signature = {name: "constexpr" if name in job.constants else types.get(name, "*fp32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(fn=job.kernel, signature=signature, constexprs=job.constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": job.warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        code = _run("cuobjdump", "-sass", file.name)
    operations = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code, re.MULTILINE)
    operations = [operation for operation in operations if operation != "NOP"]
    counts = {unit: sum(bool(re.match(names, operation)) for operation in operations) for unit, names in UNITS.items()}
    threads = 32 * job.warps
    numbers = {key: int(value) for key, value in re.findall(r"([A-Z]+)(?:\[\d\])?:(\d+)", usage)}
    return Binary(
        numbers["REG"],
        # Spilled registers go to local memory on the stack; nothing else here is put there.
        numbers["STACK"] + numbers["LOCAL"],
        compiled.metadata.shared,
        len(operations) * threads / job.elements,
        *(counts[unit] * threads / job.elements for unit in ("integer", "multiply", "float", "special")),
    )


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout


def limit(binary: Binary, moved: float, card: Card) -> tuple[float, str]:
    """Most elements a second, and what holds them back."""
    cycles = card.processors * card.clock
    rates = {
        "bandwidth": card.bandwidth / moved,
        "issue": 128 * cycles / binary.instructions,
        "integer unit": 64 * cycles / max(binary.integer, 1e-9),
        "integer multiplication": 64 * cycles / max(binary.multiply, 1e-9),
        "float unit": card.floats * cycles / max(binary.float_, 1e-9),
        "special functions": 16 * cycles / max(binary.special, 1e-9),
    }
    slowest = min(rates, key=rates.__getitem__)
    return rates[slowest], slowest


class BytesMoved(TorchDispatchMode):
    """Adds up what the operations under it read and write; views move nothing."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one operation and counts the distinct tensors that it touches."""
        result = func(*args, **(kwargs or {}))
        outputs = [t for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, torch.Tensor)]
        inputs = [t for t in (*args, *(kwargs or {}).values()) if isinstance(t, torch.Tensor)]
        is_view = any(out.data_ptr() == other.data_ptr() for out in outputs for other in inputs)
        in_place = func._schema.is_mutable
        if "empty" not in func.__name__ and (not is_view or in_place):
            writes = outputs[:1] if in_place else outputs
            # An operation that only fills its argument does not read it.
            reads = [] if func.__name__.split(".")[0] in ("exponential_", "zero_", "fill_") else inputs
            self.total += sum(t.nbytes for t in (*reads, *writes))
        return result


def eager_bytes() -> dict[str, float]:
    """Bytes an element that torch's own operations read and write forward and backward, by kind of kernel."""
    gates, rows = torch.randn(4096, 2, requires_grad=True), torch.randn(4096, 32, requires_grad=True)
    x, keep, weight, bias = (torch.ones(n).requires_grad_() for n in (4096 * 384, 384, 384, 384))
    moved = {}
    for name, inputs, run in [
        ("gates", [gates], lambda: F.gumbel_softmax(gates, hard=True)),
        ("rows", [rows], lambda: F.gumbel_softmax(rows, hard=True)),
        ("norm", [x, keep, weight, bias], lambda: plain_norm(x.view(-1, 384), keep, weight, bias, 1e-5, True)),
    ]:
        gradient = torch.ones_like(run())
        with BytesMoved() as counter:
            torch.autograd.grad(run(), inputs, gradient)
        moved[name] = counter.total / (4096 if name == "gates" else inputs[0].numel())
    return moved


def main(argv: Sequence[str] | None = None) -> None:
    """Prints one table for each kind of GPU.

    Args:
        argv: Command line without the program's name; ``None`` takes it from ``sys.argv``.

    Raises:
        SystemExit: If a kernel spills registers.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", nargs="+", type=int, default=[80, 90, 100], choices=sorted(CARDS))
    options = parser.parse_args(argv)
    console = Console(width=150)
    spilling = []
    eager = eager_bytes()
    for capability in options.capability:
        card = CARDS[capability]
        counts = ("instructions", "integer", "multiply", "float", "special")
        title = f"sm_{capability} ({card.name}): instructions and bytes an element, float32; not measured"
        table = Table("kernel", "registers", "spilled", "shared", *counts, "bytes", "limit", "10^9/s", title=title)
        seconds: dict[str, float] = {}
        for job in jobs():
            binary = examine(job, capability)
            rate, reason = limit(binary, job.moved, card)
            table.add_row(
                job.name, str(binary.registers), str(binary.spilled), str(binary.shared),
                *(f"{count:.1f}" for count in binary[3:]), f"{job.moved:.0f}", reason, f"{rate / 1e9:.0f}",
            )  # fmt: skip
            if binary.spilled:
                spilling.append(f"{job.name} on sm_{capability}")
            seconds[job.name.rsplit(" ", 1)[0]] = seconds.get(job.name.rsplit(" ", 1)[0], 0.0) + 1 / rate
        console.print(table)
        for name, ours in seconds.items():
            if name == "reinmax gates":  # a backward beside the other; torch has no such estimator
                continue
            moved = eager["norm" if "norm" in name else "gates" if name == "gates" else "rows"]
            ratio = moved / card.bandwidth / ours
            console.print(f"{name}: eager moves {moved:.0f} bytes an element; at best {ratio:.1f} times faster")
    if spilling:
        raise SystemExit(f"registers are spilled by: {', '.join(spilling)}")


if __name__ == "__main__":
    main()
