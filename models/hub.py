"""What names of repositories on the Hub look like, and what the Hub answers, in one line."""

import re

from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(@[\w./-]+)?")


def hub_reason(error: Exception) -> str:
    """What the Hub answered, in one line without tokens and signed addresses."""
    if isinstance(error, RepositoryNotFoundError):
        return "no such repository, or a private one that HF_TOKEN (or `hf auth login`) does not open"
    if isinstance(error, RevisionNotFoundError):
        return "no such revision"
    if isinstance(error, LocalEntryNotFoundError):
        return "not reachable, and not in its cache"
    if isinstance(error, EntryNotFoundError):
        return "no such file there"
    response = getattr(error, "response", None)
    status = f"HTTP {response.status_code}: " if response is not None else ""
    text = " ".join((getattr(error, "server_message", None) or str(error)).split())
    return status + re.sub(r"hf_\w+", "hf_...", re.sub(r"\?\S+", "", text))[:200]
