"""Precisions that a CPU has no instructions for: answers in them are slower than in fp32 there."""

from pathlib import Path

# Flags of /proc/cpuinfo, those of x86 first, then those of ARM.
INSTRUCTIONS = {"bf16": ("avx512_bf16", "amx_bf16", "bf16"), "fp16": ("avx512_fp16", "amx_fp16", "asimdhp")}


def slow_on(flags: set[str], dtype: str) -> str | None:
    """One line where a CPU of these flags has no instructions for products in this dtype; None where it has them, and
    where nothing is known of it (no flags).
    """
    wanted = INSTRUCTIONS.get(dtype, ())
    if not wanted or not flags or flags & set(wanted):
        return None
    return (
        f"--dtype {dtype}: this CPU has no instructions for it ({wanted[0]} or {wanted[1]}): expect it to be slower "
        f"than fp32"
    )


def cpu_flags(file: Path = Path("/proc/cpuinfo")) -> set[str]:
    """None on systems that do not say."""
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((set(line.split()) for line in lines if line.lower().startswith(("flags", "features"))), set())
