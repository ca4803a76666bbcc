"""gemma-cli bench: how fast a model runs here."""

from typing import Annotated

import typer

from gemma_cli.cli import loading, options, output


def bench(
    model: options.ModelName = None,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens to read in one go.")
    ] = 512,
    tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens to decode, one after the other.")
    ] = 64,
    depth: Annotated[
        int, typer.Option(min=0, metavar="N", help="Tokens in the context when decoding begins.")
    ] = 0,
    repeat: Annotated[int, typer.Option(min=1, metavar="N", help="Rounds; medians count.")] = 3,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Measure how fast a model reads and writes on this machine.

    Writing a token reads all weights once, so the memory's read bandwidth bounds it. Bandwidth is
    measured in the same run, with the same threads; 100% of it is as fast as this machine can
    write with this model file.

    Examples:

    gemma-cli bench --depth 4000

    gemma-cli bench --threads 1 --json | jq .decode.tok_s
    """
    file = loading.open_model(model)
    runner = loading.load_model(file, threads)
    from gemma_cli.measure.bench import measure_speed

    loading.check_context(file, max(prompt_tokens, depth + tokens), "--prompt-tokens or --depth")
    with output.progress_bar("Measuring", repeat) as progress:
        speed = measure_speed(
            runner,
            prompt_tokens=prompt_tokens,
            tokens=tokens,
            depth=depth,
            repeat=repeat,
            progress=progress,
        )
    if json:
        output.write_json(
            {
                "model": file.path.stem,
                "threads": runner.n_threads,
                "prefill": {"tokens": speed.prefill_tokens, "tok_s": speed.prefill_tok_s},
                "decode": {
                    "tokens": speed.decode_tokens,
                    "depth": speed.decode_depth,
                    "tok_s": speed.decode_tok_s,
                },
                "read_gb_s": speed.read_gb_s,
                "bytes_per_token": speed.bytes_per_token,
                "roofline": speed.roofline,
                "rss_mb": speed.rss_mb,
            }
        )
        return
    output.write_table(
        [
            ("model", f"{file.path.stem}, {runner.n_threads} threads"),
            ("prefill", f"{speed.prefill_tok_s:.1f} tokens/s, {speed.prefill_tokens} tokens"),
            (
                "decode",
                f"{speed.decode_tok_s:.1f} tokens/s, {speed.decode_tokens} tokens "
                f"after {speed.decode_depth}",
            ),
            (
                "roofline",
                f"{speed.roofline:.0%} of {speed.read_gb_s:.1f} GB/s; a token reads "
                f"{output.size(speed.bytes_per_token)}",
            ),
            ("memory", output.size(speed.rss_mb * 1e6)),
        ]
    )
