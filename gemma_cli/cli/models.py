"""gemma-cli models: what is in the models folder."""

from gemma_cli.cli import options, output
from gemma_cli.cli.inspect import GENERATIONS
from gemma_cli.models import HOW_TO_GET_ONE, list_models, models_folder
from quantize.errors import GemmaError


def models(json: options.Json = False) -> None:
    """List the models that -m knows by name.

    Examples:

    gemma-cli models --json | jq -r '.[].name'
    """
    from quantize.modelfile import ModelFile

    rows = []
    described = []
    for path in list_models():
        try:
            file = ModelFile.open(path)
        except GemmaError as error:
            output.note(f"gemma-cli: {error}")
            continue
        kind = "base" if file.chat == "base" else "instruction-tuned"
        generation = GENERATIONS.get(file.config.generation, file.config.generation)
        bits = f"{file.bits_per_weight:.2f} bits"
        rows.append((path.stem, generation, kind, bits, output.size(file.size)))
        described.append(
            {
                "name": path.stem,
                "path": str(path),
                "generation": file.config.generation,
                "chat": file.chat,
                "bits_per_weight": file.bits_per_weight,
                "bytes": file.size,
            }
        )
    if json:
        output.write_json(described)
    elif rows:
        output.write_table(rows)
    else:
        output.note(f"There is no model in {models_folder()} yet: {HOW_TO_GET_ONE}.")
