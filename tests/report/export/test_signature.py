"""Signatures with real keys: the owner's is accepted, and whatever was changed afterwards is named."""

import shutil
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from torchrelay.errors import RelayError, UsageError
from torchrelay.report.export.folder import SIGNATURE
from torchrelay.report.export.signature import check, sign, signer


def write_keys(folder: Path, name: str, private=None) -> tuple[Path, Path]:
    private = private or ec.generate_private_key(ec.SECP256R1())
    secret, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    form, nothing = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    secret.write_bytes(private.private_bytes(serialization.Encoding.PEM, form, nothing))
    subject = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(private.public_key().public_bytes(serialization.Encoding.PEM, subject))
    return secret, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> tuple[Path, Path]:
    return write_keys(tmp_path_factory.mktemp("keys"), "ann")


@pytest.fixture
def signed(tmp_path, keys) -> Path:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"weights")
    (folder / "README.md").write_text("card")
    sign(folder, keys[0])
    return folder


def test_a_signed_folder_is_accepted_wherever_it_is_copied_to(signed, keys, tmp_path, monkeypatch):
    assert {path.name for path in signed.iterdir()} == {"model.onnx", "README.md", SIGNATURE}
    check(signed, keys[1])
    monkeypatch.chdir(tmp_path)
    sign(Path("export"), keys[0])  # again
    check(Path("export"), keys[1])
    check(Path(shutil.copytree(signed, tmp_path / "elsewhere")), keys[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "export"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda folder: (folder / "model.onnx").write_bytes(b"Weights"), "model.onnx has changed"),
        (lambda folder: (folder / "README.md").unlink(), "README.md is missing"),
        (lambda folder: (folder / "evil.py").write_text(""), "evil.py is added"),
        (lambda folder: (folder / ".gitattributes").write_text(""), r"\.gitattributes is added"),
    ],
)
def test_what_was_changed_is_named(signed, keys, change, named):
    change(signed)
    with pytest.raises(RelayError, match=f"isn't what was signed: {named}"):
        check(signed, keys[1])


def test_another_owner_and_a_damaged_signature_are_refused(signed, keys, tmp_path):
    _, other = write_keys(tmp_path, "eve")
    with pytest.raises(RelayError, match=r"its signature isn't by the owner of .*eve\.pub\.pem"):
        check(signed, other)
    (signed / SIGNATURE).write_text("{}")
    with pytest.raises(RelayError, match="isn't what was signed"):
        check(signed, keys[1])
    (signed / SIGNATURE).unlink()
    with pytest.raises(UsageError, match="isn't signed"):
        check(signed, keys[1])


def test_keys_that_cant_be_used_are_named(signed, keys, tmp_path):
    (tmp_path / "no.pem").write_text("words")
    ed, ed_public = write_keys(tmp_path, "ed", ed25519.Ed25519PrivateKey.generate())
    for key in (tmp_path / "none.pem", tmp_path / "no.pem", ed, keys[1], tmp_path):
        with pytest.raises(UsageError, match=f"--sign {key}.*; make one by: openssl"):
            signer(key)
    for key in (tmp_path / "none.pem", tmp_path / "no.pem", ed_public, keys[0], tmp_path):
        with pytest.raises(UsageError, match=f"--key {key}.* give the signer's"):
            check(signed, key)


def test_without_the_extra_a_line_says_how_to_install_it(keys, monkeypatch):
    monkeypatch.setitem(sys.modules, "model_signing.signing", None)
    with pytest.raises(UsageError, match=r"install it by pip install 'torchrelay\[sign\]'"):
        signer(keys[0])
