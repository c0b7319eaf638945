"""Uploading an export to Hugging Face."""

from pathlib import Path

from torchrelay.errors import RelayError
from torchrelay.report.export.folder import check_sums
from torchrelay.report.export.formats import needed


def push(folder: Path, name: str) -> str:
    """Upload an export as a model, which is made, private, if it doesn't exist; return its address.

    Args:
        folder: the export, whose files are checked first.
        name: of the model, such as "ann/digits".

    Raises:
        UsageError: huggingface_hub isn't installed.
        RelayError: the upload failed.
    """
    hub = needed("huggingface_hub")
    check_sums(folder)
    api = hub.HfApi(library_name="torchrelay")
    try:
        address = api.create_repo(name, repo_type="model", private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"Export {folder.name} by torchrelay")
    except Exception as error:
        cause = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RelayError(
            f"{folder} can't be uploaded to {name} ({cause[:300]}): check the name, the network and 'hf auth login'"
        ) from error
    return str(address)
