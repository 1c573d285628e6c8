"""Where drafters lie: a directory, `bundled:NAME`, or a Hub repository (`USER/NAME`, `USER/NAME@REVISION`)."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError

from draftsmith.models.errors import UserError
from draftsmith.models.hub import HUB_ID, hub_reason
from draftsmith.models.targets import locate

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
