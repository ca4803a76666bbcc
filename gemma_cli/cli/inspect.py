"""gemma-cli inspect: what is in a model file."""

from dataclasses import asdict
from typing import Annotated

import typer

from gemma_cli.cli import loading, options, output

GENERATIONS = {"gemma": "Gemma 1", "gemma2": "Gemma 2", "gemma3": "Gemma 3"}


def inspect(
    model: options.ModelName = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List the weight matrices.")] = False,
    context: Annotated[
        int | None,
        typer.Option(
            "-c", "--context", min=1, metavar="N", help="The context to count memory for."
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Show a model's architecture, recipe and sizes, and the memory that a context needs."""
    file = loading.open_model(model)
    config = file.config
    loading.check_context(file, context or 1, "--context")
    context = context or min(loading.DEFAULT_CONTEXT, config.context_length)
    cache_bytes = loading.cache_bytes(config, context)
    n_weights = sum(m.n_out * m.n_in for m in file.matrices.values())
    if json:
        described: dict[str, object] = {
            "path": str(file.path),
            "generation": config.generation,
            "chat": file.chat,
            "source": file.source,
            "recipe": file.recipe,
            "bytes": file.size,
            "weights": n_weights,
            "bits_per_weight": file.bits_per_weight,
            "sampling": dict(file.sampling),
            "context": context,
            "cache_bytes": cache_bytes,
            "config": asdict(config),
        }
        if tensors:
            described["tensors"] = {
                name: asdict(m) | {"bytes": m.nbytes} for name, m in file.matrices.items()
            }
        output.write_json(described)
        return
    sliding = sum(config.sliding_layers)
    layers = f"{config.n_layers} layers of {config.hidden_size}"
    if sliding:
        layers += f", {sliding} of them with a window of {config.sliding_window} tokens"
    sampling = ", ".join(f"{name} {value:g}" for name, value in file.sampling.items())
    output.write_table(
        [
            ("file", str(file.path)),
            (
                "model",
                f"{GENERATIONS.get(config.generation, config.generation)}, "
                f"{n_weights:,} weights, "
                + ("base" if file.chat == "base" else "instruction-tuned"),
            ),
            ("layers", layers),
            ("heads", f"{config.n_heads} of {config.head_dim}, {config.n_kv_heads} for keys"),
            ("context", f"up to {config.context_length} tokens"),
            ("vocabulary", f"{config.vocab_size} pieces"),
            ("sampling", sampling or "Gemma's defaults"),
            ("source", file.source),
            ("recipe", f"{file.recipe}: {file.bits_per_weight:.2f} bits a weight"),
            ("size", output.size(file.size)),
            (
                "memory",
                f"{output.size(file.size)}, and for {context} tokens of context "
                + ", ".join(f"{output.size(n)} ({kv})" for kv, n in cache_bytes.items()),
            ),
        ]
    )
    if tensors:
        output.write("\n")
        output.write_table(
            [
                ("tensor", "format", "shape", "group", "size"),
                *(
                    (
                        name,
                        m.format,
                        f"{m.n_out} x {m.n_in}",
                        str(m.group_size or "-"),
                        output.size(m.nbytes),
                    )
                    for name, m in file.matrices.items()
                ),
            ]
        )
