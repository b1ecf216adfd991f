"""File names made from labels, which come from data sets and other people's runs."""

import hashlib
import re

MAX_LENGTH = 100
"""Longest name in characters; file systems take 255 bytes, and endings follow."""


def as_file_name(text: str) -> str:
    """Return a text as a name that cannot lead out of its folder: itself if it is harmless, else cleaned and marked.

    What was cleaned carries a hash of the text, so that two texts never share a file.
    """
    clean = re.sub(r"[^\w .+-]", "-", text).lstrip(". ")[:MAX_LENGTH]
    if clean == text and clean:
        return text
    return f"{clean}-{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:8]}"
