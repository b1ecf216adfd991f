"""File names made from labels, which come from data sets and other people's runs."""

import hashlib
import re

MAX_BYTES = 100
"""Longest name before its mark, in bytes of UTF-8; file systems take 255, and endings follow."""


def as_file_name(text: str) -> str:
    """Return a text as a name that cannot lead out of its folder: itself if it is harmless, else cleaned and marked.

    What was cleaned carries a hash of the text, and so does what looks as if it did, so that two texts never share a
    file.
    """
    clean = re.sub(r"[^\w .+-]", "-", text).lstrip(". ")
    clean = clean.encode(errors="replace")[:MAX_BYTES].decode(errors="ignore")
    if clean == text and clean and not re.search(r"-[0-9a-f]{8}$", text):
        return text
    return f"{clean}-{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:8]}"
