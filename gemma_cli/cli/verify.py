"""gemma-cli verify: whether a model file is as it was written."""

from gemma_cli import integrity
from gemma_cli.cli import loading, options, output
from quantize.errors import visible


def verify(model: options.ModelName = None) -> None:
    """Check that a model file is as it was written.

    Every checksum in it is compared with what is there, which finds any bit that changed.

    Examples:

    gemma-cli verify -m gemma-3-270m-int4
    """
    file = loading.open_model(model)  # compares the header's
    with output.progress_bar("Verifying", file.size, in_bytes=True) as progress:
        integrity.check(file, progress)
    told = f"{file.path}: {len(file.tensors)} tensors, {output.size(file.size)}: whole\n"
    output.write(visible(told))
