"""`draftsmith push`: a drafter and its card as a Hub repository.

The weights are checked like any drafter's, the card is made from what was measured, and everything becomes one commit.
Uploads are by content: a push that was cut off goes on where it stopped, one that changes nothing makes no commit. The
token is huggingface_hub's (HF_TOKEN, `hf auth login`); it is never an argument and never shown.
"""

import tempfile
import time
from dataclasses import replace
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from draftsmith.launch.card import measured, model_card
from draftsmith.models.errors import UserError
from draftsmith.models.formats import fetch, layout_of, open_head, read_files, store
from draftsmith.models.hub import HUB_ID, hub_reason

WAITS = (1, 5, 20)  # seconds between attempts, where the Hub or the line fails
FAILURES = (HTTPError, OSError, ValueError, RuntimeError)  # HTTPError is that of the library that huggingface_hub uses


def push(
    place: str,
    repository: str,
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    results: Path | None = None,
    target: str | None = None,
    licence: str | None = None,
    report=print,
) -> str | None:
    """Returns the address of the commit (of the revision, when nothing changed); None for a dry run, which calls
    nobody.
    """
    if not HUB_ID.fullmatch(repository) or "@" in repository:
        raise UserError(f"{repository}: expected a Hub id, USER/NAME")
    with tempfile.TemporaryDirectory() as temporary:
        folder = stage(place, repository, Path(temporary) / "drafter", results, target, licence)
        files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.iterdir())}
        for name, size in files.items():
            report(f"{size:>13,} {name}")
        if dry_run:
            report(f"\n{(folder / 'README.md').read_text('utf-8')}\ndry run: nothing was sent to {repository}")
            return None
        return upload(HfApi(), folder, files, repository, private, revision, report)


def stage(
    place: str, repository: str, folder: Path, results: Path | None, target: str | None, licence: str | None
) -> Path:
    """The files of the repository: the drafter in the layout that engines load, draftsmith.json without this machine's
    paths, the card.
    """
    stored = read_files(fetch(place))
    named = target or stored.target
    if named is None or not (named.startswith(("bundled:", "hub:")) or HUB_ID.fullmatch(named)) or Path(named).is_dir():
        raise UserError(f"{stored.folder}: names the target {named}, expected a Hub id that others can load (--target)")
    serving = stored.serving and replace(stored.serving, verifier=named)
    if serving and named.startswith(("bundled:", "hub:")):
        raise UserError(
            f"{stored.folder}: found the verifier {named}, expected a Hub id that engines can load; push the drafter "
            f"that it was exported from"
        )
    layout = layout_of(stored)
    head = open_head(stored, stored.shared())
    cells, conditions = measured(stored.folder, results)
    store(head, folder, layout, portable({**stored.about, "target": named}), stored.dtype, serving)
    (folder / "README.md").write_text(
        model_card(repository, read_files(folder), layout, cells, conditions, licence), "utf-8"
    )
    return folder


def portable(value):
    """JSON with the absolute paths of this machine cut to their last part."""
    if isinstance(value, dict):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [portable(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def upload(
    api: HfApi, folder: Path, files: dict[str, int], repository: str, private: bool, revision: str | None, report
) -> str:
    for wait in (*WAITS, None):
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            if revision:
                api.create_branch(repository, branch=revision, exist_ok=True)
            check_before(api.model_info(repository, revision=revision), files, private)
            commit = api.upload_folder(
                folder_path=folder,
                repo_id=repository,
                revision=revision,
                commit_message="Push a drafter with draftsmith",
            )
            there = {
                s.rfilename: s.size for s in api.model_info(repository, revision=revision, files_metadata=True).siblings
            }
            wrong = {name: there.get(name) for name, size in files.items() if there.get(name) != size}
            if wrong:
                raise UserError(
                    f"{repository}: after the upload found {wrong}, expected "
                    f"{ ({name: files[name] for name in wrong}) }"
                )
            report(f"pushed to {commit.commit_url}")
            return commit.commit_url
        except FAILURES as error:
            if wait is None or not passing(error):
                raise UserError(
                    f"{repository}: {hub_reason(error.__cause__ or error)}; what was sent is kept, the same command "
                    f"goes on from there"
                ) from None
            report(f"{hub_reason(error)}; again in {wait} s")
            time.sleep(wait)


def check_before(there, files: dict[str, int], private: bool) -> None:
    """Nothing of others is overwritten, nothing is published by mistake, and no other weights lie beside ours (engines
    load all of them).
    """
    if private and not there.private:
        raise UserError(
            f"{there.id}: is public, expected a private one (--private does not hide a repository that exists)"
        )
    names = {sibling.rfilename for sibling in there.siblings}
    if "config.json" in names and "draftsmith.json" not in names:
        raise UserError(
            f"{there.id}: found a model that draftsmith did not push (config.json without draftsmith.json), expected "
            f"a new repository"
        )
    weights = sorted(name for name in names - set(files) if name.endswith((".safetensors", ".bin")))
    if weights:
        raise UserError(f"{there.id}: found {', '.join(weights)}, expected no weights beside the drafter's")


def passing(error: BaseException) -> bool:
    """Whether trying again may help: a broken line, an overloaded or failing server."""
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    if isinstance(cause, HfHubHTTPError):
        return cause.response is not None and (cause.response.status_code >= 500 or cause.response.status_code == 429)
    return isinstance(cause, HTTPError)
