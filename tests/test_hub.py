"""Checkpoints of the hub, from a server of our own that speaks as much of its interface as counts.

The interface is documented at https://huggingface.co/docs/hub/api; what huggingface_hub reads of it
is in its hf_api.py (model_info) and file_download.py (headers of /resolve).
"""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

import pytest
from checkpoints import random_weights, tiny, write_hf

from quantize.checkpoint import hub, open_checkpoint
from quantize.errors import GemmaError
from quantize.modelfile import ModelFile

COMMIT, OLDER = "c" * 40, "0" * 40
CONFIG = tiny("gemma3")
LARGE = (".safetensors", ".ckpt", ".model", ".gguf")


@dataclass
class Hub:
    """A server with one repository, and what it shall do wrong."""

    files: dict[str, bytes] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    token: str = ""  # refuses others
    cdn: bool = False  # serves large files from another host, by a redirect
    moved: bool = False  # the repository has got another name
    break_after: int = 0  # bytes, then the connection is closed
    breaks: int = 10**9  # how often it does so
    corrupt: str = ""  # a file of which a byte is changed on its way
    stated_sha256: str | None = None
    stated_sha1: str | None = None
    stated_info: bytes | None = None  # the whole answer
    stated_headers: dict[str, str] = field(default_factory=dict)  # of files
    endless: bool = False  # files have no end
    status: int = 0  # of every answer
    requests: Counter[str] = field(default_factory=Counter)
    ranges: list[str] = field(default_factory=list)
    tokens_at_cdn: list[str | None] = field(default_factory=list)
    sent: int = 0
    url: str = ""
    cdn_url: str = ""

    def info(self) -> dict[str, Any]:
        siblings = []
        for name, data in self.files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            entry: dict[str, Any] = {"rfilename": name, "size": len(data)}
            entry["blobId"] = blob if self.stated_sha1 is None else self.stated_sha1
            if name.endswith(LARGE):
                digest = self.stated_sha256 or hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        return {"id": "google/gemma-tiny", "sha": COMMIT, "siblings": siblings}

    def etag(self, name: str) -> str:
        entry = next(e for e in self.info()["siblings"] if e["rfilename"] == name)
        digest: str = entry["lfs"]["sha256"] if "lfs" in entry else entry["blobId"]
        return digest


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests[f"{self.command} {path}"] += 1
        if path.startswith("/cdn/"):
            hub.tokens_at_cdn.append(self.headers["Authorization"])
            self.send_file(path.removeprefix("/cdn/"), {})
            return
        if hub.status:
            self.answer(hub.status)
            return
        if hub.token and self.headers["Authorization"] not in {f"Bearer {hub.token}", None}:
            self.answer(401, X_Error_Message="Invalid credentials in Authorization header")
            return
        if hub.private or "/gemma-tiny" not in path:
            self.answer(404, X_Error_Code="RepoNotFound")
            return
        if hub.moved and "/old/" in path:
            self.answer(307, Location=self.path.replace("/old/", "/google/"))
            return
        owner = "old" if "/old/" in path else "google"
        api, _, revision = path.partition("/revision/")
        if api == f"/api/models/{owner}/gemma-tiny":
            if revision not in {"", "main", "v1", "refs/pr/1", COMMIT}:
                self.answer(404, X_Error_Code="RevisionNotFound")
                return
            body = json.dumps(hub.info()).encode() if hub.stated_info is None else hub.stated_info
            self.answer(200, body, Content_Type="application/json")
            return
        name = path.rpartition("/")[2]
        if hub.gated and self.headers["Authorization"] != "Bearer right":
            self.answer(403 if self.headers["Authorization"] else 401, X_Error_Code="GatedRepo")
            return
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hub.etag(name)}"'}
        if name.endswith(LARGE) and hub.cdn:
            linked = {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(hub.files[name]))}
            self.answer(302, Location=f"{hub.cdn_url}/cdn/{name}", **headers, **linked)
            return
        if hub.stated_headers:
            headers |= hub.stated_headers
            kinds = {"X-Error-Code": 404, "Location": 302}
            if kind := kinds.keys() & headers.keys():
                self.answer(kinds[kind.pop()], **headers)
                return
        self.send_file(name, headers)

    def send_file(self, name: str, headers: dict[str, str]) -> None:
        hub, data = self.hub, self.hub.files[name]
        if name == hub.corrupt:
            data = data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
        start = 0
        if asked := self.headers["Range"]:
            hub.ranges.append(asked)
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        headers["Content-Length"] = str(len(body))
        if hub.endless:
            del headers["Content-Length"]
            body += bytes(10**6)
            self.close_connection = True
        self.send_response(206 if asked else 200)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if name.endswith(".safetensors") and 0 < hub.break_after < len(body) and hub.breaks > 0:
            hub.breaks -= 1
            body = body[: hub.break_after]
            self.close_connection = True
        hub.sent += len(body)  # before the client can ask for it
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is no error."""


def serve() -> tuple[Server, str]:
    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[str, str]]:
    """The addresses of the hub and of a host for large files.

    huggingface_hub reads its settings when it is imported; nothing else in the tests does that.
    """
    (one, url), (two, cdn_url) = serve(), serve()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", url)
        for name in [name for name in sys.modules if name.split(".")[0] == "huggingface_hub"]:
            del sys.modules[name]
        from huggingface_hub import constants  # noqa: PLC0415

        assert url == constants.ENDPOINT
        yield url, cdn_url
    one.shutdown()
    two.shutdown()


@pytest.fixture(scope="module")
def checkpoint_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_hf(folder, CONFIG, random_weights(CONFIG))
    (folder / "generation_config.json").write_text('{"top_k": 64}')
    (folder / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def remote_hub(
    servers: tuple[str, str],
    checkpoint_files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Hub:
    from huggingface_hub import constants  # noqa: PLC0415

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # of 10 MB
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts
    more = {"README.md": b"x", "model-00001-of-00002.bin": b"x", "tokenizer.json": b"{}"}
    Handler.hub = Hub(dict(checkpoint_files) | more)
    Handler.hub.url, Handler.hub.cdn_url = servers
    return Handler.hub


SOURCE = "hf:google/gemma-tiny"


def fetch(source: str = SOURCE) -> Path:
    return hub.download(hub.look_up(source), lambda done: None)


def assert_is_checkpoint(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.config, checkpoint.chat) == (CONFIG, "gemma")
    assert checkpoint.sampling == {"top_k": 64.0}


def leftovers(tmp_path: Path) -> list[Path]:
    return list(tmp_path.rglob("*.incomplete"))


def test_only_what_is_needed_is_fetched(remote_hub: Hub, tmp_path: Path) -> None:
    remote = hub.look_up(SOURCE)
    assert remote.origin == f"{SOURCE}@{COMMIT}"
    assert remote.n_bytes == sum(len(remote_hub.files[file.name]) for file in remote.files)
    seen: list[int] = []
    folder = hub.download(remote, seen.append)
    assert_is_checkpoint(folder)
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "model.safetensors",
    }
    assert folder == tmp_path / "cache/models--google--gemma-tiny/snapshots" / COMMIT
    assert seen == sorted(seen)
    assert seen[-1] == remote.n_bytes
    # Again: nothing is sent but answers about the files.
    sent = remote_hub.sent
    assert fetch() == folder
    assert remote_hub.sent == sent
    assert not leftovers(tmp_path)


def test_huggingface_hub_finds_what_was_fetched(remote_hub: Hub) -> None:
    from huggingface_hub import hf_hub_download  # noqa: PLC0415

    folder, sent = fetch(), remote_hub.sent
    path = hf_hub_download("google/gemma-tiny", "model.safetensors")
    assert Path(path) == folder / "model.safetensors"
    assert remote_hub.sent == sent


def test_shards(remote_hub: Hub) -> None:
    whole = remote_hub.files.pop("model.safetensors")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    remote_hub.files |= {"model.safetensors.index.json": b"{}", names[0]: whole, names[1]: whole}
    remote_hub.files["consolidated.safetensors"] = whole
    files = [file.name for file in hub.look_up(SOURCE).files]
    assert files[-3:] == ["model.safetensors.index.json", *names]
    assert "consolidated.safetensors" not in files


@pytest.mark.parametrize("revision", ["main", "v1", "refs/pr/1", COMMIT])
def test_revisions(remote_hub: Hub, revision: str) -> None:
    assert_is_checkpoint(fetch(f"{SOURCE}@{revision}"))


def test_large_files_of_another_host_get_no_token(
    remote_hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "right")
    remote_hub.cdn = remote_hub.gated = True
    assert_is_checkpoint(fetch())
    assert remote_hub.tokens_at_cdn == [None, None]


def test_a_repository_that_was_renamed(remote_hub: Hub) -> None:
    remote_hub.moved = True
    assert_is_checkpoint(fetch("hf:old/gemma-tiny"))


def test_where_there_are_no_links(
    remote_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("[WinError 1314] A required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    folder, sent = fetch(), remote_hub.sent
    assert_is_checkpoint(folder)
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))
    assert fetch() == folder
    assert remote_hub.sent == sent


@pytest.mark.parametrize("cdn", [False, True])
def test_a_connection_that_breaks_is_taken_up_again(remote_hub: Hub, cdn: bool) -> None:
    remote_hub.cdn, remote_hub.break_after, remote_hub.breaks = cdn, 50_000, 2
    seen: list[int] = []
    remote = hub.look_up(SOURCE)
    assert_is_checkpoint(hub.download(remote, seen.append))
    assert remote_hub.ranges == ["bytes=50000-", "bytes=100000-"]
    assert remote_hub.sent == remote.n_bytes
    assert (seen, seen[-1]) == (sorted(seen), remote.n_bytes)


def test_a_later_run_goes_on_where_it_stopped(
    remote_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = hub.look_up(SOURCE)
    size = len(remote_hub.files["model.safetensors"])

    def interrupt(done: int) -> None:
        if done > remote.n_bytes - size // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.download(remote, interrupt)
    (partial,) = leftovers(tmp_path)
    there = partial.stat().st_size
    assert size // 2 - 10_000 < there < size
    assert_is_checkpoint(fetch())
    assert remote_hub.ranges == [f"bytes={there}-"]
    assert not leftovers(tmp_path)


def test_what_was_kept_can_be_wrong(remote_hub: Hub, tmp_path: Path) -> None:
    remote = hub.look_up(SOURCE)
    file = remote.files[-1]
    blobs = tmp_path / "cache/models--google--gemma-tiny/blobs"
    blobs.mkdir(parents=True)
    partial = blobs / f"{file.sha256}.incomplete"
    partial.write_bytes(bytes(file.size + 1))  # too long: begun anew
    assert_is_checkpoint(fetch())
    shutil.rmtree(tmp_path / "cache")
    blobs.mkdir(parents=True)
    partial.write_bytes(bytes(100))  # other bytes
    with pytest.raises(GemmaError, match=r"model\.safetensors.*checksum"):
        fetch()
    assert not leftovers(tmp_path)
    assert_is_checkpoint(fetch())


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.model", "config.json"])
def test_a_corrupted_file_is_refused(remote_hub: Hub, tmp_path: Path, name: str) -> None:
    remote_hub.corrupt = name
    with pytest.raises(GemmaError, match=rf"{name}.*checksum differs.*deleted"):
        fetch()
    assert not list(tmp_path.rglob(name))
    assert not leftovers(tmp_path)
    remote_hub.corrupt = ""
    assert_is_checkpoint(fetch())


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_was_changed_in_the_cache(remote_hub: Hub, name: str) -> None:
    path = fetch() / name
    data = path.read_bytes()
    path.write_bytes(data[:-9] + b"x" + data[-8:])
    with pytest.raises(GemmaError, match=rf"{name}.*checksum differs.*deleted"):
        fetch()
    assert_is_checkpoint(fetch())


def test_checksums_that_are_none(remote_hub: Hub) -> None:
    for digest in ("-", "../../x", "A" * 64, "0" * 63):
        remote_hub.stated_sha256 = digest
        with pytest.raises(GemmaError, match="no checksum"):
            hub.look_up(SOURCE)
    remote_hub.stated_sha256 = None
    for digest in ("", "0" * 39, "0" * 64):
        remote_hub.stated_sha1 = digest
        with pytest.raises(GemmaError, match=r"no checksum of config\.json"):
            hub.look_up(SOURCE)


def stated(**changes: object) -> dict[str, object]:
    return {"id": "google/gemma-tiny", "sha": COMMIT, "siblings": []} | changes


def sibling(**changes: object) -> dict[str, object]:
    entry = {"rfilename": "config.json", "size": 9, "blobId": "0" * 40}
    return stated(siblings=[entry | changes])


ANSWERS: dict[str, object] = {
    "nothing": b"",
    "no JSON": b"<html>\x1b]0;x\x07",
    "no UTF-8": b"\xff\xfe{}",
    "no object": [],
    "a number": 5,
    "nested": b'{"id": ' + b"[" * 100_000,
    "a number of 5000 digits": b'{"id": "x", "sha": ' + b"9" * 5000 + b"}",
    "no id": {},
    "an id that is a list": stated(id=[]),
    "no commit": stated(sha=None),
    "a commit elsewhere": stated(sha="../../../evil"),
    "a commit of escapes": stated(sha="\x1b[2J\u202e"),
    "a commit that is an object": stated(sha={}),
    "files that are a text": stated(siblings="x"),
    "files that are numbers": stated(siblings=[1, 2]),
    "files without names": stated(siblings=[{}]),
    "no files": stated(),
    "a name elsewhere": sibling(rfilename="../../config.json"),
    "an absolute name": sibling(rfilename="/etc/passwd"),
    "a name with NUL": sibling(rfilename="config.json\0"),
    "a name of escapes": sibling(rfilename="\x1b]52;c;AA\x07.gguf"),
    "a name that is a number": sibling(rfilename=5),
    "a negative size": sibling(size=-1),
    "a size of text": sibling(size="9"),
    "a size of 10^30": sibling(size=10**30),
    "a checksum that is a list": sibling(blobId=[]),
    "a checksum elsewhere": sibling(lfs={"sha256": "../x", "size": 9, "pointerSize": 1}),
    "large file storage of text": sibling(lfs="x"),
    "large file storage without a checksum": sibling(lfs={"size": 9}),
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_hostile_answers(remote_hub: Hub, tmp_path: Path, answer: object) -> None:
    body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    remote_hub.stated_info = body
    with pytest.raises(GemmaError) as caught:
        fetch()
    sentence = str(caught.value)
    assert sentence.isprintable(), ascii(sentence)
    assert "gemma-tiny" in sentence
    assert len(sentence) < 1000
    assert not list(tmp_path.rglob("config.json"))


ELSEWHERE = {
    "an own file above": "../../../own",
    "a new file above": "../../../new",
    "an own file, absolute": "{folder}/own",
    "a new file, absolute": "{folder}/new",
    "above a file": "config.json/../../../../own",
    "this folder": ".",
    "empty": "",
    "very long": "x" * 5000,
    "with NUL": "x\0y",
    "escapes": "\x1b]0;x\x07",
    "bytes": "\xff\xfe",
}


@pytest.mark.parametrize("value", ELSEWHERE.values(), ids=ELSEWHERE)
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("header", ["X-Repo-Commit", "ETag", "X-Linked-Etag"])
def test_headers_name_no_files(
    remote_hub: Hub, tmp_path: Path, header: str, missing: bool, value: str
) -> None:
    """What a program that takes them for names would write, link to, or delete."""
    own = tmp_path / "own"
    own.write_text("not the hub's")
    remote_hub.stated_headers = {header: value.format(folder=tmp_path)}
    if missing:
        remote_hub.stated_headers["X-Error-Code"] = "EntryNotFound"
    if missing or "\0" in value:  # which no header may hold
        with pytest.raises(GemmaError, match=SOURCE) as caught:
            fetch()
        assert str(caught.value).isprintable()
    else:
        assert_is_checkpoint(fetch())
    assert own.read_text() == "not the hub's"
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "own"}
    repo = tmp_path / "cache/models--google--gemma-tiny"
    assert {path.name for path in repo.parent.iterdir()} == {".locks", repo.name}
    assert {path.name for path in repo.iterdir()} <= {"blobs", "refs", "snapshots"}
    remote_hub.stated_headers = {}
    assert_is_checkpoint(fetch())


@pytest.mark.parametrize(
    "place", ["file:///etc/passwd", "//", "http://[", "gopher://x/", "/x" * 5000, "\x1b[2J", "\xff"]
)
def test_places_that_are_none(remote_hub: Hub, place: str) -> None:
    remote_hub.stated_headers = {"Location": place}
    with pytest.raises(GemmaError, match=SOURCE) as caught:
        fetch()
    assert str(caught.value).isprintable()
    remote_hub.stated_headers = {}
    assert_is_checkpoint(fetch())


def test_a_file_without_an_end_does_not_fill_the_disk(remote_hub: Hub, tmp_path: Path) -> None:
    remote_hub.endless = True
    with pytest.raises(GemmaError, match=r"config\.json.*deleted"):
        fetch()
    assert not leftovers(tmp_path)
    remote_hub.endless = False
    assert_is_checkpoint(fetch())


@pytest.mark.parametrize("token", [None, "wrong"])
def test_a_gated_repository(
    remote_hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str | None
) -> None:
    remote_hub.gated = True
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(GemmaError, match=r"accept its licence at .*/google/gemma-tiny.*HF_TOKEN"):
        fetch()
    monkeypatch.setenv("HF_TOKEN", "right")
    assert_is_checkpoint(fetch())


def test_a_token_that_is_not_valid(remote_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    remote_hub.token = "right"
    monkeypatch.setenv("HF_TOKEN", "expired")
    with pytest.raises(GemmaError, match=r"401.*refuses HF_TOKEN"):
        fetch()


def test_what_is_not_there(remote_hub: Hub) -> None:
    with pytest.raises(GemmaError, match="no revision 'v2'"):
        fetch(f"{SOURCE}@v2")
    with pytest.raises(GemmaError, match="is not on the hub, or is private"):
        fetch("hf:google/gemma-large")
    remote_hub.private = True
    with pytest.raises(GemmaError, match="is not on the hub, or is private"):
        fetch()
    remote_hub.private, remote_hub.status = False, 500
    with pytest.raises(GemmaError, match=r"answers 500.*try again later"):
        fetch()


@pytest.mark.parametrize(
    "source",
    [
        *("hf:", "hf:gemma", "hf:google/", "hf:/gemma", "hf:a/b/c", "hf:google/gemma@"),
        *("hf:google/gemma@../x", "hf:../gemma", "hf:google/..", "hf:google/ge mma", "hf:g/é"),
        *("hf:google/gemma@/etc/x", "hf:google/gemma@-x"),
        *("hf:google/gemma@a b", "hf:google/gemma\n", "hf:google/gemma?x=1", "hf://google/gemma"),
    ],
)
def test_what_names_no_repository(remote_hub: Hub, source: str) -> None:
    with pytest.raises(GemmaError, match="names no repository"):
        fetch(source)
    assert not remote_hub.requests


def test_repositories_of_something_else(remote_hub: Hub, tmp_path: Path) -> None:
    files = remote_hub.files
    weights = files.pop("model.safetensors")
    files["gemma-tiny-Q4_0.gguf"] = b"GGUF"
    with pytest.raises(GemmaError, match=r"no model\.safetensors.*download one of its GGUF"):
        fetch()
    del files["gemma-tiny-Q4_0.gguf"]
    with pytest.raises(GemmaError, match=r"not one \.ckpt file\.$"):
        fetch()
    files["model.safetensors"] = weights
    config = files.pop("config.json")
    with pytest.raises(GemmaError, match=r"no config\.json"):
        fetch()
    files["config.json"] = config.replace(b"gemma3_text", b"llama")
    with pytest.raises(GemmaError, match="'llama'"):
        fetch()
    assert not list(tmp_path.rglob("model.safetensors"))  # seen before that was fetched
    files["config.json"] = config
    del files["tokenizer.model"], files["tokenizer.json"]
    with pytest.raises(GemmaError, match=r"no tokenizer\.model"):
        fetch()


def test_a_ckpt_file(remote_hub: Hub) -> None:
    tests = Path(__file__).parent
    golden, path = tests / "golden", tests / "written/torch/gemma-2b-it.ckpt"
    remote_hub.files.clear()
    remote_hub.files[path.name] = path.read_bytes()
    for name in ("config.json", "tokenizer.model"):
        remote_hub.files[name] = (golden / "gemma-mqa" / name).read_bytes()
    assert open_checkpoint(fetch()).config == open_checkpoint(golden / "gemma-mqa").config


def test_without_a_connection(remote_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants  # noqa: PLC0415

    nowhere = "http://127.0.0.1:9"  # the port of the service "discard"
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", nowhere)
        with pytest.raises(GemmaError, match=r"cannot be downloaded.*check the connection"):
            fetch()
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(GemmaError, match="not in the cache, and HF_HUB_OFFLINE"):
            fetch()
    folder = fetch()
    for settings in ({"ENDPOINT": nowhere}, {"HF_HUB_OFFLINE": True}):
        with monkeypatch.context() as patch:
            for key, value in settings.items():
                patch.setattr(constants, key, value)
            remote_hub.requests.clear()
            assert fetch() == folder
            assert not remote_hub.requests
            assert hub.look_up(SOURCE).origin == f"{SOURCE}@{COMMIT}"


def test_a_disk_that_is_full(
    remote_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
        with pytest.raises(GemmaError, match=r"takes 0\.0 GB in .*HF_HOME"):
            fetch()
    assert not any(name.startswith("GET /google") for name in remote_hub.requests)

    write = hub._Counted.write

    def fill(self: BinaryIO, data: bytes) -> int:
        if self.tell() > 100_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, data)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(hub._Counted, "write", fill)
        with pytest.raises(GemmaError, match=r"The disk is full.*HF_HOME.*is kept"):
            fetch()
    assert len(leftovers(tmp_path)) == 1
    assert_is_checkpoint(fetch())


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(GemmaError, match=r"pip install 'gemma-cli\[hub\]'"):
        hub.look_up(SOURCE)


def test_nothing_else_imports_the_package() -> None:
    code = (
        "import sys, quantize.pipeline, gemma_cli.cli.quantize, quantize.checkpoint.hub; "
        "assert not {'huggingface_hub', 'http.client'} & set(sys.modules)"
    )
    root = str(Path(__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": root})


# The whole program


def program(remote_hub: Hub, tmp_path: Path, *args: str) -> subprocess.Popen[str]:
    root = str(Path(__file__).parents[1])
    environment = os.environ | {
        "HF_ENDPOINT": remote_hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "GEMMA_CLI_HOME": str(tmp_path / "home"),
        "PYTHONPATH": root,
    }
    command = [sys.executable, "-m", "gemma_cli", "quantize", *args]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


def test_the_command(remote_hub: Hub, tmp_path: Path) -> None:
    with program(remote_hub, tmp_path, SOURCE, "--bits", "8") as process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    assert len(out.splitlines()) == 1
    assert err.startswith("Next: gemma-cli run -m gemma-tiny-int8")  # no progress, no warnings
    file = ModelFile.open(tmp_path / "home" / "models" / "gemma-tiny-int8.safetensors")
    assert file.source == f"{SOURCE}@{COMMIT}"
    remote_hub.gated = True
    shutil.rmtree(tmp_path / "hf")
    with program(remote_hub, tmp_path, SOURCE) as process:
        out, err = process.communicate()
    assert (process.returncode, out, len(err.splitlines())) == (1, "", 1)
    assert "accept its licence" in err
