"""A small tokenizer of Gemma's kind, trained by SentencePiece itself; what it says is right."""

from functools import cache
from io import BytesIO

import sentencepiece

CORPUS = """\
the quick brown fox jumps over the lazy dog and then the dog sleeps in the warm sun
a model reads the prompt token by token, and it writes the answer one token at a time
when the weights are read from memory, the speed of the memory is the speed of the model
<p>markup</p> is text to the user, and [brackets] are text too; start of turn, end of turn
the list had 12 items, then 345, then 6789, and at last 1234567890 items
ein kleines Modell, una prueba pequeña, маленькая модель, 小さなモデル, 小型模型
"""
SPACES = [" " * n for n in range(2, 9)]
NEWLINES = ["\n" * n for n in range(1, 9)]
TABS = ["\t" * n for n in range(1, 4)]
MARKUP = ["<table>", "</table>", "<h1>", "</i>", "</s>"]
# Gemma's published tokenizers type these as user-defined or control, as the generation goes.
MARKERS = ["<start_of_turn>", "<end_of_turn>", "<mask>", "[multimodal]", "<start_of_image>"]
MARKERS += [f"<unused{n}>" for n in range(10)]
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]


@cache
def train(markers_as_control: bool = True) -> bytes:
    """Return a ModelProto with the markers typed as control, or as user-defined."""
    plain = [*SPACES, *NEWLINES, *TABS, *MARKUP]
    user_defined = [piece.replace(" ", "▁") for piece in plain]
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines() * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=620,
        byte_fallback=True,
        split_digits=True,
        control_symbols=MARKERS if markers_as_control else [],
        user_defined_symbols=user_defined if markers_as_control else MARKERS + user_defined,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        character_coverage=0.98,
        minloglevel=2,
    )
    return model.getvalue()


def processor(model_proto: bytes) -> sentencepiece.SentencePieceProcessor:
    """Return SentencePiece's own tokenizer."""
    return sentencepiece.SentencePieceProcessor(model_proto=model_proto)


# Texts that tokenizers are known to trip over.
TEXTS = [
    "",
    "the quick brown fox",
    " leading and trailing ",
    "\n",
    *("a" + " " * n + "b" for n in (2, 3, 8, 9, 17, 100)),
    *("a" + "\n" * n + "b" for n in (2, 3, 8, 9, 17, 100)),
    "\t\t x \t\t\t\t\ty\r\n \n z",
    "12345 1 23 456.789",
    "小さなモデル と 模型",
    "маленькая модель, пequeña",
    "e\u0301 \u00e9 \ufb01 Ⅷ \u3000 \u200b \ufeff",
    "😀👩‍💻 🇩🇪 \U0010ffff",
    "nul \x00 and \x1b[31m escape \x7f",
    "<table><tr>cell</tr></table> </s> <h1>x",
    "<0x41> <0xZZ> ▁▁",
    "don't [stop] <p>now</p>",
]
