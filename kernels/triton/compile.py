"""`python -m kernels.triton.compile`: compile every kernel for sm_90 without a card, and hold it to its budget.

What a compiler can say about speed before anything runs: registers, spills, shared memory, tensor core instructions,
how often memory is read and written 16 bytes a thread, or less on the way into shared memory and out of it, and what
the copy engine is asked for. Prints
a JSON object a kernel; the exit status is 1 if one is over its budget. Cannot run in a process that interprets
(`TRITON_INTERPRET`).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from kernels.triton.budgets import VARIANTS, Budget, Variant

TARGET = GPUTarget("cuda", 90, 32)
MAX_SHARED_BYTES = 227 << 10  # of a program on this target

_PTXAS: Path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
_WIDE = r"(?:ld|st)\.global[\w.:]*\.(?:v4\.b32|v2\.b64)|cp\.async\.cg\.shared\.global[^;]*, 0x10,"
_NARROW_COPIES = r"cp\.async\.c[ag]\.shared\.global[^;]*, 0x[48],|ld\.shared[\w.]*\.b8"
_BULK_COPIES = r"cp\.async\.bulk\.tensor"
_TENSOR_CORES = r"wgmma\.mma_async\.sync\.aligned\.(m\d+n\d+k\d+)|mma\.sync\.aligned\.(m\d+n\d+k\d+)"


@dataclass(frozen=True, slots=True)
class Resources:
    """What a kernel costs, as compiled."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    wide_accesses: int  # instructions that move 16 bytes a thread between global memory and the processor
    narrow_copies: int  # instructions that copy fewer into shared memory, or take single bytes out of it
    bulk_copies: int  # instructions that ask the copy engine for a brick
    tensor_cores: list[str]  # shapes of their instructions
    begun_products: int  # products that begin from something else than zero or the product before

    def over(self, budget: Budget) -> list[str]:
        """Say what is over the budget."""
        problems = []
        if self.registers > budget.registers:
            problems.append(f"{self.registers} registers, not {budget.registers}")
        if self.spilled_bytes > budget.spilled_bytes:
            problems.append(f"{self.spilled_bytes} bytes spilled, not {budget.spilled_bytes}")
        if self.shared_bytes > MAX_SHARED_BYTES:
            problems.append(f"{self.shared_bytes} bytes of shared memory")
        if self.wide_accesses < budget.wide_accesses:
            problems.append(f"{self.wide_accesses} wide accesses, not {budget.wide_accesses}")
        if self.bulk_copies < budget.bulk_copies:
            problems.append(f"{self.bulk_copies} bricks asked for, not {budget.bulk_copies}")
        if budget.narrow_copies is not None and self.narrow_copies > budget.narrow_copies:
            problems.append(f"{self.narrow_copies} narrow copies, not {budget.narrow_copies}")
        if budget.tensor_cores is not None and budget.tensor_cores not in self.tensor_cores:
            problems.append(f"no {budget.tensor_cores} among {self.tensor_cores}")
        if budget.tensor_cores is not None and self.begun_products > 0:
            problems.append(f"{self.begun_products} products begin from a bias: see kernels.triton.linear.add_bias")
        return problems


def measure(variant: Variant) -> Resources:
    """Compile a variant and look at what came out."""
    names = variant.kernel.arg_names
    constants = {**({"EARLY": True} if "EARLY" in names else {}), **variant.constants}
    make_source = GluonASTSource if isinstance(variant.kernel, GluonJITFunction) else ASTSource
    source = make_source(
        variant.kernel,
        {name: "constexpr" if name in constants else variant.types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if name not in constants
            and name not in variant.unaligned
            and not variant.types[name].startswith("tensordesc")
        },
    )
    compiled = triton.compile(source, target=TARGET, options=dict(variant.options))
    ptx: str = compiled.asm["ptx"]
    remarks = _assemble(ptx, variant.options)
    return Resources(
        registers=_number(r"Used (\d+) registers", remarks),
        spilled_bytes=_number(r"(\d+) bytes spill stores", remarks) + _number(r"(\d+) bytes spill loads", remarks),
        shared_bytes=compiled.metadata.shared,
        wide_accesses=len(re.findall(_WIDE, ptx)),
        narrow_copies=len(re.findall(_NARROW_COPIES, ptx)),
        bulk_copies=len(re.findall(_BULK_COPIES, ptx)),
        tensor_cores=sorted({a or b for a, b in re.findall(_TENSOR_CORES, ptx)}),
        begun_products=_begun_products(compiled.asm["ttgir"]),
    )


def _begun_products(ttgir: str) -> int:
    """Count products whose sum does not begin from a constant, a product or a loop's own sum."""
    definitions: dict[str, str] = {}  # a name may come again in another region: the last one counts
    count = 0
    for line in ttgir.splitlines():
        if found := re.match(r"\s*(%\w+)(?::\d+)? = (.*)", line):
            name, definition = found.groups()
            if product := re.match(r"(?:ttng\.warp_group_dot|tt\.dot) %\w+, %\w+, (%\w+)", definition):
                begin = definitions.get(product[1], "scf.for")
                count += not re.match(r"arith\.constant|ttng\.warp_group_dot|tt\.dot|scf\.for", begin)
            definitions[name] = definition
    return count


def _assemble(ptx: str, options: Mapping[str, object]) -> str:
    """Return what the assembler says of the code; Triton assembles too, but keeps it to itself."""
    fused = [] if options.get("enable_fp_fusion", True) else ["--fmad=false"]
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "kernel.ptx"
        source.write_text(ptx)
        command = [str(_PTXAS), "-v", "--gpu-name=sm_90a", *fused, str(source), "-o", str(source.with_suffix(".cubin"))]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the assembler's remarks have no {pattern!r}: {text}")
    return int(found[1])


def main() -> int:
    """Measure every variant and print it."""
    is_over = False
    for name, variant in VARIANTS.items():
        resources = measure(variant)
        problems = resources.over(variant.budget)
        is_over |= bool(problems)
        print(json.dumps({"kernel": name, **asdict(resources), "over_budget": problems}), flush=True)  # noqa: T201
    return int(is_over)


if __name__ == "__main__":
    sys.exit(main())
