"""What this CPU can do, and which of its instructions the kernels use.

`NAME` is decided once, when this module is first imported, and before Numba is: Numba reads the
target CPU from the environment at import. `GEMMA_CLI_ISA` forces one of `NAMES`; the generated
code then keeps to that set, so that a newer CPU can run what an older one would.
"""

import os
import platform
import sys

import llvmlite.binding as llvm

from quantize.errors import GemmaError

NAMES = ("avx512vnni", "avxvnni", "avx2", "neon", "plain")

MACHINE = {"x86_64": "x86", "amd64": "x86", "aarch64": "arm", "arm64": "arm"}.get(
    platform.machine().lower(), "other"
)
"""The family of the CPU: "x86", "arm" or "other"."""


def _features() -> dict[str, bool]:
    return dict(llvm.get_host_cpu_features())


def supported(features: dict[str, bool]) -> list[str]:
    """The instruction sets of NAMES that a CPU with these LLVM features runs, best first."""
    avx2 = all(features.get(name, False) for name in ("avx2", "fma", "f16c"))
    runs = {
        "avx512vnni": avx2
        and all(features.get(name, False) for name in ("avx512vnni", "avx512bw", "avx512vl")),
        "avxvnni": avx2 and features.get("avxvnni", False),
        "avx2": avx2,
        "neon": features.get("dotprod", False),
        "plain": True,
    }
    return [name for name in NAMES if runs[name]]


def _choose() -> str:
    features = _features()
    runs = supported(features)
    forced = os.environ.get("GEMMA_CLI_ISA")
    if not forced:
        return runs[0]
    if forced not in runs:
        raise GemmaError(
            f"GEMMA_CLI_ISA is {forced!r}, which this CPU does not run; it runs {', '.join(runs)}."
        )
    _restrict_numba(forced, runs, features)
    return forced


def _restrict_numba(forced: str, runs: list[str], features: dict[str, bool]) -> None:
    if forced == runs[0]:
        return
    if "numba" in sys.modules:
        # Tests import Numba first; the chosen lowering still holds, only LLVM's own choice of
        # registers is then the host's.
        return
    if forced == "plain":
        os.environ["NUMBA_CPU_NAME"] = "generic"
        os.environ["NUMBA_CPU_FEATURES"] = ""
        return
    dropped = ("avx512", "amx", "avxvnni") if forced == "avx2" else ("avx512", "amx")
    kept = {name: on and not name.startswith(dropped) for name, on in features.items()}
    os.environ["NUMBA_CPU_NAME"] = "x86-64-v3"
    os.environ["NUMBA_CPU_FEATURES"] = ",".join(
        f"{'+' if on else '-'}{n}" for n, on in kept.items()
    )


NAME = _choose()
