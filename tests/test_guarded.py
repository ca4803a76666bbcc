"""That a page around an array that must not be touched (guarded.py) counts."""

import signal
import subprocess
import sys

import pytest
from test_isa import TESTS

BEYOND = """
import guarded, numpy as np
from numba import njit
from gemma_cli.runtime.vector import address_of, load_f32, store_f32
guarded.install()
x = np.zeros(16, np.float32)
@njit
def read(x, at): store_f32(address_of(x), load_f32(address_of(x) + at))
@njit
def write(x, at): store_f32(address_of(x) + at, load_f32(address_of(x)))
{how}(x, 0)
print("within", flush=True)
{how}(x, {at})
print("beyond", flush=True)
"""


@pytest.mark.parametrize("how", ["read", "write"])
@pytest.mark.parametrize(("side", "at"), [("end", 1), ("start", -1)])
def test_a_byte_beyond_an_array_ends_the_process(how: str, side: str, at: int) -> None:
    result = subprocess.run(
        [sys.executable, "-c", BEYOND.format(how=how, at=at)],
        env={"PYTHONPATH": f"{TESTS}:{TESTS.parent}", "GUARDED": side},
        capture_output=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (-signal.SIGSEGV, b"within\n")
