"""How much memory there is: asked before something large begins, so that nothing is killed for it.

Linux gives memory that is not there, and ends who uses it. So what is left is read from where the
system and its administrators say it: /proc/meminfo, the limits of the control group
(Documentation/admin-guide/cgroup-v2.rst) and of the process (setrlimit(2)). Other systems are not
asked.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from quantize.errors import GemmaError

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_ROOT = Path("/")
_CACHED = ("inactive_file", "active_file")


def check_memory(needed: int, what: str, remedy: str, *, mapped: int = 0) -> None:
    """Raises GemmaError if memory of so many bytes cannot be had.

    what: the sentence's beginning, up to what is needed; remedy: its end. mapped: bytes of files
    that are mapped besides: they fill addresses, which can be limited, and memory only as far as
    there is some.
    """
    left = memory_left()
    if left is not None and needed > left:
        raise GemmaError(f"{what} {_size(needed)} of memory, and {_size(left)} are left; {remedy}.")
    needed, left = needed + mapped, addresses_left()
    if left is not None and needed > left:
        raise GemmaError(
            f"{what} {_size(needed)} of addresses, and the limit of this process leaves "
            f"{_size(left)}; raise it (ulimit -v), or {remedy}."
        )


def memory_left() -> int | None:
    """Bytes that this process can use without the system ending it, or another one; None if the
    system does not say."""
    found = [*_machine(), *_control_groups()]
    return max(0, min(found)) if found else None


def addresses_left() -> int | None:
    """Bytes of address space that this process may still take; None if there is no limit."""
    if resource is None or not (_ROOT / "proc/self/statm").exists():
        return None
    used = int((_ROOT / "proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else max(0, limit - used)


def _machine() -> Iterator[int]:
    """What the machine has left, and could put into its swap."""
    with suppress(OSError, ValueError):
        lines = (_ROOT / "proc/meminfo").read_text().splitlines()
        kilobytes = {
            name: int(rest.split()[0]) for name, _, rest in (x.partition(":") for x in lines)
        }
        if "MemAvailable" in kilobytes:
            yield 1024 * (kilobytes["MemAvailable"] + kilobytes.get("SwapFree", 0))


def _control_groups() -> Iterator[int]:
    """What is left in the process's control group and in each that it is part of."""
    with suppress(OSError, ValueError):
        for line in (_ROOT / "proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if not controllers:
                yield from _left_in(_ROOT / "sys/fs/cgroup", name, "memory.max", "memory.current")
            elif "memory" in controllers.split(","):
                names = "memory.limit_in_bytes", "memory.usage_in_bytes"
                yield from _left_in(_ROOT / "sys/fs/cgroup/memory", name, *names)


def _left_in(top: Path, name: str, limit: str, usage: str) -> Iterator[int]:
    # In a container the path can be that of the host: then the group is at the top.
    group = top / name.lstrip("/")
    for folder in (group, *group.parents):
        with suppress(OSError, ValueError):
            most, used = ((folder / file).read_text().strip() for file in (limit, usage))
            # Files that are cached count as used, and give way.
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            own = {key: stat.get(f"total_{key}", stat.get(key, 0)) for key in _CACHED}
            cached = sum(map(int, own.values()))
            if most != "max":
                yield int(most) - int(used) + cached
        if folder == top:
            return


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"
