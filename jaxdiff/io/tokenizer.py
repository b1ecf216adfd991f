"""CLIP's tokenizer: byte-pair encoding of lower-cased text between a begin and an end token (arXiv 2103.00020, 2.4).

Built by the `tokenizers` library from vocab.json and merges.txt, or from tokenizer.json; its ids are those of
transformers' CLIPTokenizer.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxdiff.errors import InputError
from jaxdiff.io.hub import Fetch
from jaxdiff.io.strict_json import read_strict_json

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
VOCABULARY_FILES = ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer.json")
"""The fourth may stand for the first three, as transformers 5 writes them."""
SETTINGS_FILE, SPECIAL_FILE = "tokenizer_config.json", "special_tokens_map.json"
TOKENIZER_FILES = (*VOCABULARY_FILES, SETTINGS_FILE, SPECIAL_FILE)
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""A piece of text that is encoded by itself: contractions, words, single digits, runs of other signs."""


class Tokens(NamedTuple):
    """Texts as a network reads them.

    Attributes:
      input_ids: one row a text, padded.
      attention_mask: 1 for tokens, 0 for padding.
    """

    input_ids: Int[np.ndarray, "B L"]
    attention_mask: Int[np.ndarray, "B L"]


class CLIPTokenizer:
    """From texts to token ids.

    Attributes:
      context_length: most tokens of a text, begin and end included.
      pad_id: id of the padding.
    """

    def __init__(
        self,
        vocab: dict[str, int],
        merges: Sequence[tuple[str, str]],
        context_length: int = 77,
        pad_token: str = END,
        added_tokens: Mapping[str, bool] = MappingProxyType({}),
    ):
        """Build the tokenizer.

        Args:
          vocab: id of each token; words end in "</w>".
          merges: pairs to join, the most urgent first.
          context_length: most tokens of a text.
          pad_token: what follows the end of a shorter text; in a text, too, it stands for the padding.
          added_tokens: tokens with ids after those of `vocab`, found in texts before anything else is, and whether
            they are looked for in the lower-cased text.

        Raises:
          InputError: the begin, end or padding token is not in the vocabulary, or a merge gives no token.
        """
        from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
        from tokenizers.models import BPE

        missing = [token for token in (BEGIN, END) if token not in vocab]
        if missing:
            raise InputError(f"the vocabulary has no token {missing[0]}; is it another model's?")
        try:
            model = BPE(vocab, list(merges), end_of_word_suffix="</w>", unk_token=END, continuing_subword_prefix="")
        except Exception as error:  # tokenizers raises bare exceptions
            raise InputError(f"vocabulary and merges do not fit each other ({error})") from error
        self._tokenizer = Tokenizer(model)
        self._tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        self._tokenizer.post_processor = processors.RobertaProcessing(
            sep=(END, vocab[END]), cls_token=(BEGIN, vocab[BEGIN]), trim_offsets=False, add_prefix_space=False
        )
        self._tokenizer.add_special_tokens([BEGIN, END])
        self._tokenizer.add_tokens(
            [AddedToken(token, normalized=lower) for token, lower in added_tokens.items() if token not in vocab]
        )
        pad_id = self._tokenizer.token_to_id(pad_token)
        if pad_id is None:
            raise InputError(f"the vocabulary has no padding token {pad_token!r}")
        # Stable Diffusion 2 pads with "!", which else would be "!</w>" at the end of a word.
        self._tokenizer.add_special_tokens([pad_token])
        self.context_length, self.pad_id = context_length, pad_id

    def __call__(
        self,
        texts: Sequence[str],
        truncate: bool = False,
        length: int | None = None,
        remedy: str = "have it cut by --truncate",
    ) -> Tokens:
        """Return the token ids of texts.

        Args:
          texts: at least one.
          truncate: drop what is too long, but for the end token, instead of refusing it.
          length: of all rows; None means that of the longest text.
          remedy: what the message about a text that is too long advises beside shortening it.

        Raises:
          InputError: a text is longer than `context_length` and is not to be truncated; the message says which.
        """
        encodings = self._tokenizer.encode_batch(list(texts))
        rows = [encoding.ids for encoding in encodings]
        for text, encoding in zip(texts, encodings):
            if len(encoding.ids) > self.context_length and not truncate:
                rest = text[encoding.offsets[self.context_length - 1][0] :]
                raise InputError(
                    f"the prompt {text!r} has {len(encoding.ids)} tokens, begin and end included, more than the "
                    f"{self.context_length} that the model reads; {rest!r} would be lost: shorten it, or {remedy}"
                )
        rows = [row if len(row) <= self.context_length else [*row[: self.context_length - 1], row[-1]] for row in rows]
        length = max(map(len, rows)) if length is None else length
        ids = np.full((len(rows), length), self.pad_id, np.int32)
        mask = np.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row)], mask[number, : len(row)] = row, 1
        return Tokens(ids, mask)

    def in_chunks(
        self, texts: Sequence[str], together: Sequence[tuple[int, ...]] = ()
    ) -> list[Int[np.ndarray, "chunks L"]]:
        """Return the token ids of texts of any length, for each as many rows of `context_length` as it needs.

        Each row has a begin and an end of its own.

        Args:
          texts: at least one.
          together: runs of ids that no row ends within, unless one is longer than a row.
        """
        chunked = []
        for row in self._rows(texts):
            rest = row[1:-1]
            chunks: list[np.ndarray] = []
            while rest or not chunks:
                end = self._end_of_chunk(rest, together)
                chunks.append(self._chunk(rest[:end]))
                rest = rest[end:]
            chunked.append(np.stack(chunks))
        return chunked

    def _end_of_chunk(self, ids: Sequence[int], together: Sequence[tuple[int, ...]]) -> int:
        """Return how many of the ids the next chunk holds."""
        end = self.context_length - 2
        for run in together:
            for start in range(max(1, end - len(run) + 1), end):
                if tuple(ids[start : start + len(run)]) == run:
                    return start
        return end

    def fill(self, chunks: Int[np.ndarray, "chunks L"], number: int) -> Int[np.ndarray, "more L"]:
        """Return `number` chunks, those that are missing made of an empty text."""
        return np.stack([*chunks, *[self._chunk([])] * (number - len(chunks))])

    def _chunk(self, ids: Sequence[int]) -> Int[np.ndarray, "L"]:
        """Return one row with begin, end and padding."""
        begin, end = (self._tokenizer.token_to_id(token) for token in (BEGIN, END))
        row = [begin, *ids, end]
        return np.array([*row, *[self.pad_id] * (self.context_length - len(row))], np.int32)

    def add_tokens(self, tokens: Sequence[str]) -> list[int]:
        """Make each text one token, found before anything else is and with its case; return their new ids.

        Raises:
          InputError: one of them is a token already, or cannot become one.
        """
        from tokenizers import AddedToken

        known = [token for token in tokens if self._tokenizer.token_to_id(token) is not None or self.knows(token)]
        if known or len(set(tokens)) < len(tokens):
            raise InputError(f"{known[0] if known else 'a token'} stands for something already: choose another name")
        self._tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
        if split := [token for token in tokens if not self.knows(token)]:
            raise InputError(f"the tokenizer would still split {split[0]!r}: choose another name")
        first = self.vocab_size - len(tokens)
        return list(range(first, first + len(tokens)))

    def knows(self, word: str) -> bool:
        """Tell whether a text is one token."""
        return len(self._rows([word])[0]) == 3  # with begin and end

    def was_given(self, word: str) -> bool:
        """Tell whether a text is one token that was added to the vocabulary, whose own words end in </w>."""
        return self.knows(word) and self._tokenizer.token_to_id(word) == self._rows([word])[0][1]

    def name_of(self, number: int) -> str:
        """Return the token of an id, in the vocabulary's spelling."""
        return str(self._tokenizer.id_to_token(number))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self._tokenizer.get_vocab_size()

    @property
    def digest(self) -> str:
        """SHA-256 of all that decides the ids of a text."""
        everything = f"{self._tokenizer.to_str()} {self.context_length} {self.pad_id}"
        return hashlib.sha256(everything.encode()).hexdigest()

    def count_too_long(self, texts: Sequence[str]) -> int:
        """Return how many texts have more than `context_length` tokens."""
        return sum(len(row) > self.context_length for row in self._rows(texts))

    def _rows(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]


def read_tokenizer(name: str, fetch: Fetch, context_length: int, vocab_size: int) -> CLIPTokenizer:
    """Return a published model's tokenizer.

    Args:
      name: of the model, for messages.
      fetch: from `open_model`.
      context_length: positions of the model's text transformer.
      vocab_size: rows of its token embedding.

    Raises:
      InputError: files are missing or damaged, or have more tokens than the model.
    """
    path, vocab, merges, added = read_vocabulary(name, fetch)
    try:
        tokenizer = CLIPTokenizer(vocab, merges, context_length, read_padding(fetch), added)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    largest = max(vocab.values()) + len([token for token in added if token not in vocab])
    if largest >= vocab_size:
        raise InputError(f"{path}: has token {largest}, but the model only knows 0..{vocab_size - 1}")
    return tokenizer


def read_vocabulary(name: str, fetch: Fetch) -> tuple[Path, dict[str, int], list[tuple[str, str]], dict[str, bool]]:
    """Return the file that a vocabulary is read from, the ids of its tokens, its merges, and tokens beside it.

    Of the tokens beside it, which may be in it too, the values tell whether they are looked for in lower case.

    Raises:
      InputError: files are missing or damaged.
    """
    added: dict[str, bool] = {}
    vocab_file, merges_file, whole_file = (fetch(file) for file in ("vocab.json", "merges.txt", "tokenizer.json"))
    if vocab_file and merges_file:
        path, vocab, merges = vocab_file, read_strict_json(vocab_file), read_merges(merges_file)
        extra = fetch("added_tokens.json")
        ids = read_strict_json(extra) if extra else {}
        added = dict.fromkeys(sorted(ids, key=lambda token: ids[token]), True)
    elif whole_file:
        path = whole_file
        vocab, merges, added = parse_whole(path, read_strict_json(path))
    else:
        raise InputError(f"{name}: has no tokenizer; it should hold vocab.json and merges.txt, or tokenizer.json")
    if not all(type(value) is int for value in vocab.values()):
        raise InputError(f"{path}: must give each token a number")
    return path, vocab, merges, added


def read_padding(fetch: Fetch) -> str:
    """Return the padding token, from the file where transformers' CLIPTokenizer takes it.

    special_tokens_map.json counts for more than tokenizer_config.json, unless the latter describes its tokens itself.

    Raises:
      InputError: a file is damaged, or says something else than a token.
    """
    pad: Any = None
    for name in (SETTINGS_FILE, SPECIAL_FILE):
        path = fetch(name)
        values = read_strict_json(path) if path else {}
        pad = values.get("pad_token", pad)
        pad = pad.get("content") if isinstance(pad, dict) else pad
        if not isinstance(pad, str | None):
            raise InputError(f"{path}: pad_token is {pad!r}, not a token")
        if "added_tokens_decoder" in values:
            break
    return pad or END


def parse_whole(path: Path, whole: dict[str, Any]) -> tuple[dict[str, int], list[tuple[str, str]], dict[str, bool]]:
    """Return vocabulary, merges and added tokens of a tokenizer.json, having checked that it is a CLIP tokenizer's."""
    try:
        model = whole["model"]
        if model["type"] != "BPE" or model["end_of_word_suffix"] != "</w>":
            raise InputError(f"{path}: not a CLIP tokenizer, whose model is BPE with words that end in </w>")
        merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
        added = sorted(whole.get("added_tokens", ()), key=lambda token: token["id"])
        return dict(model["vocab"]), merges, {token["content"]: token["normalized"] for token in added}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: not a tokenizer of the `tokenizers` library ({error!r})") from error


def read_merges(path: Path) -> list[tuple[str, str]]:
    """Return the pairs of a merges.txt, which begins with a line about its version."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    if wrong := [pair for pair in pairs if len(pair) != 2]:
        raise InputError(f"{path}: a line is {' '.join(wrong[0])!r}, but must hold two pieces")
    return [(first, second) for first, second in pairs]


def write_tokenizer(folder: Path, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> None:
    """Write vocab.json, merges.txt and tokenizer_config.json, which transformers' CLIPTokenizer reads too."""
    (folder / "vocab.json").write_text(json.dumps(dict(vocab)), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {"tokenizer_class": "CLIPTokenizer", "bos_token": BEGIN, "eos_token": END, "pad_token": END}
    (folder / SETTINGS_FILE).write_text(json.dumps({**settings, "unk_token": END}))
