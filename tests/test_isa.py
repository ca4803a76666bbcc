"""The choice of instructions, and the kernels on each instruction set.

Sets that this machine has run all of `test_kernels.py` (`test_kernels_apart.py`). Those that it
lacks run their integer products, the only code that is written for each set, with the instructions
spelled out in plain ones (`lowered.py`), and their assembly must hold the instructions that they
are for. An emulator runs those of ARM, too, and whole kernels (`emulated.py`).
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import emulated
import pytest

from gemma_cli.runtime import isa
from quantize.errors import GemmaError

TESTS = Path(__file__).parent
MACHINE_SETS = isa.supported(isa._features())

X86 = ("avx2", "fma", "f16c")
VNNI512 = ("avx512vnni", "avx512bw", "avx512vl")
AMX = ("amx-tile", "amx-bf16", "avx512bf16")


def run_python(home: Path, *arguments: str, **environment: str) -> str:
    """What a Python process of its own writes; its kernels are cached below `home`."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("GEMMA_CLI_", "NUMBA_"))
    }
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**kept, "PYTHONPATH": path, "GEMMA_CLI_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ((), ["plain"]),
        (("avx2",), ["plain"]),  # no CPU is like that, but a virtual machine can be
        (X86, ["avx2", "plain"]),
        ((*X86, "avx512vnni"), ["avx2", "plain"]),
        ((*X86, "avxvnni"), ["avxvnni", "avx2", "plain"]),
        ((*X86, *VNNI512), ["avx512vnni", "avx2", "plain"]),
        ((*X86, *VNNI512, "zen4"), ["zen4", "avx512vnni", "avx2", "plain"]),
        ((*X86, "zen4"), ["avx2", "plain"]),
        ((*X86, *VNNI512, "avxvnni"), ["avx512vnni", "avxvnni", "avx2", "plain"]),
        ((*X86, *VNNI512, *AMX), ["amx", "avx512vnni", "avx2", "plain"]),
        ((*X86, *VNNI512, *AMX[1:]), ["avx512vnni", "avx2", "plain"]),
        ((*X86, *VNNI512, *AMX[:-1]), ["avx512vnni", "avx2", "plain"]),
        ((*X86, *AMX), ["avx2", "plain"]),
        (("neon",), ["plain"]),
        (("neon", "dotprod"), ["neon", "plain"]),
        (("neon", "dotprod", "i8mm"), ["i8mm", "neon", "plain"]),
    ],
)
def test_supported_sets_best_first(features: tuple[str, ...], expected: list[str]) -> None:
    assert isa.supported(dict.fromkeys(features, True)) == expected
    every = {*X86, *VNNI512, *AMX, "zen4", "avxvnni", "neon", "dotprod", "i8mm"}
    absent = dict.fromkeys(every.difference(features), False)
    assert isa.supported({**absent, **dict.fromkeys(features, True)}) == expected


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [("znver3", False), ("znver4", True), ("znver5", True), ("znver10", True), ("x86-64", False)],
)
def test_amd_cpus_are_known_by_name(
    monkeypatch: pytest.MonkeyPatch, cpu: str, expected: bool
) -> None:
    monkeypatch.setattr(isa.llvm, "get_host_cpu_name", lambda: cpu)
    assert isa._features()["zen4"] == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("fp asimd crc32 cpuid", {"dotprod": False, "i8mm": False}),
        ("fp asimd asimddp cpuid", {"dotprod": True, "i8mm": False}),
        ("fp asimd asimddp sve svei8mm i8mm bf16", {"dotprod": True, "i8mm": True}),
    ],
)
def test_arm_features_that_llvm_does_not_look_for(words: str, expected: dict[str, bool]) -> None:
    cpuinfo = f"processor\t: 0\nBogoMIPS\t: 243.75\nFeatures\t: {words}\nCPU part\t: 0xd0c\n"
    assert isa.linux_arm_features(2 * cpuinfo) == expected
    assert not any(isa.linux_arm_features("processor: 0\nflags: asimddp\n").values())


class CLibrary:
    """Answers the one system call that AMX needs, and notes it."""

    def __init__(self, status: int) -> None:
        self.status, self.calls = status, list[tuple[int, ...]]()

    def syscall(self, *numbers: ctypes.c_long) -> int:
        self.calls.append(tuple(number.value for number in numbers))
        return self.status


@pytest.mark.parametrize(
    ("status", "palettes", "platform", "allowed"),
    [
        (0, 1, "linux", True),
        (-1, 1, "linux", False),  # refused, by an old kernel or because of a small signal stack
        (0, 0, "linux", False),  # a virtual machine that shows AMX and does not have it
        (0, 1, "win32", False),
    ],
)
def test_amx_needs_permission(
    monkeypatch: pytest.MonkeyPatch, status: int, palettes: int, platform: str, allowed: bool
) -> None:
    library, features = CLibrary(status), dict.fromkeys((*X86, *VNNI512, *AMX), True)
    monkeypatch.setattr(isa, "MACHINE", "x86")
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(isa, "_n_palettes", lambda: palettes)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(isa.llvm, "get_host_cpu_features", lambda: features)
    monkeypatch.setattr(isa.llvm, "get_host_cpu_name", lambda: "sapphirerapids")
    assert isa.supported(isa._features())[0] == ("amx" if allowed else "avx512vnni")
    asked = platform == "linux" and palettes > 0
    # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
    assert library.calls == [(158, 0x1023, 18)] * asked
    features["amx-tile"] = False
    assert isa.supported(isa._features())[0] == "avx512vnni"
    assert len(library.calls) == asked, "a CPU without AMX is not asked about"


@pytest.mark.skipif(
    isa.MACHINE != "x86" or sys.platform != "linux", reason="there are no palettes elsewhere"
)
def test_the_cpu_tells_its_palettes() -> None:
    has_tiles = re.search(r"\bamx_tile\b", Path("/proc/cpuinfo").read_text())
    assert isa._n_palettes() >= bool(has_tiles)


@pytest.mark.parametrize(
    ("forced", "cpu", "target"),
    [
        ("", None, "+neon,-sve,+dotprod,+i8mm"),  # Numba would not learn of the last two
        ("neon", "generic", "+neon,-sve,+dotprod,-i8mm"),
        ("plain", "generic", ""),
    ],
)
def test_numba_is_told_of_an_arm_cpu(
    monkeypatch: pytest.MonkeyPatch, forced: str, cpu: str | None, target: str
) -> None:
    features = {"neon": True, "sve": False, "dotprod": True, "i8mm": True}
    monkeypatch.setattr(isa, "MACHINE", "arm")
    monkeypatch.setattr(isa, "_features", lambda: features)
    monkeypatch.delitem(sys.modules, "numba", raising=False)
    for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"):
        monkeypatch.setenv(name, "")  # so that it is removed, or as it was, afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("GEMMA_CLI_ISA", forced)
    assert isa._choose() == (forced or "i8mm")
    assert os.environ.get("NUMBA_CPU_NAME") == cpu
    assert os.environ["NUMBA_CPU_FEATURES"] == target


def test_the_best_set_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GEMMA_CLI_ISA", raising=False)
    assert isa._choose() == MACHINE_SETS[0]


@pytest.mark.parametrize("forced", ["avx1024", "neon" if isa.MACHINE == "x86" else "avx2"])
def test_a_set_that_the_cpu_lacks_is_refused(monkeypatch: pytest.MonkeyPatch, forced: str) -> None:
    monkeypatch.setenv("GEMMA_CLI_ISA", forced)
    with pytest.raises(GemmaError, match=f"'{forced}'.* it runs .*plain"):
        isa._choose()


PRINT_ASSEMBLY = """
from gemma_cli.runtime import layers
import numpy as np
from numba import njit
geglu = njit(lambda gate, up, y: layers.geglu(gate, up, y))
x = np.ones(16, np.float32)
geglu(x, x, x)
print(*geglu.inspect_asm().values())
"""
REGISTERS = {
    "amx": {"xmm", "ymm", "zmm"},
    "zen4": {"xmm", "ymm", "zmm"},
    "avx512vnni": {"xmm", "ymm", "zmm"},
    "avxvnni": {"xmm", "ymm"},
    "avx2": {"xmm", "ymm"},
    "i8mm": set(),
    "neon": set(),
    "plain": {"xmm"},
}
"""Of x86, what code for each set may use."""


@pytest.mark.parametrize("name", MACHINE_SETS)
def test_numba_keeps_to_the_set(name: str, tmp_path: Path) -> None:
    """A forced set holds for the code around the integer products, too."""
    assembly = run_python(tmp_path, "-c", PRINT_ASSEMBLY, GEMMA_CLI_ISA=name)
    assert "geglu" in assembly
    assert set(re.findall(r"%([xyz]mm)", assembly)) <= REGISTERS[name]


INSTRUCTIONS = {  # of products of bytes, and of a codebook's lookup
    "amx": (r"\svpdpbusd\s.*%zmm", r"\svpshufb\s.*%zmm"),  # of few tokens
    "zen4": (r"\svpdpbusd\s.*%zmm", r"\svpshufb\s.*%zmm"),
    "avx512vnni": (r"\svpdpbusd\s.*%zmm", r"\svpshufb\s.*%zmm"),
    "avxvnni": (r"\{vex\}\s+vpdpbusd\s.*%ymm", r"\svpshufb\s.*%ymm"),
    "avx2": (r"\svpmaddubsw\s.*%ymm", r"\svpshufb\s.*%ymm"),
    "i8mm": (r"\susdot\s+v\d+\.4s, v\d+\.16b", r"\stbl\s+v\d+\.16b"),
    "neon": (r"\ssdot\s+v\d+\.4s, v\d+\.16b", r"\stbl\s+v\d+\.16b"),
    "plain": (r"\spm(ul|add)\w+\s.*%xmm", r"\spand\w*\s.*%xmm"),
}
PAIRS = {  # products of words
    "amx": r"\svpdpwssd\s.*%zmm",
    "zen4": r"\svpdpwssd\s.*%zmm",
    "avx512vnni": r"\svpdpwssd\s.*%zmm",
    "avxvnni": r"\svpmaddwd\s.*%ymm",  # which LLVM takes to be faster there with an addition
    "avx2": r"\svpmaddwd\s.*%ymm",
    "i8mm": r"\smla\s+v\d+\.4s, v\d+\.4s",
    "neon": r"\smla\s+v\d+\.4s, v\d+\.4s",
    "plain": r"\spmaddwd\s.*%xmm",
}


def run_for_assembly(home: Path, script: str, *arguments: str) -> dict[str, str]:
    """What a script of this folder prints: functions, each under `# ` and its name."""
    output = run_python(home, str(TESTS / script), *arguments)
    parts = re.split(r"^# (\w+)\n", output, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


@pytest.mark.parametrize("name", isa.NAMES)
def test_integer_products_of_every_set(name: str, tmp_path: Path) -> None:
    """Exact (which lowered.py asserts), and by the instructions that the set is named for."""
    assembly = run_for_assembly(tmp_path, "lowered.py", name)
    assert {"dots_int4", "dots_codebook", "dots_pairs", "expand_codebook"} <= set(assembly)
    product, lookup = INSTRUCTIONS[name]
    for function, code in assembly.items():
        instruction = PAIRS[name] if function == "dots_pairs" else product
        assert re.search(instruction, code) or not function.startswith("dots_")
        assert re.search(lookup, code) or not function.endswith("_codebook")
        # What LLVM has no instruction for on this CPU would be a call.
        assert not re.search(r"^\s+(callq?|bl)\s", code, re.MULTILINE)


TILE_INSTRUCTION = re.compile(r"^\t(ldtilecfg|tile\w+|tdp\w+)(?:\t(.*))?$", re.MULTILINE)


def test_amx_computes_with_nothing_but_loads_and_products(tmp_path: Path) -> None:
    """Of 32 inputs: two tiles of weights, and each of two tiles of inputs times both of them."""
    assembly = run_for_assembly(tmp_path, "amx_assembly.py")
    found = [
        (name, *re.findall(r"%tmm(\d)", operands))
        for name, operands in TILE_INSTRUCTION.findall(assembly["multiply_blocks"])
    ]
    sums = [("tilezero", *"0"), ("tilezero", *"1"), ("tilezero", *"2"), ("tilezero", *"3")]
    more_sums = [("tileloadd", tile) for _, tile in sums]
    step = [  # operands in AT&T's order: weights, inputs, sums
        *(("tileloadd", tile) for tile in "456"),
        *(("tdpbf16ps", *tiles) for tiles in ("460", "561")),
        ("tileloadd", "6"),
        *(("tdpbf16ps", *tiles) for tiles in ("462", "563")),
    ]
    stores = [("tilestored", tile) for _, tile in sums]
    n_steps = (len(found) - 12) // len(step)  # LLVM may unroll the loop
    assert n_steps >= 1
    assert found == [*sums, *more_sums, *step * n_steps, *stores]
    shared = TILE_INSTRUCTION.findall(assembly["share"])
    names = ["ldtilecfg", "tileloadd", "tilestored", "tilerelease"]
    assert [name for name, _ in shared] == names
    assert all("%tmm7" in operands for _, operands in shared[1:3])


def missing_for_arm() -> str:
    """What this machine lacks to build and run programs for ARM, as packages of Debian."""
    found = {
        "qemu-user": shutil.which(emulated.EMULATOR),
        "gcc-aarch64-linux-gnu": shutil.which(emulated.COMPILER),
    }
    if found["gcc-aarch64-linux-gnu"]:
        asked = [emulated.COMPILER, "-print-file-name=libc.a"]
        answer = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
        found["libc6-dev-arm64-cross"] = os.path.isabs(answer)
    return ", ".join(package for package, there in found.items() if not there)


@pytest.mark.parametrize("name", ["i8mm", "neon"])
def test_kernels_on_an_emulated_arm_cpu(name: str, tmp_path: Path) -> None:
    """Integers exactly, floats within the bounds that emulated.py asserts."""
    if missing := missing_for_arm():
        # The README's tests need no root; those of .ci/run do not do with less.
        required = os.environ.get("GEMMA_CLI_REQUIRE_QEMU")
        (pytest.fail if required else pytest.skip)(f"Debian's {missing} would be needed.")
    output = run_python(tmp_path, str(TESTS / "emulated.py"), name, str(tmp_path))
    assert {"dots_int4", "dots_planes", "dots_pairs", "store_i16", "product", "attend"} <= set(
        output.split()
    )
