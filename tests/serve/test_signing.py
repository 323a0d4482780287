"""Signatures by the real library: whatever is changed in a bundle after it was signed is found."""

import importlib.util
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from click.testing import CliRunner

from quantkit import artifacts
from quantkit.cli import main
from quantkit.errors import QuantkitError
from quantkit.serve import bundle as bundles
from quantkit.serve import check, signing
from quantkit.serve.settings import ServeSettings

SETTINGS = ServeSettings(served_model_name="tiny", max_model_len=1024, max_num_seqs=4, max_num_batched_tokens=1024)

installed = pytest.mark.skipif(importlib.util.find_spec("model_signing") is None, reason="needs quantkit[sign]")


class Pair(NamedTuple):
    """A key's two halves, as files."""

    private: Path
    public: Path


def make_pair(folder: Path, name: str, curve: str = "prime256v1") -> Pair:
    pair = Pair(folder / f"{name}.pem", folder / f"{name}.pub")
    subprocess.run(["openssl", "ecparam", "-name", curve, "-genkey", "-noout", "-out", pair.private], check=True)
    subprocess.run(
        ["openssl", "ec", "-in", pair.private, "-pubout", "-out", pair.public], check=True, capture_output=True
    )
    return pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("keys"), "key")


@pytest.fixture
def made(tiny_llama: Path, tmp_path: Path) -> Path:
    """An unsigned bundle of its own files, so that spoiling them spoils no other."""
    target = shutil.copytree(tiny_llama, tmp_path / "target")
    with artifacts.making(tmp_path / "bundle", "bundle", inputs={}, settings={}) as work:
        bundles.build(work, target=Path(target), draft=None, report=None, settings=SETTINGS, sources={})
    return tmp_path / "bundle"


def said(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


@installed
def test_signed_moved_and_verified(made: Path, pair: Pair, tmp_path: Path) -> None:
    assert said("serve", "verify", made, "--public-key", pair.public)[0] == 2
    assert signing.checks(made, None)[0].detail.startswith("none")
    assert said("serve", "sign", made, "--private-key", pair.private)[0] == 0
    moved = made.rename(tmp_path / "elsewhere")
    code, words = said("serve", "verify", moved, "--public-key", pair.public)
    number = sum(path.is_file() for path in moved.rglob("*")) - 1
    assert code == 0 and words.startswith(f"{number} files")
    found = {one.name: one for one in check.check(moved, ask_vllm=False, public_key=pair.public)}
    assert all(one.passed for one in found.values()) and "over" in found["signature"].detail
    assert "not verified" in signing.checks(moved, None)[0].detail
    assert said("serve", "sign", moved, "--private-key", pair.private)[0] == 0  # again, over the same files
    assert signing.verify(moved, pair.public) == number


@installed
def test_one_flipped_bit_in_any_file_is_found(made: Path, pair: Pair) -> None:
    signing.sign(made, pair.private)
    files = [path for path in sorted(made.rglob("*")) if path.is_file()]
    assert len(files) > 10
    for path in files:
        before = path.read_bytes()
        middle = len(before) // 2
        path.write_bytes(before[:middle] + bytes([before[middle] ^ 1]) + before[middle + 1 :])
        with pytest.raises(QuantkitError, match=r"is not what .*key\.pub signed"):
            signing.verify(made, pair.public)
        path.write_bytes(before)
    signing.verify(made, pair.public)


@installed
@pytest.mark.parametrize("name", ["extra.json", ".gitattributes", ".github/run", "target/.hidden", "provenance/b.sig"])
def test_an_added_file_is_found(made: Path, pair: Pair, name: str) -> None:
    signing.sign(made, pair.private)
    (made / name).parent.mkdir(exist_ok=True)
    (made / name).write_text("")
    with pytest.raises(QuantkitError, match=name):
        signing.verify(made, pair.public)


@installed
def test_a_removed_file_and_a_link_are_found(made: Path, pair: Pair) -> None:
    signing.sign(made, pair.private)
    readme = (made / "README.md").rename(made.parent / "README.md")
    with pytest.raises(QuantkitError, match=r"Missing files .*README\.md"):
        signing.verify(made, pair.public)
    (made / "README.md").symlink_to(readme)
    with pytest.raises(QuantkitError, match=r"README\.md"):
        signing.verify(made, pair.public)


@installed
def test_a_signature_that_leaves_a_file_out_is_refused(made: Path, pair: Pair) -> None:
    from model_signing import hashing
    from model_signing import signing as library

    config = hashing.Config().set_ignored_paths(paths=[signing.SIGNATURE, "target"], ignore_git_paths=False)
    signer = library.Config().use_elliptic_key_signer(private_key=pair.private)
    signer.set_hashing_config(config).sign(made, made / signing.SIGNATURE)
    with pytest.raises(QuantkitError, match="target was left out when it was signed"):
        signing.verify(made, pair.public)


@installed
def test_other_keys_are_refused_in_a_line(made: Path, pair: Pair, tmp_path: Path) -> None:
    signing.sign(made, pair.private)
    with pytest.raises(QuantkitError, match=r"other\.pub signed: Key mismatch"):
        signing.verify(made, make_pair(tmp_path, "other").public)
    unfit = make_pair(tmp_path, "unfit", "secp256k1")
    for key in (unfit.private, pair.public, made / "README.md", tmp_path / "nowhere.pem"):
        code, words = said("serve", "sign", made, "--private-key", key)
        assert code == 2 and key.name in words and "Traceback" not in words
    signing.verify(made, pair.public)  # what is there is left


@installed
def test_an_encrypted_key_takes_its_password_from_the_environment(
    made: Path, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = tmp_path / "locked.pem"
    command = ["openssl", "ec", "-in", pair.private, "-aes256", "-passout", "pass:harbour", "-out", locked]
    subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(QuantkitError, match=r"locked\.pem"):
        signing.sign(made, locked)
    monkeypatch.setenv("QUANTKIT_KEY_PASSWORD", "harbour")
    signing.sign(made, locked)
    signing.verify(made, pair.public)


def test_without_the_library_the_remedy_is_said(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "model_signing" else found(name, *rest)
    )
    key = tmp_path / "key.pem"
    key.touch()
    for command, option in (("sign", "--private-key"), ("verify", "--public-key")):
        code, words = said("serve", command, made, option, key)
        assert code == 2 and "install quantkit[sign]" in words
    assert all(one.passed for one in check.check(made, ask_vllm=False))
    assert not signing.checks(made, key)[0].passed
