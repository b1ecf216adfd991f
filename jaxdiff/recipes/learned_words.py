"""Words that a text encoder has learned: new rows below its table of tokens, and new tokens that find them."""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from jaxdiff.errors import InputError
from jaxdiff.io.learned_embeddings import Learned
from jaxdiff.io.tokenizer import CLIPTokenizer
from jaxdiff.recipes.stable_diffusion import Params, StableDiffusion

TABLE = ("text_encoder", "text_model", "embeddings", "token_embedding", "embedding")
"""Where the table of tokens lies in the parameters of Stable Diffusion."""


def add_words(
    model: StableDiffusion, params: Params, tokenizer: CLIPTokenizer, learned: Learned
) -> tuple[StableDiffusion, Params]:
    """Return the model and its parameters with rows for new words, which the tokenizer learns too.

    A word of several vectors becomes as many tokens, which `spell_out` writes into a prompt. The new rows follow those
    of the tokens that there are: rows below, which pad some tables to a round size, no text ever reached.

    Raises:
      InputError: a word is known already, or its vectors are of another model.
    """
    if not learned:
        return model, params
    table, encoder = get_leaf(params, TABLE), model.text_encoder
    check_widths(learned, table.shape[1])
    size = tokenizer.vocab_size
    if size > len(table):
        raise InputError(f"the tokenizer has {size} tokens, the text encoder only {len(table)}")
    tokenizer.add_tokens([name for word, rows in learned.items() for name in token_names(word, len(rows))])
    added = jnp.concatenate([table[:size], *(jnp.asarray(rows, table.dtype) for rows in learned.values())])
    config = replace(encoder.config, vocab_size=len(added))
    return replace(model, text_encoder=encoder.clone(config=config)), set_leaf(params, TABLE, added)


def check_widths(learned: Learned, width: int) -> None:
    """Raise InputError unless the vectors of all words have as many numbers as the model's tokens."""
    for word, rows in learned.items():
        if rows.shape[1] != width:
            raise InputError(
                f"{word}: its vectors have {rows.shape[1]} numbers, but this model's tokens have {width}: they were "
                "learned with another model"
            )


def first_rows(params: Params, count: int) -> Params:
    """Return the parameters with the first rows of the table of tokens alone."""
    return set_leaf(params, TABLE, get_leaf(params, TABLE)[:count])


def token_names(word: str, count: int) -> list[str]:
    """Return the tokens of a word of `count` vectors, named as diffusers names them."""
    return [word, *(f"{word}_{number}" for number in range(1, count))]


def ids_of_words(tokenizer: CLIPTokenizer, learned: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    """Return the tokens of each word, whose vectors `learned` holds, in a tokenizer that knows them."""
    names = [token_names(word, len(rows)) for word, rows in learned.items()]
    return tuple(tuple(int(ids[1]) for ids in tokenizer(own).input_ids) for own in names)


def spell_out(prompt: str, learned: Mapping[str, Any]) -> str:
    """Return the prompt with every learned word of several vectors as all of its tokens.

    Words are found where the tokenizer finds them, inside others too: from the left, and of two that begin there the
    longer one. A word that is spelled out already stays as it is.
    """
    spelled: dict[str, str] = {}
    for word, rows in learned.items():
        names = token_names(word, len(rows))
        whole = " ".join(names)
        spelled |= {**dict(zip(names, names)), word: whole, whole: whole}
    return longest_of(spelled).sub(lambda found: spelled[found[0]], prompt)


def words_said(text: str, learned: Mapping[str, Any]) -> set[str]:
    """Return which learned words a text says, found as in `spell_out`: a longer word does not say a shorter in it."""
    of_name = {name: word for word, rows in learned.items() for name in token_names(word, len(rows))}
    return {of_name[name] for name in longest_of(of_name).findall(text)}


def longest_of(names: Collection[str]) -> re.Pattern[str]:
    """Return the expression that finds names as the tokenizer finds tokens that it was given; none of no names."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")


def get_leaf(tree: Any, path: tuple[str, ...]) -> Any:
    """Return the leaf of nested dicts below these names."""
    for name in path:
        tree = tree[name]
    return tree


def set_leaf(tree: Any, path: tuple[str, ...], leaf: Any) -> Any:
    """Return nested dicts with another leaf below these names; the rest is shared."""
    return {**tree, path[0]: set_leaf(tree[path[0]], path[1:], leaf)} if path else leaf
