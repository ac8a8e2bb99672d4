"""Whether the Hub has a model: asked once, without the retries that take minutes offline."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from effopd.errors import CompatibilityError
from effopd.models.folders import MODEL_CONFIG, adapter_base, hint, is_cached, near_path, quoted


def check_reachable(flag: str, name: str) -> None:
    """Check that a model is a path, is in the local cache, or is on the Hub and can be reached.

    For an adapter folder, its base is checked. A process asks once per name, and never with
    HF_HUB_OFFLINE=1.

    Args:
        flag: the flag that gave the name, for error messages.
        name: model folder or Hub id.

    Raises:
        CompatibilityError: the Hub has no such repository, or it cannot be reached.
    """
    base = adapter_base(flag, name)
    asked = name if base is None else base
    if not asked or Path(asked).exists() or constants.HF_HUB_OFFLINE or is_cached(asked):
        return
    error = _asked(asked)
    if error is None:
        return
    if base is not None:
        raise CompatibilityError(f"{flag} {name!r} cannot be read: got {quoted(error)}{hint(name, error)}") from error
    fault = "has no such model" if isinstance(error, RepositoryNotFoundError) else "cannot be reached"
    raise CompatibilityError(
        f"{flag} {name!r}: no such folder in {Path.cwd()}, and the Hub {fault} ({quoted(error)}). Expected a model "
        f"folder or a Hub id.{near_path(asked)} Check the spelling, the connection and the login (hf auth login). "
        "With HF_HUB_OFFLINE=1, only models in the local cache are used."
    ) from error


@cache
def _asked(name: str) -> Exception | None:
    """The error of one request for a model, if it means that no later one can succeed."""
    try:
        get_hf_file_metadata(hf_hub_url(name, MODEL_CONFIG), timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except GatedRepoError:
        return None
    except RepositoryNotFoundError as error:
        return error
    except HfHubHTTPError:  # no such file, or a fault that retries can mend
        return None
    except Exception as error:  # the HTTP client's own types
        return None if "Timeout" in type(error).__name__ else error
    return None
