"""What Paddle has to be told about the processor that it runs on."""

from __future__ import annotations

import os
from pathlib import Path

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
