"""What the processor can do, and what Paddle has to be told about it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Callable

from ..errors import ReparamError

#: Flags of processors that multiply in bfloat16; others are slower in it than in float32, where a runtime lets them.
_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}

#: Tells Intel's MKL, which multiplies Paddle's matrices on a CPU, which code to use; 5 is that for AVX2.
MKL_CODE = "MKL_DEBUG_CPU_TYPE"


def let_amd_multiply_fast(processor_facts: Path = Path("/proc/cpuinfo")) -> None:
    """Let MKL use AVX2 on a processor of AMD that has it, unless `MKL_DEBUG_CPU_TYPE` is set; elsewhere do nothing.

    MKL looks at a processor's maker first, and takes its slowest code where that is not Intel. It reads the variable
    at the first matrix product of a process; processes started later inherit it.
    """
    facts = processor_facts.read_text(errors="replace") if processor_facts.is_file() else ""
    if "AuthenticAMD" in facts and "avx2" in facts.split():
        os.environ.setdefault(MKL_CODE, "5")


def require_bfloat16(
    otherwise: Callable[[], bool] = lambda: False, processor_facts: Path = Path("/proc/cpuinfo")
) -> None:
    """Raise `ReparamError` where this processor does not multiply in bfloat16.

    Where the system has no list of what it can do, `otherwise` says whether it does.
    """
    listed = processor_facts.is_file()
    if not (_BFLOAT16 & set(processor_facts.read_text(errors="replace").split()) if listed else otherwise()):
        raise ReparamError(
            "this processor does not multiply in bfloat16 (none of avx512_bf16, amx_bf16, bf16 is among its flags)"
        )


def lacks_vnni(processor_facts: Path = Path("/proc/cpuinfo")) -> bool:
    """Tell whether an x86 processor has no VNNI, which sums products of eight bits without overflow."""
    try:
        text = processor_facts.read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx2" in text and "vnni" not in text
