"""Codec folders on the Hugging Face Hub: publish one, fetch one, say why that failed."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gradcodec.encodable import shown
from gradcodec.errors import ConfigError, HubError
from gradcodec.hub.card import make_card
from gradcodec.hub.document import is_document
from gradcodec.hub.folder import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME, Folder
from gradcodec.hub.local import bundled, write
from gradcodec.names import nearest

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo

REPO_ID: Final = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)


def push(
    repo_id: str,
    folder: Folder,
    *,
    revision: str | None = None,
    private: bool = False,
    token: str | None = None,
    message: str | None = None,
    card: str | None = None,
    replace: bool = False,
) -> str:
    """Publish the three files as one commit; the repository is created if there is none.

    Models have files of the same names. So a repository that is there already must be empty or hold
    a codec, as a folder must (``check_place``).

    Args:
        repo_id: ``user/name``.
        folder: what to publish.
        revision: branch to commit to, created if missing; the default branch when not given.
        private: the repository is created as a private one, or is one already.
        token: access token; ``HF_TOKEN`` or the stored login when not given.
        message: commit message.
        card: text of ``README.md``; generated when not given.
        replace: commit also where the repository holds something else than a codec.

    Returns:
        URL of the commit.

    Raises:
        HubError: the Hub cannot be reached or refuses.
        ConfigError: one half of the weights is missing, ``repo_id`` is not a repository id, the
            repository holds something else, or it is public and ``private`` was asked for.
    """
    if not REPO_ID.fullmatch(repo_id):
        raise ConfigError(f"expected a repository id 'user/name', got {repo_id!r}")
    from huggingface_hub import CommitOperationAdd, HfApi

    files = (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME)
    with tempfile.TemporaryDirectory() as local:
        write(local, folder, card=make_card(folder, repo_id) if card is None else card)
        try:
            api = HfApi(token=token, library_name="gradcodec")
            api.create_repo(repo_id, private=private, exist_ok=True)
            there = _there(api, repo_id, revision)
            _check_repository(api, there, private, replace)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = api.create_commit(
                repo_id,
                [CommitOperationAdd(f, Path(local, f)) for f in files],
                commit_message=message or f"{folder.kind} codec {folder.digest.hex()}",
                revision=revision,
                parent_commit=there.sha,  # what was checked, or the Hub refuses
            )
        except ConfigError:
            raise
        except Exception as err:
            raise _explain(err, repo_id, revision) from err
    return str(commit.commit_url)


def _there(api: HfApi, repo_id: str, revision: str | None) -> ModelInfo:
    """What a branch holds; of one that is not there yet, the default branch, which it begins as."""
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return api.model_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        return api.model_info(repo_id)


def _check_repository(api: HfApi, there: ModelInfo, private: bool, replace: bool) -> None:
    """Check that a commit shows nothing that should be private, and takes the place of nothing.

    Raises:
        ConfigError: it would.
    """
    if private and not there.private:
        raise ConfigError(
            f"{there.id} is there already and is public: make it private on the Hub, or leave "
            "private out"
        )
    files = [f.rfilename for f in there.siblings or () if f.rfilename != ".gitattributes"]
    if replace or not files:
        return
    config = b""
    if CONFIG_NAME in files:
        path = api.hf_hub_download(there.id, CONFIG_NAME, revision=there.sha)
        config = Path(path).read_bytes()
    if not is_document(config):
        raise ConfigError(
            f"expected a new or empty repository, or one that holds a codec, got {there.id} with "
            f"{shown(sorted(files)[:5], 100)}: choose another name, or say that its "
            f"{CONFIG_NAME}, {WEIGHTS_NAME} and {CARD_NAME} are to be replaced (replace=True, "
            "--replace)"
        )


def download(repo_id: str, revision: str | None) -> Path:
    """Both files of one commit, from the Hub or the client's cache."""
    from huggingface_hub import snapshot_download

    try:
        # A snapshot is of one commit; two single downloads could come from two commits.
        path = snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=[CONFIG_NAME, WEIGHTS_NAME],
            library_name="gradcodec",
        )
    except Exception as err:
        raise _explain(err, repo_id, revision) from err
    return Path(path)


def _bundled_near(repo_id: str) -> str:
    near = nearest(repo_id.rpartition("/")[2], bundled(), 1)
    return f"; the bundled codec {near[0]!r} has no user before its name" if near else ""


def _explain(err: Exception, repo_id: str, revision: str | None) -> HubError:
    """An error that says what was expected of the Hub and what came.

    Callers catch ``Exception``, because transport errors are classes of the HTTP library that
    ``huggingface_hub`` uses, and each major version of it has used another one.
    """
    from huggingface_hub import constants, errors

    status = getattr(getattr(err, "response", None), "status_code", None)
    if isinstance(err, errors.GatedRepoError):
        expected = "a token of an account that was granted access; the repository is gated"
    elif isinstance(err, errors.RevisionNotFoundError):
        expected = f"an existing branch, tag or commit, there is no {revision!r}"
    elif isinstance(err, errors.RepositoryNotFoundError):
        expected = (
            "a repository of this name, there is none, or it is private and the token does not "
            f"open it; no folder of this name is here{_bundled_near(repo_id)}"
        )
    elif isinstance(err, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        expected = "a reachable Hub or a complete cached copy, there is neither"
    elif status in (401, 403):
        expected = f"a token with access (HF_TOKEN or token=), it was refused with {status}"
    else:
        expected = "a complete answer of the Hub"
    came = " ".join(str(err).split())[:300]
    return HubError(
        f"{repo_id} at {constants.ENDPOINT}: expected {expected} [{type(err).__name__}: {came}]"
    )
