"""What this CPU can do, and which of its instructions the kernels use.

`NAME` is decided once, when this module is first imported, and before Numba is: Numba reads the
target CPU from the environment at import. `GEMMA_CLI_ISA` forces one of `NAMES`; the generated
code then keeps to that set, so that a newer CPU can run what an older one would.
"""

import ctypes
import mmap
import os
import platform
import re
import sys
from pathlib import Path

import llvmlite.binding as llvm

from quantize.errors import GemmaError

NAMES = ("amx", "zen4", "avx512vnni", "avxvnni", "avx2", "i8mm", "neon", "plain")

MACHINE = {"x86_64": "x86", "amd64": "x86", "aarch64": "arm", "arm64": "arm"}.get(
    platform.machine().lower(), "other"
)
"""The family of the CPU: "x86", "arm" or "other"."""


_ARM_FEATURES = {"dotprod": ("asimddp", "FEAT_DotProd"), "i8mm": ("i8mm", "FEAT_I8MM")}
"""What LLVM, the Linux kernel and Apple call the features of ARM CPUs that sets are made of."""


def _features() -> dict[str, bool]:
    features = dict(llvm.get_host_cpu_features())
    # LLVM does not look for these on Linux and macOS; on Windows it does.
    if MACHINE == "arm" and sys.platform == "linux":
        features |= linux_arm_features(Path("/proc/cpuinfo").read_text())
    if MACHINE == "arm" and sys.platform == "darwin":
        features |= {name: _apple_has(apple) for name, (_, apple) in _ARM_FEATURES.items()}
    # What the CPU can do says nothing of which units do it.
    features["zen4"] = re.fullmatch(r"znver([4-9]|\d\d)", llvm.get_host_cpu_name()) is not None
    if features.get("amx-tile") and not _may_use_tiles():
        features["amx-tile"] = False
    return features


def _may_use_tiles() -> bool:
    """Asks the operating system for AMX's tile registers, for this process and all its threads.

    They make the memory of every thread that uses them 8 KB larger, so Linux wants to be asked
    (Documentation/arch/x86/xstate.rst), and ends a process that did not. Other systems are left
    alone. There are virtual machines, too, that show a CPU with AMX and refuse its instructions;
    they have no palette to configure tiles with.
    """
    if MACHINE != "x86" or sys.platform != "linux" or not _n_palettes():
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    numbers = (ctypes.c_long(n) for n in (arch_prctl, request_permission, tile_data))
    status: int = ctypes.CDLL(None).syscall(*numbers)
    return status == 0


def _n_palettes() -> int:
    """The number of AMX's palettes, as the CPU tells: CPUID leaf 0x1D."""
    # push rbx; mov eax, 0x1d; xor ecx, ecx; cpuid; pop rbx; ret
    code = bytes.fromhex("53 b81d000000 31c9 0fa2 5b c3")
    protection = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    try:
        memory = mmap.mmap(-1, mmap.PAGESIZE, prot=protection)
    except OSError:  # Some systems let no memory be written and run; then it remains unknown.
        return 0
    memory.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    n: int = ctypes.CFUNCTYPE(ctypes.c_uint32)(address)()
    return n


def linux_arm_features(cpuinfo: str) -> dict[str, bool]:
    """Which of _ARM_FEATURES the text of /proc/cpuinfo names."""
    lines = [line.split() for line in cpuinfo.splitlines() if line.startswith("Features")]
    words = lines[0] if lines else []
    return {name: linux in words for name, (linux, _) in _ARM_FEATURES.items()}


def _apple_has(feature: str) -> bool:
    value, size, none = ctypes.c_int(0), ctypes.c_size_t(4), ctypes.c_size_t(0)
    name = f"hw.optional.arm.{feature}".encode()
    # What the system does not know leaves the 0.
    ctypes.CDLL(None).sysctlbyname(name, ctypes.byref(value), ctypes.byref(size), None, none)
    return value.value == 1


def supported(features: dict[str, bool]) -> list[str]:
    """The instruction sets of NAMES that a CPU with these LLVM features runs, best first."""
    avx2 = all(features.get(name, False) for name in ("avx2", "fma", "f16c"))
    vnni = avx2 and all(features.get(n, False) for n in ("avx512vnni", "avx512bw", "avx512vl"))
    runs = {
        "amx": vnni and all(features.get(n, False) for n in ("amx-tile", "amx-bf16", "avx512bf16")),
        "zen4": vnni and features.get("zen4", False),
        "avx512vnni": vnni,
        "avxvnni": avx2 and features.get("avxvnni", False),
        "avx2": avx2,
        "i8mm": features.get("dotprod", False) and features.get("i8mm", False),
        "neon": features.get("dotprod", False),
        "plain": True,
    }
    return [name for name in NAMES if runs[name]]


def _choose() -> str:
    features = _features()
    runs = supported(features)
    name = os.environ.get("GEMMA_CLI_ISA") or runs[0]
    if name not in runs:
        raise GemmaError(
            f"GEMMA_CLI_ISA is {name!r}, which this CPU does not run; it runs {', '.join(runs)}."
        )
    _tell_numba(name, runs, features)
    return name


_DROPPED = {
    "zen4": ("amx",),
    "avx512vnni": ("amx",),
    "avxvnni": ("avx512", "amx"),
    "avx2": ("avx512", "amx", "avxvnni"),
    "neon": ("i8mm",),
}
"""What the names of features that a set does not use begin with."""


def _tell_numba(name: str, runs: list[str], features: dict[str, bool]) -> None:
    """Gives Numba the target, where it is not what LLVM says that this CPU is."""
    forced = name != runs[0]
    if "numba" in sys.modules or not (forced or MACHINE == "arm"):
        # Tests import Numba first; the chosen lowering still holds, only LLVM's own choice of
        # registers is then the host's.
        return
    if forced and name == "plain":
        os.environ["NUMBA_CPU_NAME"] = "generic"
        os.environ["NUMBA_CPU_FEATURES"] = ""
        return
    if forced:
        os.environ["NUMBA_CPU_NAME"] = "generic" if MACHINE == "arm" else "x86-64-v3"
    dropped = _DROPPED.get(name, ())
    kept = {n: on and not n.startswith(dropped) for n, on in features.items() if n != "zen4"}
    os.environ["NUMBA_CPU_FEATURES"] = ",".join(
        f"{'+' if on else '-'}{n}" for n, on in kept.items()
    )


FEATURES = _features()
"""What this CPU has, by LLVM's names."""

NAME = _choose()

AMX = NAME == "amx"
"""Whether many tokens are multiplied by matrix units, few by what "avx512vnni" has."""

ZEN4 = NAME == "zen4"
"""As "avx512vnni", where additions and scaling by powers of 2 have units of their own, which dot
products do not need: AMD's CPUs since then. Intel's have the same for all of them."""

AVX512 = NAME in ("amx", "zen4", "avx512vnni")
