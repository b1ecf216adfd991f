"""Where jaxdiff keeps what it can make again: trained small models, embeddings of prompts."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return $JAXDIFF_CACHE, or jaxdiff's folder in the user's cache; it need not exist."""
    given = os.environ.get("JAXDIFF_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxdiff"
