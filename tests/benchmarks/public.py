"""Where the files of the public suites lie, which are data of others and stay outside the repository."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def suites_folder(asked: Path | None, needed: list[str] = ()) -> Path:
    """The folder asked for, else what DRAFTSMITH_SUITES names, else `../shared/data/suites` beside the project. Exits
    with one line where a needed file is absent.
    """
    folder = asked or Path(os.environ.get("DRAFTSMITH_SUITES") or ROOT / "../shared/data/suites").resolve()
    missing = [str(folder / name) for name in dict.fromkeys(needed) if not (folder / name).is_file()]
    if missing:
        raise SystemExit(f"error: found no {', '.join(missing)}, expected the suites' files (--suites FOLDER)")
    return folder
