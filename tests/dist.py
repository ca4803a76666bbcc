"""Builds the source distribution and the wheel, and tries both: `make dist`.

They are built twice, from copies of the checkout that differ in their paths, their files' times and
permissions; the bytes must be the same. The wheel must hold the two packages and nothing else, the
source distribution what git tracks. Each is then installed into an environment of its own, outside
the checkout, and converts and runs a small model there.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "tests" / "golden" / "gemma-mha"
PACKAGES = ("gemma_cli/", "quantize/")


def git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def copy(names: Iterable[str], folder: Path, *, mode: int, time: int) -> None:
    """A checkout of these files, with permissions and times of its own."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, path)
        path.chmod(mode)
        os.utime(path, (time, time))


def build(checkout: Path, out: Path, epoch: str) -> dict[str, bytes]:
    """The distributions that are built from a checkout, by their names."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--directory", str(out)],
        cwd=checkout,
        env=os.environ | {"SOURCE_DATE_EPOCH": epoch},
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def check_contents(wheel: Path, sdist: Path, names: set[str]) -> None:
    """Exits with a sentence if something is missing or superfluous."""
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    about = {name for name in held if ".dist-info/" in name}
    expect("the wheel", held - about, {name for name in names if name.startswith(PACKAGES)})
    if not any(name.endswith("/licenses/LICENSE") for name in about):
        sys.exit("The wheel has no licence.")
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    files = {member.name.partition("/")[2] for member in members}
    dots = {name for name in names if name.startswith(".") and name != ".gitignore"}
    expect("the source distribution", files, names - dots | {"PKG-INFO"})
    if any(member.uid or member.gid or member.uname for member in members):
        sys.exit("The source distribution names who built it.")


def expect(what: str, held: set[str], wanted: set[str]) -> None:
    if held != wanted:
        sys.exit(f"In {what} are missing {wanted - held}, superfluous {held - wanted}.")


def try_out(distribution: Path, folder: Path) -> str:
    """What the program answers, installed where nothing else is."""
    environment = folder / "environment"
    shutil.rmtree(environment, ignore_errors=True)
    venv.create(environment, with_pip=True)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("GEMMA_CLI_", "PYTHON"))}
    kept["GEMMA_CLI_HOME"] = str(folder / "home")
    binaries = environment / ("Scripts" if sys.platform == "win32" else "bin")

    def run(command: str, *arguments: str) -> str:
        return subprocess.run(
            [str(binaries / command), *arguments],
            cwd=folder,
            env=kept,
            check=True,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            errors="backslashreplace",  # what a random model says
        ).stdout

    run("python", "-m", "pip", "install", "--quiet", str(distribution))
    version = run("gemma-cli", "--version").split()[1]
    if f"-{version}" not in distribution.name:
        sys.exit(f"{distribution.name} says that it is {version}.")
    run("gemma-cli", "quantize", str(MODEL), "--force", "--bits", "8", "-o", "model.safetensors")
    return run("gemma-cli", "run", "-m", "model.safetensors", "-t", "0", "-n", "8", "The moon")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where they are put")
    out = parser.parse_args().out
    names = {name for name in git("ls-files").splitlines() if (ROOT / name).is_file()}
    epoch = git("log", "-1", "--format=%ct").strip()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        copy(names, folder / "one", mode=0o644, time=1_000_000_000)
        copy(names, folder / "another" / "checkout", mode=0o600, time=1_700_000_000)
        built = build(folder / "one", folder / "built", epoch)
        again = build(folder / "another" / "checkout", folder / "built again", epoch)
        if built != again:
            sys.exit("Built again, they are not the same bytes.")
        for name, data in built.items():
            print(f"{hashlib.sha256(data).hexdigest()}  {name}: the same bytes twice")
        (wheel,) = (folder / "built").glob("*.whl")
        (sdist,) = (folder / "built").glob("*.tar.gz")
        check_contents(wheel, sdist, names)
        answers = [try_out(distribution, folder) for distribution in (wheel, sdist)]
        if len(set(answers)) != 1 or not answers[0].strip():
            sys.exit(f"Installed, they answer {answers}.")
        print("Both install and run in an environment of their own.")
        out.mkdir(exist_ok=True)
        for path in (wheel, sdist):
            shutil.copy(path, out)


if __name__ == "__main__":
    main()
