"""gemma-cli inspect: what is in a model file."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_cli.cli import loading, options, output

if TYPE_CHECKING:
    from quantize.modelfile import TensorError, Verification

WORST = 10  # matrices that are named
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
    """Show what a model file holds, and the memory that it needs.

    Its architecture, the recipe that it was made by and what rounding has cost, sizes, and the
    memory for a context.

    Examples:

    gemma-cli inspect -c 32768

    gemma-cli inspect -m gemma-3-270m-int4 --tensors
    """
    file = loading.open_model(model)
    config = file.config
    loading.check_context(file, context or 1, "--context")
    context = context or min(loading.DEFAULT_CONTEXT, config.context_length)
    cache_bytes = loading.cache_bytes(config, context)
    n_weights = sum(m.n_out * m.n_in for m in file.matrices.values())
    verified = file.verification
    if json:
        fields: dict[str, object] = {
            "path": str(file.path),
            "generation": config.generation,
            "chat": file.chat,
            "source": file.source,
            "recipe": file.recipe,
            "bytes": file.size,
            "weights": n_weights,
            "bits_per_weight": file.bits_per_weight,
            "sampling": dict(file.sampling),
            "verification": described(verified) if verified else None,
            "context": context,
            "cache_bytes": cache_bytes,
            "config": asdict(config),
        }
        if tensors:
            fields["tensors"] = {
                name: asdict(m)
                | {"bytes": m.nbytes}
                | (_described(verified.errors[name]) if verified else {})
                for name, m in file.matrices.items()
            }
        output.write_json(fields)
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
    if verified:
        output.write("\n")
        show_verification(verified)
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


def show_verification(verification: "Verification") -> None:
    """Prints what a file has lost against its source, the worst matrices by name."""
    worst = verification.worst(WORST)
    output.write(
        f"Lost against the source in float32, over {verification.tokens} predictions: "
        f"divergence {verification.kl:.4g} ± {verification.kl_stderr:.2g} nats, same top "
        f"{verification.same_top:.2%}\n"
    )
    if worst:
        rows = [(name, f"{e.plain:.3%}", f"{e.weighted:.3%}") for name, e in worst.items()]
        output.write_table([("worst matrices", "error", "weighted by inputs"), *rows])


def described(verification: "Verification") -> dict[str, object]:
    """A verification as --json shows it."""
    return {
        "tokens": verification.tokens,
        "kl": {"mean": verification.kl, "stderr": verification.kl_stderr},
        "same_top": verification.same_top,
        "worst": [{"name": name} | _described(e) for name, e in verification.worst(WORST).items()],
    }


def _described(error: "TensorError") -> dict[str, object]:
    return {"error": error.plain, "weighted_error": error.weighted}
