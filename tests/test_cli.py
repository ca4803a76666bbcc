"""The command line as its users and their scripts meet it, on small random Gemmas."""

import json
import re
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
from program import CONTEXT, GOLDEN, Cli, load, program
from terminals import Terminal

from gemma_cli.cli import output
from gemma_cli.runtime import Model
from gemma_cli.text.chat import Turn, chat_prompt, raw_prompt
from gemma_cli.text.tokenizer import Tokenizer
from quantize.checkpoint import open_checkpoint

COMMANDS = (
    *("quantize", "run", "chat", "map", "bench", "eval", "inspect", "verify", "tokenize"),
    "models",
)


def greedy(model: Model, prompt_ids: list[int], n: int) -> list[int]:
    """The continuation without a cache: the whole context anew for each token."""
    ids = list(prompt_ids)
    for _ in range(n):
        ids.append(int(model.forward(ids, model.new_cache(len(ids))).argmax()))
    return ids[len(prompt_ids) :]


def in_json(text: str) -> str:
    """A model's text as JSON can hold it: bytes that are not UTF-8, which pipes get, replaced."""
    return re.sub("[\udc80-\udcff]", "\ufffd", text)


# Streams and statuses


def test_version_and_help(cli: Cli) -> None:
    assert re.fullmatch(r"gemma-cli \d+\.\d+\.\d+\n", cli("--version").out)
    for command in COMMANDS:
        assert command in cli("--help").out
        result = cli(command, "--help")
        assert (result.status, result.err) == (0, "")
        assert "\x1b" not in result.out


def test_run_prints_the_answer_and_nothing_else(cli: Cli, home: Path) -> None:
    checkpoint = open_checkpoint(GOLDEN / "gemma-mha")
    tokenizer = Tokenizer(checkpoint.tokenizer_model)
    weights = reference.read_weights(checkpoint)
    ids = raw_prompt(tokenizer, "the man")
    for _ in range(12):
        ids.append(int(reference.forward(checkpoint.config, weights, np.array(ids))[-1].argmax()))
    made = ids[-12:]

    result = cli("run", "-m", "base", "the man", "-t", "0", "-n", "12", "--json")
    assert (result.status, result.err) == (0, "")
    assert result.json["ids"] == made
    result = cli("run", "-m", "base", "the man", "-t", "0", "-n", "12")
    assert (result.status, result.out, result.err) == (0, tokenizer.decode(made), "")


def test_json_of_run(cli: Cli) -> None:
    args = ("run", "-m", "base", "the man", "--seed", "5", "-n", "20")
    result = cli(*args, "--json").json
    assert list(result) == [
        "text",
        "ids",
        "prompt_tokens",
        "completion_tokens",
        "finish_reason",
        "stats",
    ]
    stats = result["stats"]
    assert isinstance(stats, dict)
    assert list(stats) == [
        "load_s",
        "prefill_s",
        "prefill_tok_s",
        "decode_s",
        "decode_tok_s",
        "first_token_s",
    ]
    assert result["completion_tokens"] == len(result["ids"])  # type: ignore[arg-type]

    *pieces, last = [json.loads(line) for line in cli(*args, "--ndjson").out.splitlines()]
    assert last["ids"] == result["ids"]  # the seed fixes the answer
    assert "".join(piece["token"] for piece in pieces) == last["text"] == result["text"]


def test_stats_go_to_standard_error(cli: Cli) -> None:
    args = ("run", "-m", "base", "the man", "-t", "0", "-n", "5")
    plain, stats = cli(*args), cli(*args, "--stats")
    assert plain.out == stats.out
    assert "5 tokens" in stats.err
    assert "answer: 1 token in" in cli(*args[:-1], "1", "--stats").err


def test_prompt_files_and_standard_input(cli: Cli, home: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "1.txt", tmp_path / "2.txt"
    one.write_bytes(b"ham\n")
    two.write_bytes(b"hen\r\n")
    tokenizer = load(home, "base")[1]

    def prompt_tokens(*args: str | Path, stdin: bytes = b"") -> object:
        result = cli("run", "-m", "base", "-n", "1", "--json", *args, stdin=stdin)
        assert result.status == 0
        return result.json["prompt_tokens"]

    def n_tokens(text: str | bytes) -> int:
        return 1 + len(tokenizer.encode(text))

    assert prompt_tokens("eat", stdin=b"a ham\n") == n_tokens("eat\n\na ham")
    assert prompt_tokens(stdin=b"a ham") == n_tokens("a ham")
    assert prompt_tokens("-f", one, "-f", two, stdin=b"a") == n_tokens("ham\n\nhen\n\na")
    assert prompt_tokens("eat", "-f", one) == n_tokens("eat\n\nham")
    assert prompt_tokens(stdin=b"\xff\xfea") == n_tokens(b"\xff\xfea")
    assert prompt_tokens("<bos><eos>") == n_tokens("<bos><eos>")


def test_nothing_to_answer(cli: Cli) -> None:
    for stdin in (b"", b"\n"):
        result = cli("run", "-m", "base", stdin=stdin)
        assert (result.status, result.out) == (2, "")
        assert "nothing to answer" in result.err


@pytest.mark.parametrize(
    "args",
    [
        ["run", "--nonsense"],
        ["nonsense"],
        ["run", "-t", "-1", "a"],
        ["run", "-t", "nan", "a"],
        ["run", "--top-p", "2", "a"],
        ["run", "--top-k", "-1", "a"],
        ["run", "--repeat-penalty", "0", "a"],
        ["run", "--kv", "int3", "a"],
        ["run", "-n", "-1", "a"],
        ["run", "-c", "0", "a"],
        ["run", "--threads", "0", "a"],
        ["run", "-m", "base", "-c", "1000000", "a"],
        ["run", "-m", "base", "--system", "b", "a"],
        ["run", "-m", "chat", "--raw", "--system", "b", "a"],
        ["quantize", "demo", "--bits", "5"],
        ["quantize", "demo", "--group-size", "16"],
        ["map"],
        ["map", "-m", "base", "--batch", "17", "a"],
        ["map", "-m", "base", "--system", "b", "a"],
        ["bench", "-m", "base", "--prompt-tokens", "100000"],
        ["eval", "-m", "base"],
        ["eval", "-m", "base", "--text", "a", "--base", "base", "--plot", "kl.pdf"],
        ["eval", "-m", "base", "--text", "a", "--base", "base", "--plot", "none/kl.png"],
        ["eval", "-m", "base", "--text", "a", "--plot", "kl.png"],
        ["quantize", "demo", "--plot", "a.svg"],
    ],
    ids=" ".join,
)
def test_wrong_usage(cli: Cli, args: list[str]) -> None:
    result = cli(*args)
    assert (result.status, result.out) == (2, "")
    assert "Traceback" not in result.err


def test_failures_are_one_sentence(cli: Cli, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged\x1b[2J.safetensors"
    damaged.write_bytes(b"nothing of use")
    for args in (
        ["run", "-m", "nothing", "a"],
        ["run", "-m", damaged, "a"],
        ["run", "-m", tmp_path, "a"],
        ["run", "-m", "base", "-f", tmp_path / "none.txt", "a"],
        ["run", "-m", "base", "-f", tmp_path, "a"],
        ["inspect", "-m", damaged],
        ["run", "a"],  # two models to choose from
        ["map", "a"],
        ["map", "-m", "base", "-f", tmp_path / "none.txt", "a"],
        ["eval", "-m", "chat", "--text", damaged],
        ["eval", "-m", "chat", "--text", damaged, "--base", "base"],
        ["quantize", tmp_path],
        ["quantize", tmp_path / "none"],
        ["quantize", "hf:google/gemma-3-1b-it"],
        ["quantize", "gemma-2b-it.ckpt"],
    ):
        result = cli(*args)
        assert (result.status, result.out) == (1, ""), args
        assert re.fullmatch(r"gemma-cli: [^\n\x1b]+\.\n", result.err), args


def test_a_prompt_too_long(cli: Cli) -> None:
    result = cli("run", "-m", "base", "-c", "5", "the man met ten men on the lane")
    assert (result.status, result.out) == (3, "")
    numbers = [int(number) for number in re.findall(r"\d+", result.err)]
    assert numbers[1:] == [5, 256]  # what fits, what could fit
    assert numbers[0] > 5


def test_an_error_of_ours_shows_no_traceback(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Model, *args: object, **options: object) -> None:
        raise RuntimeError("on\x1b[2Jpurpose")

    monkeypatch.setattr(Model, "forward", fail)
    result = cli("run", "-m", "base", "a")
    assert (result.status, result.out) == (1, "")
    assert re.fullmatch(r"gemma-cli: [^\n\x1b]*RuntimeError: on\[2Jpurpose[^\n\x1b]*\n", result.err)


def test_text_for_a_terminal() -> None:
    every = "".join(map(chr, range(0x100)))
    kept = output.clean(every)
    assert kept == "\t\n" + "".join(map(chr, [*range(0x20, 0x7F), *range(0xA0, 0x100)]))
    assert output.clean("a\x1b]52;c;YQ==\x07b\x9b31m\r\nc") == "a]52;c;YQ==b31m\nc"
    assert output.clean(b"\xff\xc2".decode("utf-8", "surrogateescape")) == "\ufffd\ufffd"


# What a terminal and a shell do


NOISE = ("-t", "9", "--top-k", "0", "--top-p", "1", "--seed", "1", "-n", "200")


def test_no_control_characters_reach_a_terminal(cli: Cli, home: Path) -> None:
    args = ("run", "-m", "base", "--raw", "a", *NOISE)
    piped = cli(*args).out
    assert in_json(piped) == cli(*args, "--json").json["text"]  # not a byte of ours
    assert re.search("[\x00-\x08\x0b-\x1f\x7f]", piped)  # this model does try

    with Terminal(home, *args, height=200) as terminal:
        assert terminal.wait() == 0
    # The terminal itself turns each newline into two characters; the last one ends our line.
    shown = terminal.received.decode()
    assert shown.replace("\r\n", "\n") == output.clean(piped) + "\n"


def test_ctrl_c(home: Path) -> None:
    command, environment = program(home)
    args = ["run", "-m", "chat", "-t", "0", "-c", str(CONTEXT), "the man", "--ndjson"]
    process = subprocess.Popen(
        [*command, *args],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    last = json.loads(out.splitlines()[-1])
    assert (process.returncode, last["finish_reason"], err) == (130, "interrupted", b"")


def test_the_reader_goes_away(home: Path) -> None:
    command, environment = program(home)
    process = subprocess.Popen(
        [*command, "run", "-m", "chat", "-t", "0", "-c", str(CONTEXT), "the man"],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout
    assert process.stderr
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(30) == 141


def test_a_full_disk(home: Path) -> None:
    if not Path("/dev/full").exists():
        return  # Linux only
    command, environment = program(home)
    with open("/dev/full", "wb") as full:
        result = subprocess.run(
            [*command, "tokenize", "-m", "base", "ham"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (result.returncode, result.stderr) == (1, b"gemma-cli: No space left on device.\n")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_closed_streams(home: Path, closed: str) -> None:
    command, environment = program(home)
    line = " ".join([*command, "tokenize", "-m", "base", "ham", closed])
    result = subprocess.run(line, shell=True, env=environment, capture_output=True, check=False)
    assert (result.returncode, result.stderr) == (0, b"")
    assert bool(result.stdout) == (closed != ">&-")


# The other commands


def test_stop_texts(cli: Cli) -> None:
    args = ("run", "-m", "base", "the man", "-t", "0", "-n", "30")
    text = cli(*args).out
    stop = text[10:14]
    result = cli(*args, "--json", "--stop", stop, "--stop", "not there").json
    assert result["text"] == in_json(text[: text.index(stop)])
    assert result["finish_reason"] == "stop"


def test_a_long_prompt_gets_a_longer_context(cli: Cli) -> None:
    result = cli("run", "-m", "chat", "--raw", "-n", "1", "--json", stdin=b"a" * 6000)
    assert result.status == 0
    assert result.json["prompt_tokens"] > 4096  # type: ignore[operator]


def test_chat_goes_on_from_the_cache(cli: Cli, home: Path) -> None:
    """The same answers as from the whole conversation, read anew for each token."""
    result = cli(
        *("chat", "-m", "chat", "-t", "0", "-n", "6", "--system", "be lean", "--json"),
        stdin=b"the man\n\nten hens\n",
    )
    assert (result.status, result.err) == (0, "")
    first, second = [json.loads(line) for line in result.out.splitlines()]

    model, tokenizer = load(home, "chat")
    prompt = chat_prompt(tokenizer, [Turn("user", "the man")], "be lean")
    assert first["ids"] == greedy(model, prompt, 6)
    end = tokenizer.piece_id("<end_of_turn>")
    assert end is not None
    prompt += [*first["ids"], end, *tokenizer.encode("\n")]
    prompt += chat_prompt(tokenizer, [Turn("user", "ten hens")], None)[1:]
    assert second["prompt_tokens"] == len(prompt)
    assert second["ids"] == greedy(model, prompt, 6)
    assert prompt.count(tokenizer.bos_id) == 1


def test_chat_says_when_the_context_is_full(cli: Cli) -> None:
    lines = b"the man\nten hens in the inn\n"
    result = cli("chat", "-m", "chat", "-t", "0", "-n", "2", "-c", "25", stdin=lines)
    assert result.status == 3
    assert "context holds 25" in result.err
    assert len(result.out.splitlines()) == 1


def test_chat_with_a_base_model(cli: Cli) -> None:
    result = cli("chat", "-m", "base", "--raw", "-t", "0", "-n", "5", stdin=b"the man\n")
    assert result.out == cli("run", "-m", "base", "-t", "0", "-n", "5", "the man").out + "\n"
    assert "base model" in result.err


def test_chat_with_a_base_model_is_a_transcript(cli: Cli, home: Path) -> None:
    model, tokenizer = load(home, "base")
    args = ("chat", "-m", "base", "-t", "0", "-n", "5", "--system", "be lean")
    result = cli(*args, "--json", stdin=b"the man\nten hens\n")
    first, second = [json.loads(line) for line in result.out.splitlines()]
    assert "base model" in result.err
    prompt = [tokenizer.bos_id]
    for text in ("be lean\n\n", "User: the man", "\n", "Assistant:"):
        prompt += tokenizer.encode(text)
    assert first["ids"] == greedy(model, prompt, 5)
    prompt += first["ids"]
    for text in ("\n", "User: ten hens", "\n", "Assistant:"):
        prompt += tokenizer.encode(text)
    assert second["ids"] == greedy(model, prompt, 5)
    assert second["prompt_tokens"] == len(prompt)


def test_drafts_change_no_answer(cli: Cli) -> None:
    # A random model that repeats itself soon.
    for command, stdin in (("run", b"the man"), ("chat", b"the man\nten hens\n")):
        args = (command, "-m", "chat", "-t", "0", "-n", "80", "--json")
        made = [json.loads(line) for line in cli(*args, stdin=stdin).out.splitlines()]
        plain = cli(*args, "--no-draft", stdin=stdin).out.splitlines()
        assert [answer["ids"] for answer in made] == [json.loads(line)["ids"] for line in plain]


LINES = ["the man", "", "ten hens in the inn\r", "a\rham", "a man", "\udcff\udcfe", " the man "]


@pytest.mark.parametrize("model", ["base", "chat"])
def test_map_answers_each_line_as_run_does(cli: Cli, model: str, tmp_path: Path) -> None:
    file = tmp_path / "file.txt"
    file.write_text("hens\n")
    args = ("-m", model, "eat", "-f", file, "--top-k", "5", "-n", "12")
    stdin = "\n".join(LINES).encode("utf-8", "surrogateescape")  # the last line has no end
    result = cli("map", *args, "--ndjson", "--batch", "3", "--seed", "7", stdin=stdin)
    assert (result.status, result.err) == (0, "")
    made = [json.loads(line) for line in result.out.splitlines()]
    plain = cli("map", *args, "--seed", "7", stdin=stdin)
    assert (plain.status, plain.err) == (0, "")
    shown = in_json(plain.out).split("\n")
    assert shown.pop() == ""
    assert len(made) == len(shown) == len(LINES)
    for i, (line, answer) in enumerate(zip(LINES, made, strict=True)):
        assert list(answer)[:2] == ["index", "input"]
        assert (answer["index"], answer["input"]) == (i, in_json(line.removesuffix("\r")))
        # `run` would take the lone \r for a newline, unless it comes in a file.
        file = tmp_path / "line.txt"
        file.write_bytes(line.encode("utf-8", "surrogateescape"))
        alone = cli("run", *args, "-f", file, "--json", "--seed", str(7 + i)).json
        assert list(answer)[2:] == list(alone)
        for key in ("text", "ids", "prompt_tokens", "completion_tokens", "finish_reason"):
            assert answer[key] == alone[key], (key, line)
        assert shown[i] == re.sub("[\r\n]+", " ", answer["text"]).strip()


def test_map_answers_the_rest_if_a_line_fails(cli: Cli) -> None:
    long = "the man met ten men on the lane " * 9
    args = ("map", "-m", "base", "-t", "0", "-n", "4", "-c", "40", "eat")
    stdin = f"ham\n{long}\nhen\n".encode()
    result = cli(*args, "--json", stdin=stdin)
    first, second, third = [json.loads(line) for line in result.out.splitlines()]
    assert (result.status, result.err) == (1, "")
    assert list(second) == ["index", "input", "error"]
    assert (second["index"], second["input"]) == (1, long)
    assert "context holds 40" in second["error"]
    assert (len(first["ids"]), len(third["ids"]), third["index"]) == (4, 4, 2)

    result = cli(*args, stdin=stdin)
    assert result.status == 1
    assert re.fullmatch(r"gemma-cli: Line 2: [^\n]+ context holds 40[^\n]+\.\n", result.err)
    lines = result.out.split("\n")
    assert lines[0] != lines[1] == "" != lines[2]
    assert lines[3:] == [""]

    result = cli("map", "-m", "base", "-c", "5", long, stdin=b"ham\n")  # for every line
    assert (result.status, result.out) == (3, "")


def test_map_of_no_lines(cli: Cli) -> None:
    result = cli("map", "-m", "base", "eat")
    assert (result.status, result.out, result.err) == (0, "", "")
    assert "0 lines" in cli("map", "-m", "base", "eat", "--stats").err


def test_map_stops_at_stop_texts(cli: Cli) -> None:
    options = ("-m", "base", "-t", "0", "-n", "30")
    text = cli("run", *options, "eat\n\nham").out
    stop = text[10:14]
    result = cli("map", *options, "eat", "--ndjson", "--stop", stop, stdin=b"ham\nham\n")
    made = [json.loads(line) for line in result.out.splitlines()]
    assert [answer["text"] for answer in made] == [in_json(text[: text.index(stop)])] * 2
    assert [answer["finish_reason"] for answer in made] == ["stop"] * 2


def test_map_of_endless_input(home: Path) -> None:
    command, environment = program(home)
    line = " ".join(command) + " map -m base -n 3 eat"
    result = subprocess.run(
        ["bash", "-c", f"yes ham | {line} | head -2; echo ${{PIPESTATUS[@]}}"],
        env=environment,
        capture_output=True,
        check=False,
        timeout=60,
    )
    # Not splitlines, which would divide an answer at a form feed, too.
    *answers, statuses, rest = result.stdout.decode("utf-8", "surrogateescape").split("\n")
    assert (len(answers), statuses, rest, result.stderr) == (2, "141 141 0", "", b"")


def test_map_answers_before_the_next_line_comes(home: Path) -> None:
    command, environment = program(home)
    process = subprocess.Popen(
        [*command, "map", "-m", "base", "-n", "3", "eat", "--ndjson"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin
    assert process.stdout
    for i in range(2):
        process.stdin.write(b"ham\n")
        process.stdin.flush()
        assert select.select([process.stdout], [], [], 60)[0]
        assert json.loads(process.stdout.readline())["index"] == i
    process.send_signal(signal.SIGINT)  # while it waits for a line
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, b"", b"")


def test_ctrl_c_ends_map(home: Path) -> None:
    command, environment = program(home)
    process = subprocess.Popen(
        [*command, "map", "-m", "base", "-t", "0", "-n", "150", "eat", "--ndjson"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin
    assert process.stdout
    process.stdin.write(b"ham\n" * 500)
    process.stdin.flush()
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, b"")
    answers = [json.loads(line) for line in out.splitlines()]  # whole ones only
    assert len(answers) < 499


def test_tokenize(cli: Cli, home: Path) -> None:
    tokenizer = load(home, "chat")[1]
    ids = tokenizer.encode("the ham\n")
    result = cli("tokenize", "-m", "chat", "--json", stdin=b"the ham\n").json
    assert result == {"ids": ids, "pieces": [tokenizer.piece(i) for i in ids]}
    lines = cli("tokenize", "-m", "chat", "the ham").out.splitlines()
    assert [int(line.split()[0]) for line in lines] == ids[:-1]
    whole = cli("tokenize", "-m", "chat", "--chat", "--system", "lean", "--json", "ham").json
    assert whole["ids"] == chat_prompt(tokenizer, [Turn("user", "ham")], "lean")


def test_verify_names_damaged_tensors(cli: Cli, home: Path, tmp_path: Path) -> None:
    whole = home / "models" / "base.safetensors"
    result = cli("verify", "-m", "base")
    assert (result.status, result.err) == (0, "")
    assert result.out.startswith(f"{whole}: ")
    assert result.out.endswith(": whole\n")
    path = tmp_path / "damaged.safetensors"
    data = bytearray(whole.read_bytes())
    data[-1] ^= 16  # of the embedding, which lies last
    path.write_bytes(data)
    result = cli("verify", "-m", path)
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith(f"gemma-cli: {path} is damaged: embed of ")
    assert result.err.count("\n") == 1
    data[100] ^= 1
    path.write_bytes(data)
    result = cli("verify", "-m", path)
    assert (result.status, result.out) == (1, "")
    assert str(path) in result.err


def test_models_and_inspect(cli: Cli, home: Path) -> None:
    assert [line.split()[0] for line in cli("models").out.splitlines()] == ["base", "chat"]
    listed = json.loads(cli("models", "--json").out)
    assert [(m["name"], m["generation"], m["chat"]) for m in listed] == [
        ("base", "gemma", "base"),
        ("chat", "gemma3", "gemma"),
    ]
    described = cli("inspect", "-m", "chat", "--json", "--tensors", "-c", "100").json
    size = (home / "models" / "chat.safetensors").stat().st_size
    assert (described["bytes"], described["bits_per_weight"]) == (size, 32.0)
    # 3 layers, keys and values, 2 heads of 16 numbers, 2 bytes each, and a scale of 4: all 100
    # tokens fit the windows' rings, in tiles of 16.
    assert described["cache_bytes"]["f16"] == 3 * 2 * 2 * (16 * 2 + 4) * 112  # type: ignore[index]
    text = cli("inspect", "-m", "chat", "--tensors").out
    assert "instruction-tuned" in text
    assert "layers.2.ffn_down" in text


def test_no_models(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMMA_CLI_HOME", str(tmp_path))
    result = cli("models")
    assert (result.status, result.out) == (0, "")
    assert "gemma-cli quantize" in result.err
    assert json.loads(cli("models", "--json").out) == []
    assert "gemma-cli quantize" in cli("run", "a").err


def test_the_only_model_and_the_one_in_the_environment(
    cli: Cli, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEMMA_CLI_MODEL", "chat")
    assert cli("inspect", "--json").json["chat"] == "gemma"
    monkeypatch.delenv("GEMMA_CLI_MODEL")
    (tmp_path / "models").mkdir()
    shutil.copy(home / "models" / "base.safetensors", tmp_path / "models")
    (tmp_path / "models" / ".hidden.safetensors").write_bytes(b"")
    monkeypatch.setenv("GEMMA_CLI_HOME", str(tmp_path))
    assert cli("inspect", "--json").json["chat"] == "base"


def test_bench(cli: Cli) -> None:
    result = cli("bench", "-m", "base", "--prompt-tokens", "9", "--tokens", "3", "--json")
    assert result.status == 0
    assert list(result.json) == [
        "model",
        "threads",
        "prefill",
        "decode",
        "read_gb_s",
        "bytes_per_token",
        "roofline",
        "rss_mb",
    ]
    assert result.json["decode"]["depth"] == 0  # type: ignore[index]


def test_eval_agrees_with_the_reference(cli: Cli, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a man met ten hens in the inn\n" * 60)
    checkpoint = open_checkpoint(GOLDEN / "gemma3-shards")
    tokenizer = Tokenizer(checkpoint.tokenizer_model)
    ids = np.array([tokenizer.bos_id, *tokenizer.encode(text.read_text())][:512])
    logits = reference.forward(checkpoint.config, reference.read_weights(checkpoint), ids)[256:511]
    logits = logits.astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = float(np.exp(-log_p[np.arange(255), ids[257:]].mean()))

    args = ("eval", "-m", "chat", "--text", text, "--chunks", "1", "--json")
    result = cli(*args).json
    assert result["tokens"] == 255
    # The cache rounds keys and values to float16, which the reference here does not.
    assert result["perplexity"] == pytest.approx(expected, rel=1e-3)
    assert set(result) == {"tokens", "perplexity", "perplexity_stderr"}
    result = cli(*args, "--base", "chat").json
    assert result["same_top"] == 1.0
    assert result["kl"]["max"] == 0.0  # type: ignore[index]
    assert set(result) == {"tokens", "perplexity", "perplexity_stderr", "kl", "same_top"}
    assert set(result["kl"]) == {"mean", "stderr", "median", "p90", "p99", "max"}  # type: ignore[call-overload]
    shown = cli(*args[:-1], "--base", "chat").out
    assert "99.9% 0.000000" in shown


def test_eval_of_several_models(cli: Cli, home: Path, tmp_path: Path) -> None:
    text, plot, small = tmp_path / "text.txt", tmp_path / "kl.svg", tmp_path / "small.safetensors"
    text.write_text("a man met ten hens in the inn\n" * 60)
    assert cli("quantize", home / "checkpoint", "-o", small).status == 0
    args = ("eval", "--text", text, "--chunks", "1", "--base", "chat", "-m")
    alone = [cli(*args, model, "--json").json for model in (small, "chat")]
    result = cli(*args, small, "--also", "chat", "--plot", plot, "--json")
    assert (result.status, result.err) == (0, "")
    assert result.json | {"models": []} == alone[0] | {"models": []}
    models = result.json["models"]
    assert isinstance(models, list)
    for model, name, described in zip(models, ("small", "chat"), alone, strict=True):
        assert Path(model.pop("model")).stem == name
        assert model.pop("bits_per_weight") == (32 if name == "chat" else pytest.approx(5.3, abs=1))
        assert model == described
    assert models[0]["kl"]["mean"] > models[1]["kl"]["mean"] == 0
    assert all(name in plot.read_text() for name in ("<svg", ">small<", ">chat<"))
    shown = cli(*args, small, "--also", "chat").out
    assert shown.count("divergence") == 2


def test_a_plot_without_matplotlib(
    cli: Cli, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    target = tmp_path / "a.safetensors"
    result = cli(
        "quantize", home / "checkpoint", "-o", target, "--verify", "--plot", tmp_path / "a.svg"
    )
    assert (result.status, "pip install 'gemma-cli[plot]'" in result.err) == (1, True)
    assert not list(tmp_path.iterdir())
