"""Where drafters lie: a directory, `bundled:NAME`, or a Hub repository (`USER/NAME`, `USER/NAME@REVISION`)."""

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError, RevisionNotFoundError

from draftsmith.models.errors import UserError
from draftsmith.models.targets import locate

HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(@[\w./-]+)?")
SAFE_FILES = ("*.safetensors", "*.json")


def fetch(place: str | Path, files: Sequence[str] = SAFE_FILES) -> Path:
    """The directory behind a place. Of a Hub repository only `files` are downloaded (cached, resumed). Raises UserError
    in one line.
    """
    folder = Path(locate(place))
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(str(place)):
        raise UserError(
            f"{place}: no such directory; expected a drafter directory, a Hub id (USER/NAME or USER/NAME@REVISION) "
            f"or bundled:NAME"
        )
    name, _, revision = str(place).partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(files)))
    except (HTTPError, OSError, ValueError) as error:
        raise UserError(f"{place}: no such directory, and the Hub: {hub_reason(error)}") from None


def hub_reason(error: Exception) -> str:
    """What the Hub answered, in one line without tokens and signed addresses."""
    if isinstance(error, RepositoryNotFoundError):
        return "no such repository, or a private one that HF_TOKEN (or `hf auth login`) does not open"
    if isinstance(error, RevisionNotFoundError):
        return "no such revision"
    response = getattr(error, "response", None)
    status = f"HTTP {response.status_code}: " if response is not None else ""
    text = " ".join((getattr(error, "server_message", None) or str(error)).split())
    return status + re.sub(r"hf_\w+", "hf_...", re.sub(r"\?\S+", "", text))[:200]
