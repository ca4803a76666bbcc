"""The configuration file: what it sets, what counts more, and what it says of mistakes."""

import json
import re
from pathlib import Path

import pytest
from program import Cli

ANSWER = ("run", "-m", "base", "the man", "--json")


@pytest.fixture
def file(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> Path:
    """The configuration file of a home with the usual models."""
    for name in ("models", "cache"):
        (tmp_path / name).symlink_to(home / name)
    monkeypatch.setenv("GEMMA_CLI_HOME", str(tmp_path))
    return tmp_path / "config.toml"


def in_force(cli: Cli, command: str) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = json.loads(cli("config", "--json").out)["commands"][
        command
    ]
    return found


def test_options_beat_the_environment_and_that_the_file(
    cli: Cli, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("run", "the man").status == 1  # two models to choose from
    file.write_text("model = 'base'\nmax-tokens = 3\ntemperature = 0\n[run]\nmax-tokens = 4\n")
    made = cli("run", "the man", "--json").json
    assert made["completion_tokens"] == 4
    assert made["ids"] == cli(*ANSWER, "-t", "0", "-n", "4").json["ids"]
    assert cli("run", "the man", "--json", "-n", "2").json["completion_tokens"] == 2
    mapped = json.loads(cli("map", "the", "--ndjson", stdin=b"man\n").out)
    assert mapped["completion_tokens"] == 3

    where = {"base": "file", "chat": "environment"}
    assert in_force(cli, "run")["model"] == {"value": "base", "from": where["base"]}
    monkeypatch.setenv("GEMMA_CLI_MODEL", "chat")
    about = {"value": "chat", "from": where["chat"], "variable": "GEMMA_CLI_MODEL"}
    assert in_force(cli, "run")["model"] == about
    assert cli("run", "the man", "--json").json["ids"] != made["ids"]
    assert cli("run", "-m", "base", "the man", "--json").json["ids"] == made["ids"]


def test_switches_lists_and_their_contraries(cli: Cli, file: Path) -> None:
    text = str(cli(*ANSWER, "-t", "0", "-n", "30").json["text"])
    stop = text[10:14]
    file.write_text(
        f"[run]\nstop = [{json.dumps(stop)}, 'not there']\nno-draft = true\njson = true"
    )
    made = cli("run", "-m", "base", "the man", "-t", "0", "-n", "30").json
    assert made["text"] == text[: text.index(stop)]
    run = in_force(cli, "run")
    assert run["stop"] == {"value": [stop, "not there"], "from": "file"}
    assert run["draft"] == {"value": False, "from": "file"}
    assert in_force(cli, "chat")["draft"] == {"value": True, "from": "default"}
    file.write_text("[run]\nstop = 'one'")
    assert in_force(cli, "run")["stop"] == {"value": ["one"], "from": "file"}


def test_what_config_shows(cli: Cli, file: Path) -> None:
    result = cli("config")
    assert (result.status, "nothing is set" in result.err) == (0, True)
    assert {line.split()[-1] for line in result.out.splitlines()} == {"from", "default"}
    assert cli("config", "--path").out == f"{file}\n"
    file.write_text("temperature = 0.5\n[chat]\nplain = true\n[run]\nthreads = 1\n")
    result = cli("config")
    assert result.err == f"{file}\n"
    rows = [re.split("  +", line) for line in result.out.splitlines()]
    assert sorted(rows[-3:]) == [
        ["plain", "true", "file"],
        ["run.threads", "1", "file"],
        ["temperature", "0.5", "file"],
    ]
    rows = [re.split("  +", line) for line in cli("config", "run").out.splitlines()]
    assert ["threads", "1", "file"] in rows
    assert ["kv", "f16", "default"] in rows
    assert "plain" not in [name for name, *_ in rows]
    assert json.loads(cli("config", "run", "--json").out)["commands"].keys() == {"run"}
    result = cli("config", "rum")
    assert (result.status, "did you mean run?" in result.err) == (2, True)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("temprature = 1", "has 'temprature', .* any command .did you mean temperature?"),
        ("[run]\ntop_k = 1", "has 'top_k' in .run., .*`gemma-cli run` .did you mean top-k?"),
        ("[rnu]", "has the table 'rnu', .*did you mean run?"),
        ("[sessions]", "has the table 'sessions', which is no command that has defaults"),
        ("threads = 'two'", "has threads = 'two' where a whole number belongs"),
        ("threads = true", "has threads = True where a whole number belongs"),
        ("seed = 1.5", "has seed = 1.5 where a whole number belongs"),
        ("temperature = '1'", "has temperature = '1' where a number belongs"),
        ("model = 3", "has model = 3 where a text belongs"),
        ("[chat]\nplain = 1", "has, in .chat., plain = 1 where true or false belongs"),
        ("stop = [1]", "has stop = .1. where a text, or a list of them belongs"),
        ("temperature = -1", "has temperature = -1: .*0"),
        ("[run]\nkv = 'int3'", "has, in .run., kv = 'int3': .*f16"),
        ("[quantize]\nbits = 5", "has, in .quantize., bits = 5: 5 is not one of 4, 8, 16, 32"),
        ("model =", "is not valid TOML"),
    ],
)
def test_mistakes(cli: Cli, file: Path, text: str, reason: str) -> None:
    file.write_text(text)
    for args in (["models"], ["run", "-m", "base", "a"], ["config"]):
        result = cli(*args)
        assert (result.status, result.out) == (1, "")
        assert re.fullmatch(f"gemma-cli: {re.escape(str(file))} {reason}[^\n]*\\.\n", result.err)
    for args in (["config", "--path"], ["run", "--help"], ["completion", "bash"]):
        assert cli(*args).status == 0
    assert cli("_complete", "--", "run", "-m", "").out == "base\t\nchat\t\n"


def test_a_file_that_cannot_be_read(cli: Cli, file: Path) -> None:
    file.mkdir()
    result = cli("models")
    assert (result.status, result.out) == (1, "")
    assert result.err == f"gemma-cli: {file} cannot be read: Is a directory.\n"


@pytest.mark.parametrize("command", ["chat", "run"])
def test_a_session_keeps_what_it_has(cli: Cli, file: Path, command: str) -> None:
    """Defaults are for those that begin."""

    def say(*args: str) -> dict[str, object]:
        made = cli(command, "--session", "one", "--json", *args, stdin=b"ten hens\n")
        assert made.status == 0
        return json.loads(made.out)  # type: ignore[no-any-return]

    file.write_text("model = 'chat'\nmax-tokens = 3\ntemperature = 0\nsystem = 'be lean'\n")
    assert say()["completion_tokens"] == 3
    file.write_text("model = 'base'\nmax-tokens = 5\nseed = 4\nsystem = 'be mean'\n")
    assert say()["completion_tokens"] == 3
    kept = json.loads(cli("sessions", "show", "one", "--json").out)
    assert (kept["model"], kept["settings"]) == ("chat", {"max_tokens": 3, "temperature": 0})
    assert kept["messages"][0] == {"role": "system", "content": "be lean"}
    assert say("-n", "2")["completion_tokens"] == 2  # unless it is told otherwise


def test_a_path_from_the_home(
    cli: Cli, file: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(home))
    file.write_text("model = '~/models/base.safetensors'\n")
    assert (
        cli("run", "the man", "-t", "0", "--json").json["ids"]
        == cli(*ANSWER, "-t", "0").json["ids"]
    )
