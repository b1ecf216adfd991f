"""Files of a published model: from a folder, or by name from the Hugging Face hub, fetched once and kept."""

import functools
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxdiff.errors import InputError

Fetch = Callable[[str], Path | None]
"""From a file's name to where it lies on this machine; None if the model has no such file."""

FIRST_ASKED = ("config.json", "model_index.json")
"""Every model has the one, every pipeline the other."""
HUB_NAME = r"[\w.-]+(/[\w.-]+)?"
OPTIONS = ("cache_dir", "token", "local_files_only")
"""Those of huggingface_hub's `hf_hub_download` that may be given; a folder needs none of them."""
OLD_TOKEN = "use_auth_token"
"""What old scripts call `token`."""


def open_model(name_or_path: str | Path, revision: str | None = None, subfolder: str = "", **options: Any) -> Fetch:
    """Return how to get at the files of one model.

    Args:
      name_or_path: a folder, or OWNER/NAME on the hub.
      revision: branch, tag or commit; only the 40 digits of a commit always mean the same files.
      subfolder: of the folder or of the hub's repository.
      **options: see `OPTIONS`.

    Raises:
      InputError: no such folder and no possible hub name, a revision of a folder, or an option that is not known.
    """
    if OLD_TOKEN in options:
        options.setdefault("token", options.pop(OLD_TOKEN))
    if unknown := [option for option in options if option not in OPTIONS]:
        raise InputError(
            f"{name_or_path}: {unknown[0]}= is an option that jaxdiff does not have; of the hub's it takes "
            f"{', '.join(OPTIONS)}"
        )
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise InputError(f"{folder} is a folder, which has no revision {revision!r}: drop one of the two")
        return lambda name: path if (path := folder / subfolder / name).is_file() else None
    name = str(name_or_path)
    if not re.fullmatch(HUB_NAME, name) or name.startswith("."):
        raise InputError(f"{name}: no such folder; give the folder of a model, or OWNER/NAME on the Hugging Face hub")
    return lambda file: fetch_from_hub(name, file, revision, subfolder, options)


def fetch_from_hub(name: str, file: str, revision: str | None, subfolder: str, options: dict[str, Any]) -> Path | None:
    """Return where a file of the hub lies in the cache, fetched now if it is not there yet; None if there is none.

    Without a network, files that are not in the cache count as not there, save the config, which every model has.

    Raises:
      InputError: the hub has no such model or revision, or cannot be reached and the cache does not hold the model.
    """
    from huggingface_hub import constants, errors, hf_hub_download

    where = name + (f" (revision {revision})" if revision else "")
    if constants.HF_HUB_OFFLINE or not is_reachable():
        options = {**options, "local_files_only": True}
    try:
        return Path(hf_hub_download(name, file, revision=revision, subfolder=subfolder or None, **options))
    except errors.GatedRepoError as error:
        raise InputError(f"{where}: its owner asks for a login: accept the terms, then `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(f"{where}: neither a folder here nor a public model on the Hugging Face hub") from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{where}: the model has no such revision") from error
    except errors.HFValidationError as error:
        raise InputError(f"{where}: {error}") from error
    except errors.RemoteEntryNotFoundError:
        return None
    except (errors.LocalEntryNotFoundError, errors.HTTPError, OSError) as error:
        # Elsewhere the hub was asked, and failed to answer.
        offline = options.get("local_files_only") and isinstance(error, errors.LocalEntryNotFoundError)
        if offline and file not in FIRST_ASKED:
            return None
        pinned = f" --revision {revision}" if revision else ""
        raise InputError(
            f"{where}: no such folder, and the Hugging Face hub cannot be reached to fetch {file}. Either try again "
            f"with a network, or run `hf download {name}{pinned} --local-dir DIR` on a machine that has one, copy DIR "
            "here and give DIR instead of the name"
        ) from error


@functools.cache
def is_reachable() -> bool:
    """Tell whether the hub answers; asked once, because huggingface_hub itself tries for 20 seconds."""
    from huggingface_hub import constants

    if any(urllib.request.getproxies().get(scheme) for scheme in ("http", "https", "all")):
        # Only the proxy can tell.
        return True
    address = urllib.parse.urlsplit(constants.ENDPOINT)
    try:
        with socket.create_connection((address.hostname, address.port or 443), timeout=5):
            return True
    except OSError:
        return False
