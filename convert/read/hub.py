"""Download a checkpoint from the hub, and publish one.

Interrupted downloads resume, and files stay in the hub's cache.

Not covered: login (`hf auth login`).
"""

import fnmatch
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mlx_clex.checkpoint.files import read_json
from mlx_clex.checkpoint.folder import TEMPLATES, files_of
from mlx_clex.errors import InputError, RunError, one_line

from .source import CONFIG_FILES, TOKENIZER_FILES, choose_weights

T = TypeVar("T")
_PATIENCE = 10  # seconds to wait for the first answer


class Listing(NamedTuple):
    """The files of a repository that a conversion needs."""

    commit: str
    sizes: dict[str, int]  # file -> bytes
    folder: Path | None  # of the snapshot in the hub's cache, when offline


def look_up(repo: str, revision: str | None = None) -> Listing:
    """Return the listing of a repository, from the hub or, when offline, from its cache.

    Args:
        repo: hub id, "owner/name".
        revision: branch, tag or commit.

    Raises:
        InputError: no such id or revision, no access, no weights, or neither the hub nor a
            cached copy can be reached.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    def ask() -> Listing:
        # This request fails at once; downloads retry for 25 seconds.
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=_PATIENCE)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        top = [name for name in sizes if "/" not in name]

        def read_index(name: str) -> Any:
            return read_json(Path(hf_hub_download(repo, name, revision=info.sha)))

        _, weights = choose_weights(top, read_index, f"The repository {repo}")
        patterns = [*CONFIG_FILES, *TOKENIZER_FILES, *weights, "*.index.json"]
        wanted = [n for n in top if any(fnmatch.fnmatch(n, pattern) for pattern in patterns)]
        wanted += fnmatch.filter(sizes, f"{TEMPLATES}/*.jinja")
        return Listing(info.sha or "", {name: sizes[name] for name in wanted}, None)

    try:
        return guarded(repo, revision, ask)
    except (OfflineModeIsEnabled, RunError) as error:
        try:
            # No pattern: the folder is wanted, whether or not all files are there.
            folder = Path(
                snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[])
            )
        except LocalEntryNotFoundError:
            raise InputError(
                f"There is no folder {repo} here, and the hub did not answer: {one_line(error)}"
            ) from error
        sizes = {file.name: file.stat().st_size for file in files_of(folder)}
        return Listing(folder.name, sizes, folder)


def config_folder(repo: str, listing: Listing) -> Path:
    """Return the folder of config.json in the hub's cache; download the file if needed.

    Raises:
        InputError, RunError: as `guarded`.
    """
    from huggingface_hub import hf_hub_download

    return listing.folder or guarded(
        repo, None, lambda: Path(hf_hub_download(repo, "config.json")).parent
    )


def download(repo: str, revision: str | None = None) -> Path:
    """Download the files that a conversion needs, and return their folder.

    Args:
        repo: hub id, "owner/name".
        revision: branch, tag or commit.

    Returns:
        The folder of the snapshot in the hub's cache.

    Raises:
        InputError: as `look_up`.
        RunError: the network failed during the download.
    """
    from huggingface_hub import snapshot_download

    listing = look_up(repo, revision)
    if listing.folder is not None:
        return listing.folder
    wanted = list(listing.sizes)

    def snapshot() -> Path:
        # By its name, not its commit: only then can it be found without a network.
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))

    return guarded(repo, revision, snapshot)


def check_upload(repo: str) -> None:
    """Refuse an upload that cannot work, before the conversion starts.

    Raises:
        InputError: the id is malformed, or the user is not logged in.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"--upload-repo {repo!r} is no hub id: {error}") from error
    if "/" not in repo:
        raise InputError(f"--upload-repo {repo!r} must be owner/name.")
    if get_token() is None:
        raise InputError("--upload-repo needs a hub login: run `hf auth login` or set HF_TOKEN.")


def upload(folder: Path, repo: str) -> str:
    """Publish a converted folder with its model card, and return the address.

    Args:
        folder: the finished folder.
        repo: hub id, "owner/name"; made if it does not exist.

    Returns:
        The address of the repository.

    Raises:
        InputError: the user may not write to the repository.
        RunError: the network failed; the folder is complete and can be uploaded again.
    """
    from huggingface_hub import HfApi

    def send() -> str:
        api = HfApi()
        url = api.create_repo(repo, repo_type="model", exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message="Upload a checkpoint for mlx_clex",
            ignore_patterns=[".*"],  # what macOS put there since
        )
        return str(url)

    return guarded(repo, None, send)


def guarded(repo: str, revision: str | None, act: Callable[[], T]) -> T:
    """Return the result of a hub call; turn its exceptions into InputError or RunError.

    Raises:
        InputError: no such id or revision, or no access.
        RunError: the network failed.
        OfflineModeIsEnabled: HF_HUB_OFFLINE is set.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return act()
    except GatedRepoError as error:
        raise InputError(
            f"{repo} is gated: accept the terms on its page, then run `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"{repo} has no revision {revision!r}.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(
            f"There is neither a folder {repo} here nor a repository of that name on the hub "
            "that you may read. If it is private, run `hf auth login`."
        ) from error
    except (InputError, OfflineModeIsEnabled):
        raise
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise InputError(f"The hub refuses {repo}: {error}") from error
        raise RunError(f"The hub failed for {repo}: {error}") from error
    except Exception as error:
        # The HTTP library under huggingface_hub changes with its version, and its errors
        # share no base class with OSError.
        if not _is_network_error(error):
            raise
        raise RunError(
            f"The connection to the hub failed for {repo}: {str(error).rstrip('.')}. Run the "
            "command again; downloaded files are kept."
        ) from error


def _is_network_error(error: Exception) -> bool:
    modules = {base.__module__.partition(".")[0] for base in type(error).__mro__}
    return isinstance(error, OSError) or bool(modules & {"httpx", "httpx2", "requests"})
