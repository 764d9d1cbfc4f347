"""push: upload the folder of a pruned model to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.support.errors import InputError, first_line, reading
from secateur.support.fields import read_object, shown
from secateur.tasks.task_file import TASK_FILE

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_MARKS = (TASK_FILE, "report.json")  # secateur leaves one of them at least, or a recipe in the config.
_LOG_IN = "run `hf auth login`"


def push(folder: str | Path, repo_id: str, *, private: bool = False, message: str = "") -> str:
    """Upload a folder that secateur wrote to a model repository on the Hugging Face Hub.

    The repository is created if it does not exist. All files of the folder go there in one commit. Everything is checked before
    the repository is created: the folder, the name, the token and the connection.

    Args:
        folder: The folder, which `secateur.compress`, `secateur.save` with a task, or `secateur prune` wrote.
        repo_id: The name of the repository, "owner/name".
        private: Whether the repository must be private. A public one that exists already is then refused. Otherwise a new
            repository is as its owner's default says, which is public for users.
        message: The message of the commit. By default it names the folder.

    Returns:
        The address of the repository.

    Raises:
        InputError: secateur did not write the folder, or it has no config.json or no weights; the name cannot be one; no token
            is stored here; the Hub cannot be reached or refuses the token, the repository or the upload.

    Example:
        `secateur.push("smaller", "owner/smaller", private=True)`
    """
    folder, name = Path(folder), require_repository(repo_id)
    require_own_folder(folder)
    if not isinstance(message, str):
        raise InputError(f"message: expected a text, got {shown(message)}")
    api = signed_in()
    with _refused(api, f"create {name!r}"):  # None: the owner's default.
        created = api.create_repo(name, private=private or None, exist_ok=True)
    if private:
        _require_private(api, name)
    with _refused(api, f"upload to {name!r}"):
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=message or f"Upload {folder.resolve().name}")
    return str(created)


def require_pushable(repo_id: Any, *, private: bool) -> None:
    """Check before long work what `push` would refuse after it: the name, the token, the connection, a public repository.

    Args:
        repo_id: As in `push`.
        private: As in `push`.

    Raises:
        InputError: As `push`.
    """
    name, api = require_repository(repo_id), signed_in()
    if private:
        with _refused(api, f"tell whether {name!r} exists"):
            exists = api.repo_exists(name)
        if exists:
            _require_private(api, name)


def _require_private(api: HfApi, name: str) -> None:
    """Refuse a public repository."""
    with _refused(api, f"tell whether {name!r} is private"):
        is_private = api.model_info(name).private
    if not is_private:
        raise InputError(f"private: expected a private repository, got {name!r}, which is there already and is public")


def require_repository(repo_id: Any) -> str:
    """Return the name of a repository on the Hub.

    Raises:
        InputError: It is not "owner/name", or no repository can have it.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import HFValidationError

    try:
        hf_hub_url(repo_id, "config.json")  # Checks the name and asks nobody.
    except HFValidationError as error:
        raise InputError(f"repo_id: expected OWNER/NAME, got {shown(repo_id)}, which no repository can have") from error
    if not isinstance(repo_id, str) or repo_id.count("/") != 1:
        raise InputError(f"repo_id: expected OWNER/NAME, got {shown(repo_id)}")
    return repo_id


def require_own_folder(folder: Path) -> None:
    """Refuse a folder that is not a model that secateur wrote.

    Raises:
        InputError: There is no such folder, it has no config.json or no weights, or nothing in it tells that secateur wrote it.
    """
    if not folder.is_dir():
        raise InputError(f"folder: no such folder: {str(folder)!r}")
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"folder: expected a model's folder with a config.json, got {str(folder)!r}")
    with reading("folder", path, "is not a model's config"):
        config = read_object(path)
    if "secateur" not in config and not any((folder / name).is_file() for name in _MARKS):
        raise InputError(
            f"folder: expected one that secateur wrote, with {' or '.join(_MARKS)}, got {str(folder)!r}; secateur.save writes "
            f"{TASK_FILE} if it is given the task"
        )
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"folder: expected a model's weights (*.safetensors), got none in {str(folder)!r}")


def signed_in() -> HfApi:
    """Return the Hub's interface with the token that is stored here, after the Hub has accepted it.

    Raises:
        InputError: No token is stored, the Hub cannot be reached, or it refuses the token.
    """
    from huggingface_hub import HfApi, get_token

    token = get_token()
    if token is None:
        raise InputError(f"token: expected one of the Hugging Face Hub, got none: {_LOG_IN}, or set HF_TOKEN")
    api = HfApi(token=token)
    with _refused(api, "tell whose the token is"):
        api.whoami()
    return api


@contextmanager
def _refused(api: HfApi, what: str) -> Iterator[None]:
    """Turn the errors of a request into an InputError of one line, without the token."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except Exception as error:  # The HTTP client has errors of many types.
        causes = [error, error.__cause__]  # The upload of a large file wraps the Hub's answer.
        answer = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
        detail = first_line(answer or error).replace(str(api.token), "***")
        if answer is None:
            raise InputError(
                f"repo_id: the Hub cannot be reached, or the connection broke: cannot {what} ({type(error).__name__}: {detail})"
            ) from error
        status = answer.response.status_code
        if status in (401, 403):
            raise InputError(f"token: the Hub refuses to {what} with it ({status}): {detail}; {_LOG_IN}") from error
        raise InputError(f"repo_id: the Hub refuses to {what} ({status}): {detail}") from error
