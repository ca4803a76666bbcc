"""What scripts ask of the program: answers of a given form, logprobs, counts, texts that fit."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jsonschema import Draft202012Validator
from program import Cli, load, program

from gemma_cli import constraint
from gemma_cli.text.chat import raw_prompt

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "ages": {"type": "array", "items": {"type": "integer", "maximum": 99}, "maxItems": 3},
        "kind": {"enum": ["hen", "ham"]},
    },
    "required": ["name", "ages", "kind"],
    "additionalProperties": False,
}
CUT_OFF = r"The answer was cut off after (\d+) tokens, before it had the form [^\n]+\."


@pytest.mark.parametrize("model", ["base", "chat"])
@pytest.mark.parametrize("temperature", ["0", "1"])
def test_json_of_a_schema(cli: Cli, tmp_path: Path, model: str, temperature: str) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    args = ("run", "-m", model, "a ham", "-t", temperature, "--seed", "3", "--json-schema")
    result = cli(*args, file)
    assert (result.status, result.err) == (0, "")
    Draft202012Validator(SCHEMA).validate(json.loads(result.out))
    assert cli(*args, json.dumps(SCHEMA)).out == result.out
    whole = cli(*args, file, "--json").json
    assert (whole["text"], whole["finish_reason"]) == (result.out, "stop")
    assert cli(*args, file, "--json", "--no-draft").json["ids"] == whole["ids"]
    *pieces, last = cli(*args, file, "--ndjson").out.splitlines()
    assert "".join(json.loads(piece)["token"] for piece in pieces) == result.out
    assert json.loads(last)["ids"] == whole["ids"]


def test_the_other_forms(cli: Cli) -> None:
    args = ("run", "-m", "base", "the man", "--seed", "1")
    assert re.fullmatch("[a-z]{3,5}!", cli(*args, "--regex", "^[a-z]{3,5}!$").out)
    assert cli(*args, "--choice", "ten hens", "--choice", "a\nham").out in ("ten hens", "a\nham")
    made = json.loads(cli(*args, "-t", "0", "--schema", "here bool, there bool").out)
    assert {key: type(value) for key, value in made.items()} == {"here": bool, "there": bool}


def test_an_answer_that_is_cut_off(cli: Cli) -> None:
    """No part of it is printed for an answer."""
    args = ("run", "-m", "base", "the man", "--regex", "[a-z]{50}", "-n", "4")
    result = cli(*args)
    assert (result.status, result.out) == (1, "")
    found = re.fullmatch(f"gemma-cli: {CUT_OFF}\n", result.err)
    assert found
    assert found[1] == "4"
    for option in ("--json", "--ndjson"):
        result = cli(*args, option)
        last = json.loads(result.out.splitlines()[-1])
        assert (result.status, last["finish_reason"], len(last["ids"])) == (1, "length", 4)
        assert re.search(CUT_OFF, result.err)
    # A full context cuts off, too.
    result = cli("run", "-m", "base", "the man", "--regex", "[a-z]{50}", "-c", "8")
    assert (result.status, result.out) == (1, "")
    # What matches as it is can be longer or not, and counts.
    result = cli("run", "-m", "base", "the man", "--regex", "[a-z ]*", "-n", "4", "--json")
    assert (result.status, result.err) == (0, "")
    assert re.fullmatch("[a-z ]*", str(result.json["text"]))


def test_map_keeps_to_a_form(cli: Cli) -> None:
    lines = ["ham", "a hen", "", "the man met ten men"]
    args = ("-m", "base", "--seed", "4", "--regex", "(no|yes), [0-9]{1,3}")
    result = cli("map", "eat", *args, "--ndjson", stdin="\n".join(lines).encode())
    assert (result.status, result.err) == (0, "")
    made = [json.loads(line) for line in result.out.splitlines()]
    assert [answer["input"] for answer in made] == lines
    for i, answer in enumerate(made):
        assert re.fullmatch("(no|yes), [0-9]{1,3}", answer["text"])
        alone = cli(
            "run", "eat", *args, "--seed", str(4 + i), "--json", stdin=lines[i].encode()
        ).json
        assert answer["ids"] == alone["ids"]
    plain = cli("map", "eat", *args, stdin="\n".join(lines).encode())
    assert plain.out.splitlines() == [answer["text"] for answer in made]


def test_map_says_which_answers_are_cut_off(cli: Cli) -> None:
    args = ("map", "-m", "base", "-t", "0", "eat", "-n", "3", "--regex", "a{40}|[b-z]")
    lines = [f"{word} {other}" for word in ("ham", "hen", "man") for other in ("a", "the", "ten")]
    result = cli(*args, "--ndjson", stdin="\n".join(lines).encode())
    made = [json.loads(line) for line in result.out.splitlines()]
    failed = [answer for answer in made if "error" in answer]
    assert [answer["index"] for answer in made] == list(range(len(lines)))
    for answer in made:
        if "error" in answer:
            assert list(answer) == ["index", "input", "error"]
            assert re.fullmatch(CUT_OFF, answer["error"])
        else:
            assert re.fullmatch("[b-z]", answer["text"])
    assert result.status == bool(failed)
    plain = cli(*args, stdin="\n".join(lines).encode())
    assert plain.status == result.status
    assert plain.out.split("\n")[:-1] == [answer.get("text", "") for answer in made]
    assert len(plain.err.splitlines()) == len(failed)
    every = cli("map", "-m", "base", "eat", "-n", "3", "--regex", "[a-z]{60}", stdin=b"ham\nhen\n")
    assert (every.status, every.out) == (1, "\n\n")
    assert re.fullmatch(f"gemma-cli: Line 1: {CUT_OFF}\ngemma-cli: Line 2: {CUT_OFF}\n", every.err)


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--regex", "(a"], "regex"),
        (["--json-schema", '{"type": "objec"}'], "objec"),
        (["--json-schema", "{"], "json-schema"),
        (["--schema", "name text"], "name text"),
        (["--choice", ""], "empty"),
        (["--choice", "a", "--regex", "b"], "one form"),
        (["--choice", "a", "--stop", "b"], "--stop"),
        (["--logprobs", "2"], "json"),
        (["--logprobs", "-1", "--json"], "logprobs"),
        (["--truncate", "sides"], "middle"),
    ],
)
def test_forms_that_cannot_be(cli: Cli, args: list[str], reason: str) -> None:
    for command in ("run", "map"):
        result = cli(command, "-m", "base", "a", *args)
        assert (result.status, result.out) == (2, "")
        assert reason in result.err
        assert "Traceback" not in result.err


def test_schema_files_that_cannot_be_used(cli: Cli, tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('{"not": {}}')
    for file in (bad, tmp_path / "none.json", tmp_path):
        result = cli("run", "-m", "base", "a", "--json-schema", file)
        assert (result.status, result.out) == (1, "")
        assert re.fullmatch(f"gemma-cli: {re.escape(str(file))} [^\n]+\\.\n", result.err)


def test_without_llguidance(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraint, "llguidance", None)
    result = cli("run", "-m", "base", "a", "--choice", "b")
    assert (result.status, "pip install 'gemma-cli[constrained]'" in result.err) == (1, True)


def test_logprobs(cli: Cli, home: Path) -> None:
    args = ("-m", "base", "--top-k", "3", "--seed", "2", "-n", "9", "--logprobs", "2")
    whole = cli("run", *args, "--json", "the man").json
    model, tokenizer = load(home, "base")
    context = raw_prompt(tokenizer, "the man")
    ids, logprobs = whole["ids"], whole["logprobs"]
    assert isinstance(ids, list)
    assert isinstance(logprobs, list)
    assert [of_id["id"] for of_id in logprobs] == ids
    for token, of_id in zip(ids, logprobs, strict=True):
        logits = model.forward(context, model.new_cache(len(context))).astype(np.float64)
        exact = logits - np.log(np.exp(logits).sum())
        order = np.argsort(-exact, kind="stable")[:2].tolist()
        assert of_id["piece"] == tokenizer.piece(token)
        # float32 logits, from keys and values rounded to float16 in another order
        assert of_id["logprob"] == pytest.approx(exact[token], abs=1e-4)
        assert [entry["id"] for entry in of_id["top"]] == order
        assert [entry["logprob"] for entry in of_id["top"]] == pytest.approx(exact[order], abs=1e-4)
        context.append(token)
    # They change no answer, and are in every form of JSON.
    plain = cli("run", *args[:-2], "--json", "the man").json
    assert (plain["ids"], "logprobs" in plain) == (ids, False)
    assert (
        json.loads(cli("run", *args, "--ndjson", "the man").out.splitlines()[-1])["logprobs"]
        == logprobs
    )
    mapped = json.loads(cli("map", *args, "--ndjson", "the", stdin=b"man\n").out)
    alone = cli("run", *args, "--json", "the", stdin=b"man\n").json
    assert mapped["logprobs"] == alone["logprobs"]


def test_tokens_are_counted(cli: Cli, home: Path) -> None:
    tokenizer = load(home, "base")[1]
    n = len(tokenizer.encode("a ham\n"))
    assert cli("tokenize", "-m", "base", "--count", stdin=b"a ham\n").out == f"{n}\n"
    assert cli("tokenize", "-m", "base", "--count", "--json", "a ham\n").json == {"count": n}
    assert cli("tokenize", "-m", "base", "--count", "").out == "0\n"


@pytest.mark.parametrize("cut", ["head", "middle", "tail"])
@pytest.mark.parametrize("text", ["the man met ten hens ☃ " * 50, "é" * 300])
def test_a_text_is_cut_to_fit(cli: Cli, home: Path, cut: str, text: str) -> None:
    args = ("-m", "base", "-t", "0", "-n", "4", "-c", "90", "--truncate", cut)
    result = cli("run", "eat ham", *args, "--json", stdin=text.encode())
    assert result.status == 0
    assert result.json["prompt_tokens"] <= 86  # type: ignore[operator]
    assert result.json["prompt_tokens"] > 70  # type: ignore[operator]
    assert result.json["completion_tokens"] == 4
    assert re.fullmatch(rf"gemma-cli: Tokens left out of the {cut}: \d+\.\n", result.err)
    # A line, a prompt without anything else, and what fits.
    mapped = cli("map", "eat ham", *args, "--ndjson", stdin=b"ham\n" + text.encode())
    short, long = [json.loads(line) for line in mapped.out.splitlines()]
    assert (mapped.status, long["ids"]) == (0, result.json["ids"])
    assert mapped.err == result.err.replace("Tokens", "Line 2: tokens")
    assert cli("run", text, *args).status == 0
    plain = cli("run", "eat ham", *args[:-2], "--json", stdin=b"ham").json
    assert short["ids"] == plain["ids"]
    assert cli("run", "eat ham", *args, "--json", stdin=b"ham").json["ids"] == plain["ids"]
    # What is not to be cut can be too long by itself.
    assert cli("run", text, *args, stdin=b"ham").status == 3


# Scripts


def bash(home: Path, script: str) -> subprocess.CompletedProcess[bytes]:
    """Runs a script, without a terminal, in which `gemma` is the program."""
    command, environment = program(home)
    return subprocess.run(
        ["bash", "-c", f'gemma() {{ {" ".join(command)} "$@"; }}\n{script}'],
        env=environment,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        check=False,
        timeout=120,
    )


def test_in_a_script(home: Path) -> None:
    """set -e goes on with an answer, and stops at one that is cut off."""
    result = bash(
        home,
        """set -eu -o pipefail
        answer=$(gemma run -m base -t 0 "a ham" --choice yes --choice no)
        case $answer in yes|no) ;; *) exit 9 ;; esac
        echo here
        number=$(gemma run -m base -t 0 "a ham" --regex '[0-9]{90}' -n 2)
        echo "not here: $number" """,
    )
    assert (result.returncode, result.stdout) == (1, b"here\n")
    assert re.fullmatch(f"gemma-cli: {CUT_OFF}\n", result.stderr.decode())


def test_without_a_terminal_or_a_home(home: Path) -> None:
    """As cron runs it, and with less."""
    line = 'gemma run -m base -t 0 -n 3 "a ham"'
    result = bash(home, f"unset HOME TERM USER LOGNAME LANG; {line} <&-")
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout == bash(home, line).stdout != b""


def test_recipes(home: Path) -> None:
    """Those of the README that are made of more than one program."""
    result = bash(
        home,
        """set -eu -o pipefail
        printf '%s\\n' ham hen man | gemma map -m base "eat" --choice yes --choice no
        echo
        printf '%s\\n' ham hen | while read -r word; do
            gemma run -m base "$word" --choice "$word!" --choice "$word?" < /dev/null; echo
        done
        echo
        gemma run -m base "a ham" --choice ham | (read -r word || echo "$word")
        env -i PATH="$PATH" PYTHONPATH="$PYTHONPATH" GEMMA_CLI_HOME="$GEMMA_CLI_HOME" \\
            bash -c '"$0" -m gemma_cli run -m base "a" --choice here <&-' """
        + sys.executable,
    )
    assert (result.returncode, result.stderr) == (0, b"")
    assert re.fullmatch("((yes|no)\n){3}\nham[!?]\nhen[!?]\n\nham\nhere", result.stdout.decode())
