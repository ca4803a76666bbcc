"""Checkpoints of the Hugging Face hub: hf:OWNER/NAME or hf:OWNER/NAME@REVISION.

The package huggingface_hub (extra `hub`) asks and transfers. What arrives is kept here, where other
programs find it too (HF_HOME), in the layout that they share:

    models--OWNER--NAME/blobs/CHECKSUM
    models--OWNER--NAME/snapshots/COMMIT/FILE    a link to its blob
    models--OWNER--NAME/refs/REVISION            the commit that it was

Two things are added by that. A file that was broken off goes on where it stopped, also in a later
run. And a file is used only if its checksum is the one that the hub states: SHA-256 for what is in
large file storage, git's SHA-1 for small files. Paths are made of checked names alone:
hf_hub_download would take them from an answer's headers, where `ETag: "../../../x"` is a path, too.
"""

import errno
import hashlib
import io
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.checkpoint.architecture import config_from_hf
from quantize.checkpoint.source import file_digest, read_file
from quantize.config import parse_json_object
from quantize.errors import GemmaError, shown

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_SOURCE = re.compile(r"hf:(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\w[\w./-]*))?", re.ASCII)
_SMALL = (
    *("config.json", "generation_config.json", "tokenizer_config.json"),
    *("chat_template.jinja", "chat_template.json"),
)
_TOKENIZERS = ("tokenizer.model", "tokenizer.json")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_CKPT = re.compile(r"[\w.-]+\.ckpt", re.ASCII)
_SECONDS = 30  # to wait for an answer


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub describes it."""

    name: str
    size: int
    sha256: str
    """Of its bytes; empty for a small file, which git keeps."""
    git_sha1: str
    """Of git's blob of a small file."""

    @property
    def checksum(self) -> str:
        return self.sha256 or self.git_sha1

    def is_at(self, path: Path) -> bool:
        """Whether a file holds what the hub says."""
        # A blob of git is a header and the file.
        start = hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        if self.sha256:
            return file_digest(path) == self.sha256
        return file_digest(path, start) == self.git_sha1


@dataclass(frozen=True)
class Remote:
    """What makes a checkpoint of a repository."""

    repo: str
    revision: str
    """As it was asked for: a branch, a tag or a commit."""
    commit: str
    files: tuple[RemoteFile, ...]
    """The small ones first; none if the hub cannot be reached and the cache has a copy."""

    @property
    def n_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def origin(self) -> str:
        """For the model file."""
        return f"hf:{self.repo}@{self.commit}"


def look_up(source: str) -> Remote:
    """Asks the hub for the files of a checkpoint, and downloads nothing.

    Raises GemmaError if `source` is not of the form above, the package is missing, or the hub has
    no such checkpoint or does not give it.
    """
    match = _SOURCE.fullmatch(source)
    if match is None or ".." in source:
        raise GemmaError(
            f"{source} names no repository of the Hugging Face hub; write hf:OWNER/NAME or"
            " hf:OWNER/NAME@REVISION, for instance hf:google/gemma-3-1b-it."
        )
    try:
        from huggingface_hub import HfApi, errors, try_to_load_from_cache  # noqa: PLC0415
        from huggingface_hub.utils import disable_progress_bars, logging  # noqa: PLC0415
    except ImportError as error:
        raise GemmaError(
            f"{source} needs the package huggingface_hub; get it with pip install 'gemma-cli[hub]'."
        ) from error
    disable_progress_bars()  # The caller shows progress, and errors are told below.
    logging.set_verbosity_error()
    repo, revision = match["repo"], match["revision"] or "main"
    with _explained(repo, revision):
        try:
            info = HfApi().model_info(
                repo, revision=revision, files_metadata=True, timeout=_SECONDS
            )
        except errors.HfHubHTTPError:
            raise
        except (errors.OfflineModeIsEnabled, errors.HTTPError):
            cached = try_to_load_from_cache(repo, "config.json", revision=revision)
            if not isinstance(cached, str):
                raise
            return Remote(repo, revision, Path(cached).parent.name, ())
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise _not_understood(source, shown(str(error))) from error
    # What is told here becomes names of files.
    if not isinstance(info.sha, str) or not re.fullmatch("[0-9a-f]{40}", info.sha):
        raise _not_understood(source, f"its commit is {shown(info.sha)}")
    if wrong := [file for file in info.siblings or () if not _is_plain(file)]:
        raise _not_understood(source, f"a file is {shown(wrong[0].rfilename)}")
    files = {
        file.rfilename: RemoteFile(
            file.rfilename,
            file.size or 0,
            file.lfs.sha256 if file.lfs else "",
            file.blob_id or "",
        )
        for file in info.siblings or ()
    }
    wanted = [files[name] for name in _needed(files, source)]
    for file in wanted:
        digits = 64 if file.sha256 else 40
        # A checksum becomes the name of a file.
        if not re.fullmatch(rf"[0-9a-f]{{{digits}}}", file.checksum):
            raise GemmaError(f"The hub states no checksum of {file.name} in {source}; try later.")
    return Remote(repo, revision, info.sha, tuple(wanted))


def _is_plain(file: Any) -> bool:
    """Whether what the hub says of a file is of the types that it should be."""
    checksum = file.lfs.sha256 if file.lfs else file.blob_id
    size = 0 if file.size is None else file.size
    return (
        isinstance(file.rfilename, str)
        and type(size) is int
        and 0 <= size < 2**60
        and (checksum is None or isinstance(checksum, str))
    )


def _not_understood(source: str, what: str) -> GemmaError:
    return GemmaError(
        f"The hub's answer to a question for {source} cannot be understood ({what}); try later."
    )


def _needed(names: Collection[str], source: str) -> list[str]:
    """The names of a checkpoint's files among all. Raises GemmaError if one is missing."""
    checkpoints = [name for name in names if _CKPT.fullmatch(name)]
    if _SINGLE in names:
        weights = [_SINGLE]
    elif _INDEX in names:
        weights = [_INDEX, *sorted(name for name in names if _SHARD.fullmatch(name))]
    elif len(checkpoints) == 1:
        weights = checkpoints
    else:
        other = "; download one of its GGUF files and give the path"
        raise GemmaError(
            f"{source} holds no {_SINGLE}, no {_INDEX} and not one .ckpt file"
            + (other if any(name.endswith(".gguf") for name in names) else "")
            + "."
        )
    tokenizers = [name for name in _TOKENIZERS if name in names]
    if not tokenizers or (weights != checkpoints and "config.json" not in names):
        missing = "config.json" if tokenizers else _TOKENIZERS[0]
        raise GemmaError(f"{source} holds no {missing}; choose a complete checkpoint of Gemma.")
    return [*(name for name in _SMALL if name in names), tokenizers[0], *weights]


def download(remote: Remote, progress: Callable[[int], None]) -> Path:
    """Fetches the files that the cache has not, and gives the folder with all of them.

    progress: called with the number of bytes that are there. Raises GemmaError if a file cannot be
    had as the hub states it, or if config.json, which comes first, is of no Gemma.
    """
    from huggingface_hub import constants  # noqa: PLC0415
    from huggingface_hub.file_download import repo_folder_name  # noqa: PLC0415

    cache = Path(constants.HF_HUB_CACHE)
    repo = cache / repo_folder_name(repo_id=remote.repo, repo_type="model")
    folder: Path = repo / "snapshots" / remote.commit
    with _explained(remote.repo, remote.revision):
        _check_space(remote, [file for file in remote.files if not (folder / file.name).exists()])
        done = 0
        for file in remote.files:
            path, blob = folder / file.name, repo / "blobs" / file.checksum
            checked = False
            if not path.exists():
                checked = _fetch(remote, file, blob, progress, done)
                _link(blob, path)
            if not checked and not file.is_at(path):
                for damaged in (path, blob):
                    damaged.unlink(missing_ok=True)
                raise _damaged(remote, file)
            if file.name == "config.json" and remote.files[-1].name.endswith(".safetensors"):
                where = f"The config.json of hf:{remote.repo}"
                config_from_hf(parse_json_object(read_file(path), where), where)
            done += file.size
            progress(done)
        if remote.files and remote.revision != remote.commit:
            # The cache then knows the revision's commit without the hub.
            ref = repo / "refs" / remote.revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            partial = ref.with_name(f"{ref.name}.incomplete")
            partial.write_text(remote.commit)
            os.replace(partial, ref)
    return folder


class _TooLong(Exception):  # noqa: N818 (no error: it says what came)
    """More bytes come than there are."""


class _Counted(io.BufferedWriter):
    """A file that is appended to, and tells how many bytes there are, with those before it."""

    def __init__(self, path: Path, size: int, progress: Callable[[int], None], before: int) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self._size, self._progress, self._before = size, progress, before

    def write(self, data: "ReadableBuffer", /) -> int:
        written = super().write(data)
        if self.tell() > self._size:
            raise _TooLong
        self._progress(self._before + self.tell())
        return written


def _fetch(
    remote: Remote, file: RemoteFile, blob: Path, progress: Callable[[int], None], before: int
) -> bool:
    """Puts a file into the cache, under its checksum.

    Gives whether that was checked; not so if the cache had it. before: bytes of other files.
    """
    from huggingface_hub import hf_hub_url  # noqa: PLC0415
    from huggingface_hub.file_download import http_get  # noqa: PLC0415
    from huggingface_hub.utils import WeakFileLock, build_hf_headers  # noqa: PLC0415

    partial = blob.with_name(f"{blob.name}.incomplete")
    repo = blob.parents[1]
    lock = repo.parent / ".locks" / repo.name / f"{blob.name}.lock"
    for path in (blob, lock):
        path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():
            return False
        if partial.exists() and partial.stat().st_size > file.size:
            partial.unlink()
        try:
            with _Counted(partial, file.size, progress, before) as out:
                http_get(
                    hf_hub_url(remote.repo, file.name, revision=remote.commit),
                    out,
                    resume_size=out.tell(),
                    # Where it stopped is a place in the file itself, not in one that is packed.
                    headers=build_hf_headers() | {"Accept-Encoding": "identity"},
                    expected_size=file.size,
                    displayed_filename=file.name,
                )
            right = file.is_at(partial)
        except _TooLong:
            right = False
        if not right:
            partial.unlink()
            raise _damaged(remote, file)
        os.replace(partial, blob)
    return True


def _link(blob: Path, path: Path) -> None:
    """Has a file's name lead to its blob; where there are no links, the blob goes there itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    link = path.with_name(f"{path.name}.incomplete")
    try:
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(blob, path.parent))
    except OSError:
        link = blob
    os.replace(link, path)


def _damaged(remote: Remote, file: RemoteFile) -> GemmaError:
    return GemmaError(
        f"{file.name} of hf:{remote.repo} did not arrive as the hub describes it (its checksum"
        " differs), and was deleted; run the command again to fetch it anew."
    )


def _check_space(remote: Remote, missing: Collection[RemoteFile]) -> None:
    from huggingface_hub import constants  # noqa: PLC0415

    cache = Path(constants.HF_HUB_CACHE).absolute()
    there = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    needed, free = sum(file.size for file in missing), shutil.disk_usage(there).free
    if needed > free:
        raise GemmaError(
            f"hf:{remote.repo} takes {needed / 1e9:.1f} GB in {cache}, where {free / 1e9:.1f} GB"
            " are free; free some space, or set HF_HOME to a folder on another disk."
        )


@contextmanager
def _explained(repo: str, revision: str) -> Iterator[None]:
    """Turns what huggingface_hub raises into a GemmaError that says what to do."""
    from huggingface_hub import constants, errors  # noqa: PLC0415

    where, page = f"hf:{repo}", f"{constants.ENDPOINT}/{repo}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise GemmaError(
            f"{where} is gated: accept its licence at {page}, then set HF_TOKEN to an access token"
            f" of yours ({constants.ENDPOINT}/settings/tokens) or log in with `hf auth login`."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise GemmaError(
            f"{where} has no revision {revision!r}; {page}/tree/main shows its branches and tags."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise GemmaError(
            f"{where} is not on the hub, or is private; check the name, and for a private one set"
            " HF_TOKEN to an access token that may read it."
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        refused = "it refuses HF_TOKEN, or the one of `hf auth login`: make a new one"
        what = refused if status in (401, 403) else "try again later, what was fetched is kept"
        raise GemmaError(f"The hub answers {status} to a question for {where}; {what}.") from error
    except errors.OfflineModeIsEnabled as error:
        raise GemmaError(
            f"{where} is not in the cache, and HF_HUB_OFFLINE forbids to ask for it; unset that."
        ) from error
    except (OSError, errors.HTTPError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise GemmaError(
                f"The disk is full: {where} cannot be downloaded to {constants.HF_HUB_CACHE}; free"
                " some space or set HF_HOME to a folder on another disk. What was fetched is kept."
            ) from error
        raise GemmaError(
            f"{where} cannot be downloaded ({' '.join(str(error).split()):.200}); check the"
            " connection and run the command again: it goes on where it stopped."
        ) from error
