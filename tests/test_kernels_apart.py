"""Tests of kernels and models once more, in processes of their own: on other instruction sets, on
AMX spelled out, in arrays between unreadable pages, with every index checked.

They compile everything anew, half a minute each, and do so side by side.
"""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from test_isa import MACHINE_SETS, TESTS, run_python

from gemma_cli.runtime import isa

# Plugins are loaded before any test imports Numba, which then keeps to the set, too.
SET, GUARDED, AMX = (("-p", name) for name in ("gemma_cli.runtime.isa", "guarded", "pretended_amx"))
KERNELS = str(TESTS / "test_kernels.py"), str(TESTS / "test_attention.py")
MODELS = str(TESTS / "test_model.py")

RUNS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    **{
        f"kernels on {name}": ((*SET, *GUARDED, *KERNELS), {"GEMMA_CLI_ISA": name})
        for name in MACHINE_SETS
        if name != isa.NAME
    },
    # Numba's own checks see indices; of addresses, unreadable pages before every array do.
    "kernels within their arrays": (
        (*GUARDED, *KERNELS),
        {"NUMBA_BOUNDSCHECK": "1", "GUARDED": "start", "GEMMA_CLI_ISA": isa.NAME},
    ),
    # Those that AMX makes a difference to, also where tiles get lost.
    "kernels on AMX spelled out": (
        (*AMX, "-k", "many or amx or threads or (exact and 19)", *KERNELS),
        {},
    ),
    "models on AMX spelled out": ((*AMX, MODELS), {}),
    # `make guard` does this and the kernels for every set of this machine, on both sides.
    "models to the end of their arrays": ((*GUARDED, MODELS), {"GUARDED": "end"}),
    "models from the start of their arrays": ((*GUARDED, MODELS), {"GUARDED": "start"}),
}


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[str]]]:
    """Those that were asked for, begun."""
    asked = [getattr(item, "callspec", None) for item in request.session.items]
    names = {spec.params.get("run") for spec in asked if spec} & RUNS.keys()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        begun = {}
        for name in (name for name in RUNS if name in names):
            arguments, environment = RUNS[name]
            home = tmp_path_factory.mktemp("home")
            command = ("-m", "pytest", "-x", "-p", "no:cacheprovider", *arguments)
            begun[name] = pool.submit(run_python, home, *command, **environment)
        yield begun
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("run", RUNS)
def test_in_a_process_of_its_own(run: str, runs: dict[str, Future[str]]) -> None:
    runs[run].result()
