"""Put a built kernel-hub folder on the hub, or say in one sentence why that cannot be."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CLIENTS = {"huggingface_hub", "httpx", "requests", "urllib3"}
"""Libraries whose errors mean that the hub refused or could not be reached."""


class Refused(Exception):
    """What cannot be built or uploaded, as a sentence with its remedy."""


class DryRun:
    """Takes the hub's place and prints what it is asked for."""

    def __getattr__(self, name: str) -> Any:
        def asked(*args: object, **options: object) -> str:
            words = [*map(str, args), *(f"{key}={value}" for key, value in options.items())]
            print(f"would call {name}({', '.join(words)})")
            return f"https://huggingface.co/kernels/{args[0] if args else options['repo_id']}"

        return asked


def hub_client() -> Any:
    """A client that knows repositories of the type kernel and has a token.

    Raises:
        Refused: it is missing, too old, or nobody has logged in.
    """
    try:
        import huggingface_hub
        from huggingface_hub import constants
    except ImportError as problem:
        rule = f"uploading needs huggingface_hub, which {sys.executable} does not have"
        raise Refused(f"--upload: {rule}. Run {sys.executable} -m pip install huggingface_hub.") from problem
    if not hasattr(constants, "REPO_TYPES_WITH_KERNEL"):
        rule = f"huggingface_hub {huggingface_hub.__version__} of {sys.executable} knows no repositories of the type kernel"
        raise Refused(f"--upload: {rule}. Run {sys.executable} -m pip install -U huggingface_hub.")
    if huggingface_hub.get_token() is None:
        raise Refused("HF_TOKEN: uploading needs a token of the Hugging Face hub, and there is none. Set HF_TOKEN, or run hf auth login.")
    return huggingface_hub.HfApi()


def upload(hub: Any, folder: Path, repo: str, branches: Sequence[str], *, private: bool) -> str:
    """Write the folder to each branch in one commit, deleting what is no longer in it. The repository's address.

    Args:
        hub: an `HfApi`, or what stands in for one.
        folder: as `build.build` writes it.
        repo: OWNER/NAME; made when there is none.
        branches: main first.
        private: of a new repository.

    Raises:
        Refused: the hub refuses or cannot be reached.
    """
    try:
        address = str(hub.create_repo(repo, repo_type="kernel", private=private, exist_ok=True))
        for branch in branches:
            if branch != "main":
                hub.create_branch(repo, branch=branch, repo_type="kernel", exist_ok=True)
            message = f"Build of {branch}"
            hub.upload_folder(
                repo_id=repo, folder_path=str(folder), repo_type="kernel", revision=branch, delete_patterns="*", commit_message=message
            )
    except Exception as problem:
        if not isinstance(problem, OSError | ValueError) and type(problem).__module__.partition(".")[0] not in CLIENTS:
            raise
        raise Refused(_sentence(problem, repo)) from problem
    return address


def _sentence(problem: Exception, repo: str) -> str:
    reason = str(problem).strip().split("\n")[0].rstrip(".")
    status = getattr(getattr(problem, "response", None), "status_code", None)
    owner = repo.split("/")[0]
    match status:
        case 401:
            return f"HF_TOKEN: the hub does not take it ({reason}). Make a token with write access, and set HF_TOKEN."
        case 403:
            rule = f"the token may not write there, or {owner} may not have kernel repositories yet ({reason})"
            return f"--repo = {repo}: {rule}. Ask for access in the settings of {owner}, or name a repository of your own."
        case 409:
            return f"--repo = {repo}: the name is taken ({reason}). Choose another name."
        case None if not isinstance(problem, ValueError):
            return f"--upload: the hub cannot be reached ({reason}). Run the command again where there is network."
        case _:
            return f"--repo = {repo}: the hub refuses ({reason}). Give OWNER/NAME of a kernel repository that the token may write to."
