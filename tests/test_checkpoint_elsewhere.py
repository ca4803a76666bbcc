"""What is no checkpoint to convert, and that the message says what to take instead."""

from pathlib import Path

import pytest
from checkpoints import random_weights, tiny, write_hf

from quantize.checkpoint import open_checkpoint
from quantize.errors import GemmaError
from quantize.modelfile import ModelFile
from quantize.pipeline import quantize


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        # Kaggle's downloads, as they are unpacked.
        (("2b-it/_METADATA", "2b-it/checkpoint", "2b-it/d/1", "tokenizer.model"), "Flax"),
        (("gemma3-1b/manifest.ocdbt", "gemma3-1b/ocdbt.process_0/d/1"), "Flax"),
        (("checkpoint", "_sharding", "d/1"), "Flax"),
        (("config.json", "model.weights.h5", "assets/tokenizer/vocabulary.spm"), "Keras"),
        (("model.keras",), "Keras"),
        (("2b-it-sfp.sbs", "tokenizer.spm"), r"gemma\.cpp"),
        (("gemma3-1b-it-int4.task",), "LiteRT"),
    ],
)
def test_downloads_for_other_programs(tmp_path: Path, files: tuple[str, ...], kind: str) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
    with pytest.raises(GemmaError, match=rf'{kind}.*"Transformers" or "PyTorch"'):
        open_checkpoint(tmp_path)
    if "/" not in files[0] and files[0] != "config.json":
        with pytest.raises(GemmaError, match=kind):
            open_checkpoint(tmp_path / files[0])


def test_a_folder_of_checkpoints_is_not_flax(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(GemmaError, match=r"no config\.json"):
        open_checkpoint(tmp_path)
    with pytest.raises(GemmaError, match="does not exist"):
        open_checkpoint(tmp_path / "absent.keras")


@pytest.mark.parametrize("name", ["a.safetensors", "a.gemma", "model.safetensors"])
@pytest.mark.parametrize("version", ["3", "2"])
def test_a_model_file_is_not_converted_again(tmp_path: Path, name: str, version: str) -> None:
    config = tiny("gemma3")
    folder = write_hf(tmp_path / "gemma-3", config, random_weights(config))
    checkpoint = open_checkpoint(folder)
    model = tmp_path / name
    quantize(checkpoint, model, bits=8)
    data = model.read_bytes()
    assert data.count(b'"version":"3"') == 1
    model.write_bytes(data.replace(b'"version":"3"', b'"version":"%s"' % version.encode()))
    assert version != "3" or ModelFile.open(model).source == "gemma-3"
    beside = folder / name  # with a config.json and a tokenizer
    beside.write_bytes(model.read_bytes())
    for source in (model, beside):
        with pytest.raises(GemmaError, match=r"is a model file already.*\(gemma-3\)"):
            open_checkpoint(source)
    if name == "model.safetensors":
        with pytest.raises(GemmaError, match="is a model file already"):
            open_checkpoint(folder)
