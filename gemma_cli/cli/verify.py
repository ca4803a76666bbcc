"""gemma-cli verify: whether a model file is as it was written."""

from gemma_cli.cli import loading, options, output
from quantize.errors import GemmaError

NAMED = 5  # damaged tensors


def verify(model: options.ModelName = None) -> None:
    """Compare every checksum in a model file with what is there: finds any bit that changed."""
    file = loading.open_model(model)  # compares the header's
    with output.progress_bar("Verifying", file.size, in_bytes=True) as progress:
        damaged = file.damaged_tensors(progress)
    if damaged:
        more = f" and {len(damaged) - NAMED} more" if len(damaged) > NAMED else ""
        raise GemmaError(
            f"{file.path} is damaged: {', '.join(damaged[:NAMED])}{more} of {len(file.tensors)} "
            "tensors do not have their checksums; convert the checkpoint again."
        )
    output.write(f"{file.path}: {len(file.tensors)} tensors, {output.size(file.size)}: whole\n")
