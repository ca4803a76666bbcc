"""Text to token ids and back: tokenizer, chat turns, streaming decoder."""
