"""The tiny world's two tokenizers, built from its word list instead of trained."""

from __future__ import annotations

from transformers import CLIPTokenizer, T5Tokenizer

from srpo.tiny import ATTRIBUTES
from srpo.tiny.digits import NAMES

__all__ = ["LENGTH", "WORDS", "clip_tokenizer", "t5_tokenizer"]

WORDS = ("digit", *NAMES, *(word for pair in ATTRIBUTES.values() for word in pair))
LENGTH = 16  # tokens per prompt, padding included
PRINTABLE = [chr(code) for code in range(33, 127)]


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE in which every word of `WORDS` is one token; other text falls back to single bytes."""
    characters = _byte_characters()
    pieces = [*characters, *(c + "</w>" for c in characters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        symbols = [*word[:-1], word[-1] + "</w>"]
        for pair in merges:  # what the words before this one already merge
            symbols = _merge(symbols, pair)
        while len(symbols) > 1:
            merges.append((symbols[0], symbols[1]))
            symbols = _merge(symbols, merges[-1])
            pieces.append(symbols[0])
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def t5_tokenizer() -> T5Tokenizer:
    """Unigram in which every word of `WORDS` is one token; other text falls back to printable ASCII characters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [("▁" + word, -1.0) for word in WORDS]
    pieces += [(character, -4.0) for character in PRINTABLE]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=LENGTH)


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """`symbols` with every adjacent `pair` joined."""
    out: list[str] = []
    for symbol in symbols:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return out


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in the order of the bytes."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(hidden)) for byte in range(256)]
