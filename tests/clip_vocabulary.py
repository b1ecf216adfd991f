"""A small vocabulary in CLIP's layout: every byte alone and at the end of a word, a few merges, begin and end."""

import json
from pathlib import Path

from transformers.convert_slow_tokenizer import bytes_to_unicode

MERGES = [("p", "h"), ("ph", "o"), ("t", "o</w>"), ("pho", "to</w>"), ("o", "f</w>"), ("c", "a"), ("ca", "t</w>")]
MERGES += [("d", "i"), ("di", "g"), ("dig", "it</w>"), ("i", "t</w>"), ("Ã", "©</w>"), ("'", "s</w>"), ("!", "!</w>")]


def vocabulary() -> dict[str, int]:
    """Return the tokens by id."""
    signs = list(bytes_to_unicode().values())
    tokens = [*signs, *(sign + "</w>" for sign in signs), *("".join(pair) for pair in MERGES)]
    return {token: number for number, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}


def write_vocabulary(folder: Path) -> Path:
    """Write vocab.json, merges.txt and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary()), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in MERGES)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
