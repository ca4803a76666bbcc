"""What the program trusts and what it lets out: cache folders of others, networks, temporary files,
and files of models that tell what they want run."""

import json
import os
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from numba.core.dispatcher import Dispatcher
from program import GOLDEN, program

import gemma_cli.runtime
import quantize
from gemma_cli.runtime import compilation
from quantize.compilation import FOLDER, cached, kernels_folder
from quantize.errors import GemmaError

SOURCES = [Path(__file__)]


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GEMMA_CLI_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_kernels_lie_in_a_folder_for_this_user_alone(own_home: Path) -> None:
    before = os.umask(0)
    try:
        folder = kernels_folder(SOURCES)
        compiled = cached(folder)(lambda x: x + 1)
        assert compiled(1) == 2
    finally:
        os.umask(before)
    assert folder.parents[1] == own_home / "cache"
    for made in (folder, folder.parent, folder.parents[1]):
        assert made.stat().st_mode & 0o777 == 0o700
    assert list(folder.rglob("*.nbc"))
    assert kernels_folder(SOURCES) == folder
    assert kernels_folder(SOURCES, "another CPU") != folder


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777, 0o702])
def test_a_cache_that_others_can_write_is_refused(own_home: Path, level: int, mode: int) -> None:
    folder = kernels_folder(SOURCES)
    open_to_others = [folder, *folder.parents][level]
    open_to_others.chmod(mode)
    with pytest.raises(GemmaError, match=f"^{open_to_others} .*others can write there; delete it"):
        kernels_folder(SOURCES)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_cache_of_somebody_else_is_refused(
    own_home: Path, monkeypatch: pytest.MonkeyPatch, level: int
) -> None:
    folder = kernels_folder(SOURCES)
    theirs = [folder, *folder.parents][level]
    stat = Path.stat

    def told(path: Path, **options: bool) -> os.stat_result:
        about = list(stat(path, **options))
        about[4] = 4711 if path == theirs else os.geteuid()
        return os.stat_result(about)

    monkeypatch.setattr(Path, "stat", told)
    with pytest.raises(GemmaError, match=f"^{theirs} "):
        kernels_folder(SOURCES)


def test_a_folder_that_others_can_read_holds_no_kernels(own_home: Path) -> None:
    """Files in it, which Numba gives the permissions of any new file, are then within reach."""
    folder = kernels_folder(SOURCES)
    folder.chmod(0o755)
    with pytest.raises(GemmaError, match=f"^{folder} "):
        kernels_folder(SOURCES)
    folder.chmod(0o700)
    for above in folder.parents[:2]:
        above.chmod(0o755)
    assert kernels_folder(SOURCES) == folder


@pytest.mark.parametrize(
    "arguments",
    [
        ("quantize", str(GOLDEN / "gemma-mha"), "-o", "out.safetensors"),
        ("doctor",),
        ("doctor", "--json"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_the_program_refuses_such_a_cache_in_one_sentence(
    own_home: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    """And shows nothing that code from there would have measured."""
    cache = own_home / "cache"
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    command, environment = program(own_home)
    done = subprocess.run(
        [*command, *arguments],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"gemma-cli: {cache} is for machine code")
    assert "others can write there; delete it" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(cache.iterdir())
    assert not (tmp_path / "out.safetensors").exists()


def test_where_nothing_can_be_written_nothing_is_kept(own_home: Path) -> None:
    own_home.write_text("a file in the way")
    folder = kernels_folder(SOURCES)
    assert not folder.exists()
    assert cached(folder)(lambda x: x + 1)(1) == 2
    assert not list(Path(__file__).parent.rglob("test_trust*.nb?"))


def test_no_kernels_lie_beside_the_sources() -> None:
    """Of all functions of both packages that are kept at all."""
    kept = {}
    for package, folder in ((quantize, FOLDER), (gemma_cli.runtime, compilation.FOLDER)):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            for name, value in vars(import_module(info.name)).items():
                if isinstance(value, Dispatcher) and value.stats.cache_path:
                    kept[f"{value.py_func.__module__}.{name}"] = (value.stats.cache_path, folder)
    assert {"quantize.compensation._search", "gemma_cli.runtime.bandwidth.total"} <= kept.keys()
    for name, (path, folder) in kept.items():
        assert Path(path).is_relative_to(folder), name


# Of a process that does all that needs no hub, one after the other. A socket of asyncio to itself
# (AF_UNIX) reaches nobody. What is renamed was a temporary file until then.
WATCHED = """
import io, json, os, socket, stat, sys

def watch(event, arguments):
    known = event == "socket.__new__" and arguments[1] in (socket.AF_UNIX, -1)
    outside = event.startswith("socket.") and not known
    if outside or event in ("subprocess.Popen", "os.system", "os.exec", "os.fork"):
        seen.append(event)
    if event in ("os.rename", "os.chmod"):
        path = os.fsdecode(arguments[0])
        about = os.lstat(path)
        if stat.S_ISREG(about.st_mode):
            temporary[path] = min(temporary.get(path, 0o777), stat.S_IMODE(about.st_mode))

seen, temporary = [], {}
sys.addaudithook(watch)
os.umask(0)
from gemma_cli.cli.main import execute
for given, *command in json.loads(sys.argv[1]):
    sys.argv = ["gemma-cli", *command]
    sys.stdin = io.TextIOWrapper(io.BytesIO(given.encode()))
    status = execute()
    if status:
        sys.exit(f"{command}: {status}")
print("\\n" + json.dumps([seen, temporary]))
"""


def test_nothing_reaches_a_network_and_temporary_files_are_private(
    home: Path, tmp_path: Path
) -> None:
    """Every command but `bench`, which is `run` with a clock, and those of `hf:`."""
    own = tmp_path / "home"
    (own / "cache").mkdir(parents=True, mode=0o700)
    (own / "cache" / "kernels").symlink_to(home / "cache" / "kernels")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog and then sleeps. " * 200)
    short = ("-n", "2", "-t", "0")
    commands = [
        ("", "quantize", str(GOLDEN / "gemma-mha"), "--bits", "8", "--verify"),
        ("", "run", *short, "--session", "one", "The moon"),
        ("The moon", "run", *short, "--cache-prompt", "Say:"),
        ("a\nb\n", "map", *short, "--ndjson", "Say:"),
        ("Hello\n", "chat", *short, "--session", "two"),
        ("", "eval", "-m", str(home / "models" / "chat.safetensors"), "--text", str(text)),
        ("", "inspect", "--tensors"),
        ("", "verify"),
        ("", "tokenize", "The moon"),
        ("", "models"),
        ("", "sessions", "list"),
    ]
    environment = program(own)[1]
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, json.dumps(commands)],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        errors="replace",  # what a random model says
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen, temporary = json.loads(done.stdout.splitlines()[-1])
    assert seen == []
    of_kernels = [path for path in temporary if "/kernels/" in path]
    kinds = {Path(path).parent.name for path in temporary.keys() - of_kernels}
    assert kinds == {"models", "prompts", "sessions"}
    assert {oct(mode) for path, mode in temporary.items() if path not in of_kernels} == {"0o600"}
