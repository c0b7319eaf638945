"""Signing an export's folder with a private key, and checking the signature with the public one."""

import re
from pathlib import Path
from typing import Any

from torchrelay.errors import RelayError, UsageError, explained
from torchrelay.report.export.folder import SIGNATURE
from torchrelay.report.export.formats import needed
from torchrelay.run import disk

_INSTALL = "pip install 'torchrelay[sign]'"
_HOW = "make one by: openssl ecparam -name prime256v1 -genkey -noout -out key.pem"


def signer(key: Path) -> Any:
    """Return model-signing's configuration that signs with a private key.

    Args:
        key: a PEM file of an elliptic curve key (P-256, P-384 or P-521) without a password.

    Raises:
        UsageError: it isn't one.
    """
    signing = needed("model_signing.signing", _INSTALL)
    try:
        return signing.Config().use_elliptic_key_signer(private_key=key).set_hashing_config(_hashing([]))
    except OSError as error:
        raise UsageError(f"--sign {key}: {error.strerror or error}; {_HOW}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"--sign {key} isn't a private key of an elliptic curve without a password; {_HOW}") from error


def sign(folder: Path, key: Path) -> None:
    """Sign all files of a folder; the signature stands among them.

    Raises:
        UsageError: the key can't be used.
    """
    folder = folder.resolve()  # model-signing reads relative paths as those in the folder
    staging = folder.with_name(f".{folder.name}.{SIGNATURE}")
    config = signer(key).set_hashing_config(_hashing([folder / SIGNATURE]))
    with explained(f"write {folder / SIGNATURE}", "make room or repair the disk, then sign again"):
        config.sign(folder, staging)
        disk.replace(folder / SIGNATURE, staging)


def check(folder: Path, key: Path) -> None:
    """Check a folder's signature.

    Args:
        folder: the export.
        key: the public key of whoever signed it.

    Raises:
        UsageError: there is no signature, or the key can't be used.
        RelayError: the signature is another's, or a file has changed, is missing or was added; the text names it.
    """
    if not (folder / SIGNATURE).is_file():
        raise UsageError(f"{folder} isn't signed: it has no {SIGNATURE}; leave out --key to check its files alone")
    verifying = needed("model_signing.verifying", _INSTALL)
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=key)
    except OSError as error:
        raise UsageError(f"--key {key}: {error.strerror or error}; give the signer's public key") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"--key {key} isn't a public key of an elliptic curve: give the signer's") from error
    # What the signature says is left out isn't believed: nothing may be, except the signature.
    place = folder.resolve()
    config.set_hashing_config(_hashing([place / SIGNATURE]))
    try:
        config.verify(place, place / SIGNATURE)
    except Exception as error:
        raise RelayError(f"{folder} isn't what was signed: {_reason(str(error), key)}") from error


def _hashing(left_out: list[Path]) -> Any:
    """Return how files are hashed: each one, Git's own and hidden ones too."""
    hashing = needed("model_signing.hashing", _INSTALL)
    return hashing.Config().use_file_serialization().set_ignored_paths(paths=left_out, ignore_git_paths=False)


def _reason(text: str, key: Path) -> str:
    """Return in short what model-signing found."""
    if not text.startswith("Signature mismatch"):
        return f"its signature isn't by the owner of {key}"
    changed = re.findall(r"Hash mismatch for '([^']*)'", text)
    parts = [f"{', '.join(changed)} has changed"] if changed else []
    for what, words in (("Missing files", "missing"), ("Extra files found", "added")):
        parts += [f"{names} is {words}" for names in re.findall(rf"{what} in model '[^']*': ([^'\"]*)", text)]
    return "; ".join(parts) or text
