"""Models on a hub: names that a user gives (`hf:user/model@revision`, `timm:NAME`), and models that are put there.

Only safetensors and JSON are fetched, never a pickle or code. A host is asked for names that the user wrote, never for
one that stands in a file.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from diffmae_video._version import __version__
from diffmae_video.errors import DataError, StorageError, UsageError
from diffmae_video.files import cache_folder, sha256_of, write_atomic

if TYPE_CHECKING:
    from diffmae_video.models.classifier import Classifier
    from diffmae_video.models.diffmae import DiffMAE

PREFIXES = ("hf:", "timm:")
_FETCHED = ["*.safetensors", "*.json"]
_OWN = ("model.json", "weights.safetensors")


def is_hub_name(name: str | Path) -> bool:
    """Whether a checkpoint is named on a hub rather than by a path."""
    return str(name).startswith(PREFIXES)


def hub_stem(name: str | Path) -> str:
    """A hub name as the name of a file: `user--model--revision`."""
    return str(name).partition(":")[2].replace("/", "--").replace("@", "--")


def download(name: str) -> Path:
    """Folder with the safetensors and JSON files of a model; those that the user's cache holds are not fetched again.

    Args:
        name: `hf:user/model`, with `@revision` (branch, tag or commit) for another than the newest, or `timm:NAME`
            with a name of `timm.list_pretrained()`.

    Raises:
        UsageError: there is no such model or revision, or it is not open to this user.
        StorageError: the hub cannot be reached, and the cache does not have it.
        DataError: there are no safetensors in it.
    """
    from huggingface_hub import snapshot_download

    repo, _, revision = (_timm_repo(name) if name.startswith("timm:") else name.removeprefix("hf:")).partition("@")
    try:
        folder = Path(
            snapshot_download(repo, revision=revision or None, allow_patterns=_FETCHED, ignore_patterns="*/*")
        )
    except Exception as error:  # of the hub's library, or of the library below it
        raise _told(name, error) from error
    if not any(folder.glob("*.safetensors")):
        raise DataError(f"{name} holds no safetensors, and nothing else is fetched; ask its author for them.")
    return folder


def local_weights(name: str) -> Path:
    """Folder that `load_pretrained` reads for a hub name, fetched if need be.

    Raises:
        UsageError, StorageError, DataError: see `download`; or the weights are in several files.
    """
    folder = download(name)
    if any((folder / file).is_file() for file in ("weights.safetensors", "model.safetensors")):
        return folder
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > 1:
        shown = ", ".join(file.name for file in files[:3])
        raise DataError(f"{name} holds several files of weights ({shown}); download one, and `diffmae import` it.")
    return files[0]


def model_folder(name: str) -> Path:
    """Folder of ours (model.json and weights.safetensors) for a hub name; another project's weights are imported once.

    Raises:
        UsageError, StorageError, DataError: see `local_weights` and `importers.import_weights`.
    """
    from diffmae_video.models.importers import import_weights, pretrained_file
    from diffmae_video.models.weights import save_model

    source = local_weights(name)
    if all((source / file).is_file() for file in _OWN):
        return source
    digest = sha256_of(pretrained_file(source))
    folder = cache_folder() / "imports" / f"{hub_stem(name)}-{digest[:16]}-{__version__}"
    if not (folder / "model.json").is_file():  # written last
        model = import_weights("auto", source)
        save_model(model, folder, {"file": name})
    return folder


class HubModel:
    """What a model has to go to a hub and to come from one, by the names that Hugging Face's libraries use."""

    def save_pretrained(self, directory: Path | str, licence: str = "unknown") -> Path:
        """Write weights.safetensors, model.json and a model card (README.md) into a folder, which is made if need be.

        Args:
            licence: named on the card.

        Returns:
            The folder.
        """
        from diffmae_video.models.card import model_card
        from diffmae_video.models.weights import save_model

        model, directory = cast("DiffMAE | Classifier", self), Path(directory)
        save_model(model, directory)
        write_atomic(directory / "README.md", model_card(model, "safetensors", licence))
        return directory

    @classmethod
    def from_pretrained(cls, name: Path | str, revision: str | None = None, **options: Any) -> Self:
        """A model from a folder or a hub: ours, or another project's weights as `load_pretrained` reads them.

        Args:
            name: a path, `user/model` (also written `hf:user/model`), or `timm:NAME`.
            revision: branch, tag or commit on the hub.
            options: of `importers.import_weights`, for another project's weights.

        Raises:
            UsageError: nothing is there, or it is a model of another class.
            StorageError, DataError: see `local_weights` and `importers.import_weights`.
        """
        from diffmae_video.models.importers import load_pretrained

        path: Path | str = name
        if not Path(name).exists():
            hub_name = str(name) if is_hub_name(name) else f"hf:{name}"
            path = local_weights(f"{hub_name}@{revision}" if revision else hub_name)
        model = load_pretrained(path, **options)
        if not isinstance(model, cls):
            raise UsageError(f"{name} is a {type(model).__name__}, not a {cls.__name__}; load it as that.")
        return model

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        branch: str | None = None,
        commit_message: str = "Weights, description and card",
        token: str | None = None,
        licence: str = "unknown",
    ) -> str:
        """Put weights.safetensors, model.json and the card into a repository, which is made if need be.

        Args:
            repo_id: `user/model`.
            private: of a repository that is made; the user's default without it.
            branch: to commit to; the main one without it.
            commit_message: one line.
            token: of the user; the saved one without it.
            licence: named on the card.

        Returns:
            URL of the commit.

        Raises:
            UsageError: no such user, or none that may write there.
            StorageError: the hub cannot be reached.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, licence)
            try:
                repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
                if branch is not None:
                    api.create_branch(repo, branch=branch, exist_ok=True)
                commit = api.upload_folder(
                    repo_id=repo, folder_path=folder, revision=branch, commit_message=commit_message
                )
            except Exception as error:
                raise _told(f"hf:{repo_id}", error) from error
        return str(commit.commit_url)


def _timm_repo(name: str) -> str:
    """The repository of a model of timm, by timm's own table."""
    import diffmae_video.compat  # noqa: F401 - before timm, which imports torchvision

    import timm

    architecture = name.removeprefix("timm:")
    try:
        config = timm.models.get_pretrained_cfg(architecture)
    except (RuntimeError, AttributeError, KeyError):
        config = None
    if config is None or not config.hf_hub_id:
        raise UsageError(f"{name} is no name of timm with weights on the hub; timm.list_pretrained() lists them.")
    repo = config.hf_hub_id
    if repo.endswith("/"):
        tag = f".{config.tag}" if config.tag else ""
        repo += f"{config.architecture}{tag}"
    return repo


def _told(name: str, error: Exception) -> UsageError | StorageError:
    """One sentence about what the hub's library raised."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return UsageError(f"{name} is open to those alone who accepted its terms; do so on its page, and log in.")
    if isinstance(error, RepositoryNotFoundError):
        return UsageError(
            f"{name}: there is no such model on {constants.ENDPOINT}, or it is private; correct the name, or log in "
            "with `hf auth login`."
        )
    if isinstance(error, RevisionNotFoundError):
        return UsageError(f"{name}: the model has no such revision; name a branch, a tag or a commit.")
    if isinstance(error, HFValidationError):
        return UsageError(f"{name} is no name on a hub; write hf:user/model or hf:user/model@revision.")
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, HfHubHTTPError) and not isinstance(error, LocalEntryNotFoundError):
        return UsageError(f"{name}: {constants.ENDPOINT} refused ({reason}); log in as somebody who may.")
    return StorageError(
        f"{name} is not in the cache, and {constants.ENDPOINT} cannot be reached ({reason}); check the network."
    )
