"""A signature over every file of a bundle, by a key of one's own and offline, as `model_signing` makes and checks it.

The signature is a Sigstore bundle in the bundle itself: an in-toto statement with the SHA-256 of each file, under an
ECDSA key on one of the curves P-256, P-384 and P-521. `model_signing verify key` checks it without quantkit.
"""

import base64
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantkit import artifacts
from quantkit.errors import QuantkitError
from quantkit.serve import bundle as bundles
from quantkit.serve.verdict import Check

SIGNATURE = "provenance/model.sig"
_PASSWORD = "QUANTKIT_KEY_PASSWORD"
_NEW_KEY = "openssl ecparam -name prime256v1 -genkey -noout -out key.pem && openssl ec -in key.pem -pubout -out key.pub"


def sign(bundle: Path, private_key: Path) -> Path:
    """Sign a bundle, in place of any signature it has; returns the signature's file.

    A key that is encrypted is opened with the password in the environment variable QUANTKIT_KEY_PASSWORD.

    Raises:
        QuantkitError: no bundle, no key that can sign, a link in the bundle, or model-signing is not installed.
    """
    _require(private_key)
    bundles.read_bundle(bundle)
    from model_signing import signing

    password = os.environ.get(_PASSWORD)
    signature = bundle / SIGNATURE
    with (
        _said(f"{bundle} was not signed with {private_key} (to make a key: {_NEW_KEY})"),
        tempfile.TemporaryDirectory() as folder,
    ):
        key: Any = password.encode() if password else None  # said to be a str, handed on to what wants bytes
        config = signing.Config().use_elliptic_key_signer(private_key=private_key, password=key)
        made = Path(folder) / "signature"
        config.set_hashing_config(_every_file()).sign(bundle, made)
        signature.parent.mkdir(exist_ok=True)
        artifacts.write_text(signature, made.read_text(encoding="utf-8"))
    return signature


def verify(bundle: Path, public_key: Path) -> int:
    """Check that this key signed every file of the bundle, and that each is as it was; returns the number of files.

    Raises:
        QuantkitError: naming the files that were changed, added or removed; no signature, or one by another key; or
            model-signing is not installed.
    """
    _require(public_key)
    from model_signing import verifying

    signature = bundle / SIGNATURE
    if not signature.is_file():
        raise QuantkitError(f"{bundle} is not signed: quantkit serve sign {bundle} --private-key KEY")
    with _said(f"{bundle} is not what {public_key} signed"):
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
        config.set_hashing_config(_every_file()).verify(bundle, signature)
        # The library leaves out whatever the signed statement says was left out when it was made.
        envelope = json.loads(signature.read_bytes())["dsseEnvelope"]
        predicate = json.loads(base64.b64decode(envelope["payload"]))["predicate"]
        left_out = set(predicate["serialization"]["ignore_paths"]) - {SIGNATURE}
        if left_out:
            raise ValueError(f"{', '.join(sorted(left_out))} was left out when it was signed")
    return len(predicate["resources"])


def checks(bundle: Path, public_key: Path | None) -> list[Check]:
    """Whether there is a signature and, given the key, whether it holds."""
    name = "signature"
    if public_key is None:
        there = (bundle / SIGNATURE).is_file()
        told = "there is one, not verified: give --public-key" if there else "none: quantkit serve sign makes one"
        return [Check(name=name, passed=True, detail=told)]
    try:
        number = verify(bundle, public_key)
    except QuantkitError as error:
        return [Check(name=name, passed=False, detail=str(error))]
    return [Check(name=name, passed=True, detail=f"of {public_key}, over {number} files")]


def _require(key: Path) -> None:
    if not key.is_file():
        raise QuantkitError(f"key {key} is not a file: give one, or make a pair: {_NEW_KEY}")
    if importlib.util.find_spec("model_signing") is None:
        raise QuantkitError(
            "signatures need model-signing, which is not here: install quantkit[sign], or "
            "requirements/sign.txt beside the other pins"
        )


def _every_file() -> Any:
    """How files are hashed: all of them, git's own too, which the library would leave out; links are refused."""
    from model_signing import hashing

    config = hashing.Config().use_file_serialization()
    return config.set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)


@contextmanager
def _said(what: str) -> Iterator[None]:
    """What the library and the key's format raise, as a line."""
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

    try:
        yield
    except InvalidSignature:
        raise QuantkitError(f"{what}: the signature is of another key, or was changed") from None
    except (ValueError, TypeError, AttributeError, KeyError, UnsupportedAlgorithm) as error:
        raise QuantkitError(f"{what}: {' '.join(str(error).split())}") from error
