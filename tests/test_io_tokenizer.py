import json

import numpy as np
import pytest
from clip_vocabulary import vocabulary, write_vocabulary
from transformers import CLIPTokenizer

from jaxdiff.errors import InputError
from jaxdiff.io.hub import open_model
from jaxdiff.io.tokenizer import read_tokenizer

TEXTS = [
    "a photo of a cat",
    "A PHOTO of  the\tdigit\n3.",
    "cat's don't we'll I'd they've",
    "",
    "café, naïve — “quotes” … ½ ﬁ",
    "日本語 😀🎉!! ???",
    "3.14159 = π",
    "İstanbul ẞ",
    "<|endoftext|> in the middle <|startoftext|>",
]
SIZE = len(vocabulary())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_vocabulary(tmp_path_factory.mktemp("tokenizer"))


def read(folder, context_length=77, vocab_size=SIZE):
    return read_tokenizer(str(folder), open_model(folder), context_length, vocab_size)


@pytest.mark.parametrize("text", TEXTS)
def test_the_ids_of_transformers(folder, text):
    theirs = CLIPTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert len(theirs) > 1
    np.testing.assert_array_equal(read(folder)([text]).input_ids, [theirs])


def test_merges_are_used(folder):
    ids = vocabulary()
    wanted = [ids[token] for token in ("<|startoftext|>", "photo</w>", "of</w>", "cat</w>", "<|endoftext|>")]
    assert read(folder)(["photo of cat"]).input_ids.tolist() == [wanted]


def test_padding_and_truncation_of_transformers(folder):
    theirs = CLIPTokenizer.from_pretrained(folder)(TEXTS, padding=True)
    ours = read(folder)(TEXTS)
    np.testing.assert_array_equal(ours.input_ids, theirs["input_ids"])
    np.testing.assert_array_equal(ours.attention_mask, theirs["attention_mask"])
    theirs = CLIPTokenizer.from_pretrained(folder)(TEXTS, padding="max_length", truncation=True, max_length=9)
    ours = read(folder, context_length=9)(TEXTS, truncate=True, length=9)
    np.testing.assert_array_equal(ours.input_ids, theirs["input_ids"])
    np.testing.assert_array_equal(ours.attention_mask, theirs["attention_mask"])


def test_a_prompt_that_is_too_long_is_named(folder):
    with pytest.raises(InputError, match=r"the prompt 'cat cat cat' has 5 tokens, .* more than the 4 that the model"):
        read(folder, context_length=4)(["cat", "cat cat cat"])


@pytest.mark.parametrize("before", [72, 73, 74, 75, 0])
def test_a_word_of_several_tokens_is_not_torn_between_chunks(folder, before):
    tokenizer = read(folder)
    run = tuple(tokenizer.add_tokens(["<new>", "<new>_1", "<new>_2"]))
    letters = " ".join("x" * before)
    (chunks,) = tokenizer.in_chunks([f"{letters} <new> <new>_1 <new>_2 {' '.join('xx')}"], [run])
    x = tokenizer(["x"]).input_ids[0, 1]
    held = [[number for number in row[1:-1] if number != tokenizer.pad_id] for row in chunks]
    first = 75 if before == 72 else before  # only there the word ends where the chunk does
    assert held[0] == ([x] * before + list(run) + [x] * 2)[: first or None]
    assert [number for row in held for number in row] == [x] * before + list(run) + [x] * 2
    assert len(chunks) == (2 if before else 1)


def test_a_word_longer_than_a_chunk_fills_it(folder):
    tokenizer = read(folder)
    run = tuple(tokenizer.add_tokens([f"<{number}>" for number in range(80)]))
    (chunks,) = tokenizer.in_chunks([" ".join(f"<{number}>" for number in range(80))], [run])
    assert chunks[:, 1:-1].ravel()[:80].tolist() == list(run)


def test_what_transformers_5_writes_with_new_tokens(tmp_path, folder):
    theirs = CLIPTokenizer.from_pretrained(folder)
    theirs.add_tokens(["<new1>", "<new2>"])
    theirs.save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists()
    text = "a <new2> cat beside <new1>s and <NEW1>"
    ours = read(tmp_path, vocab_size=SIZE + 2)
    np.testing.assert_array_equal(ours([text]).input_ids, [theirs(text)["input_ids"]])
    assert SIZE + 1 in ours([text]).input_ids
    with pytest.raises(InputError, match=f"has token {SIZE + 1}, but the model only knows 0..{SIZE - 1}"):
        read(tmp_path)


def token(content: str, **more) -> dict:
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    return {"content": content, **flags, **more}


def write_published(folder, settings_pad, special_pad, described=None):
    """Write the four files of stabilityai's and CompVis' folders, as transformers 4 wrote them.

    `described` is a padding token that tokenizer_config.json describes itself, as since transformers 4.34.
    """
    write_vocabulary(folder)
    begin_end = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    settings = {
        "add_prefix_space": False,
        **{name: {"__type": "AddedToken", **token(content)} for name, content in begin_end.items()},
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": 77,
        "pad_token": settings_pad,
        "special_tokens_map_file": "./special_tokens_map.json",
        "tokenizer_class": "CLIPTokenizer",
    }
    if described is not None:
        ids = {"<|startoftext|>", "<|endoftext|>", described}
        decoder = {str(vocabulary()[name]): token(name, special=True) for name in ids}
        settings = {**settings, "added_tokens_decoder": decoder}
    special = {name: token(content) for name, content in begin_end.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(json.dumps({**special, "pad_token": special_pad}))


EXCLAMATIONS = ["!", "a photo of a cat!", "WOW!cat", "a !! b ! c", "!cat", "3.14159 = π", ""]
END = "<|endoftext|>"


@pytest.mark.parametrize(
    ("pads", "expected"),
    [
        ((END, END), END),  # Stable Diffusion 1
        ((END, "!"), "!"),  # Stable Diffusion 2
        ((END, token("!", normalized=False)), "!"),
        (("!", END), END),
        (("!", END, "!"), "!"),  # the settings describe their tokens, so the map is not asked
        ((END, "!", END), END),
    ],
)
def test_the_padding_of_published_folders(tmp_path, pads, expected):
    write_published(tmp_path, *pads)
    twin, ours = CLIPTokenizer.from_pretrained(tmp_path), read(tmp_path)
    assert twin.pad_token == expected
    assert ours.pad_id == twin.pad_token_id
    theirs = twin(EXCLAMATIONS, padding="max_length", max_length=12)
    found = ours(EXCLAMATIONS, length=12)
    np.testing.assert_array_equal(found.input_ids, theirs["input_ids"])
    np.testing.assert_array_equal(found.attention_mask, theirs["attention_mask"])
    # In a prompt, too, it is the padding.
    assert (ours.pad_id in ours(["WOW!cat"]).input_ids[0, 1:-1]) == (expected == "!")


def test_added_tokens_of_older_versions_and_another_padding(tmp_path):
    write_vocabulary(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<new2>": SIZE + 1, "<new1>": SIZE}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "!"}}))
    ours = read(tmp_path, vocab_size=SIZE + 2)(["<new2> <new1>", "<new1>"])
    pad = vocabulary()["!"]
    assert ours.input_ids[:, 1:].tolist() == [[SIZE + 1, SIZE, SIZE - 1], [SIZE, SIZE - 1, pad]]


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"vocab.json": None, "tokenizer.json": None}, "has no tokenizer; it should hold vocab.json and merges.txt"),
        ({"vocab.json": "[1]"}, "vocab.json: cannot be read .a list instead of an object"),
        ({"vocab.json": '{"a": 1}'}, r"the vocabulary has no token <\|startoftext\|>"),
        ({"vocab.json": '{"a": "b"}'}, "must give each token a number"),
        ({"merges.txt": "#version: 0.2\na b c\n"}, "merges.txt: a line is 'a b c', but must hold two pieces"),
        ({"merges.txt": "qq zz\n"}, "vocabulary and merges do not fit each other"),
        ({"tokenizer_config.json": '{"pad_token": "<pad>"}'}, "the vocabulary has no padding token '<pad>'"),
        ({"tokenizer_config.json": '{"pad_token": [1]}'}, r"pad_token is \[1\], not a token"),
        ({"special_tokens_map.json": '{"pad_token": 3}'}, r"special_tokens_map.json: pad_token is 3, not a token"),
        ({"special_tokens_map.json": "[]"}, r"special_tokens_map.json: cannot be read"),
        ({"merges.txt": None, "tokenizer.json": '{"model": {"type": "Unigram"}}'}, "not a CLIP tokenizer"),
        ({"merges.txt": None, "tokenizer.json": "{}"}, "not a tokenizer of the `tokenizers` library"),
    ],
)
def test_files_that_are_no_clip_tokenizer_are_refused(tmp_path, files, sentence):
    write_vocabulary(tmp_path)
    for name, text in files.items():
        if text is None:
            (tmp_path / name).unlink(missing_ok=True)
        else:
            (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=sentence):
        read(tmp_path)
