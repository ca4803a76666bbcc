"""How the runtime's functions are compiled.

Half of the time that the first run compiles for would go into wrappers for callers that there are
not, and into machine code of every function by itself, though all are linked into few that Python
calls: LLVM improves those, and them alone. A division by zero gives an infinity, as in NumPy, so
that no function can raise.
"""

from collections.abc import Callable
from typing import Any

from numba import njit
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder

from gemma_cli.runtime.compilation import FOLDER
from quantize.compilation import cached


class _Library(JITCodeLibrary):  # type: ignore[misc]
    """LLVM's code of a function, as it is before LLVM improves it."""

    def _optimize_final_module(self) -> None:
        """Leaves it to those who have all that it is linked with."""

    def _finalize_final_module(self) -> None:
        self._finalized = True  # No machine code is made of it.

    @property
    def codegen(self) -> "_Library":
        return self

    def set_env(self, name: str, environment: object) -> None:
        """Where machine code would be told of its Python objects, of which there are none."""


class _Compiler(CompilerBase):  # type: ignore[misc]
    """Numba's own compiler, but for the library."""

    def define_pipelines(self) -> list[Any]:
        state = self.state
        state.library = _Library(state.targetctx.codegen(), state.func_id.func_qualname)
        return [DefaultPassBuilder.define_nopython_pipeline(state)]


def kernel(function: Callable[..., Any]) -> Any:
    """A function that compiled code calls, and only that."""
    return njit(
        error_model="numpy",
        no_cpython_wrapper=True,
        no_cfunc_wrapper=True,
        pipeline_class=_Compiler,
    )(function)


def entry(function: Callable[..., Any]) -> Any:
    """A function that Python calls, kept on the disk; other threads run while it does."""
    return cached(FOLDER, no_cfunc_wrapper=True)(function)
