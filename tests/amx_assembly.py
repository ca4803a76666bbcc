"""Prints what the tiles' kernels become on a CPU with AMX, whatever the CPU is here.

A process of its own for the reason that `lowered.py` gives.
"""

import llvmlite.binding as llvm
import lowered


def main() -> None:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    lowered.pretend_cpu("amx")

    import emulated_kernels  # noqa: PLC0415

    for kernel in (emulated_kernels.multiply_blocks, emulated_kernels.share):
        _, module = emulated_kernels.compile_only(kernel)
        machine, optimized = lowered.lower("amx", lowered.build_module({}), [module])
        print(f"# {kernel.__name__}")
        print(machine.emit_assembly(optimized))


if __name__ == "__main__":
    main()
