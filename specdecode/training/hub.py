"""A model folder in, a repository on the Hugging Face Hub out."""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

from specdecode.errors import ConfigError, HubError

_NEEDED = ("config.json", "*.safetensors", "tokenizer_config.json", "README.md")


def push(
    folder: str | Path, name: str, *, is_private: bool = False, revision: str | None = None, message: str | None = None
) -> str:
    """Uploads a model's folder in one commit, to a repository that is made if there is none; returns the commit's address.

    Args:
        folder: such as OUTPUT_DIR/best of a training.
        name: of the repository, such as me/draft-code.
        is_private: whether a new repository is seen by its owner alone.
        revision: the branch, which must be there; the main one if None.
        message: of the commit.

    Raises:
        ConfigError: the folder holds no whole model, the name is none, or there is no token.
        HubError: the Hub is not reached, or refuses.
    """
    folder = Path(folder)
    missing = [pattern for pattern in _NEEDED if not any(folder.glob(pattern))]
    if missing:
        raise ConfigError(f"{folder}: expected a model's folder with {', '.join(_NEEDED)}; there is no {missing[0]}")
    if get_token() is None:
        raise ConfigError("there is no token for the Hub: expected one in HF_TOKEN, or from `hf auth login`")
    api = HfApi(library_name="specdecode")
    try:
        api.create_repo(name, private=is_private or None, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name, folder_path=folder, revision=revision, commit_message=message or f"Upload {folder.absolute().name}"
        )
    except HFValidationError as error:
        raise ConfigError(f"{name}: expected a repository's name, such as me/draft-code: {error}") from error
    except (HTTPError, OfflineModeIsEnabled, OSError) as error:
        raise HubError(f"{name}: the Hub does not take it: {' '.join(str(error).split())}") from error
    return str(commit.commit_url)
