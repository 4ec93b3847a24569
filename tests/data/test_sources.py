from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from nanovl.config.schema import Source
from nanovl.data.sources import changed_files, heldout_place, open_source
from nanovl.errors import ConfigError, DataError

KEY = "data.sources.0"


def names(source: Source, split: str) -> list[str]:
    return [file.name for file in open_source(source, KEY, split).files]  # type: ignore[arg-type]


def test_files_are_held_out_by_the_hash_of_their_name_alone(tmp_path, write_texts):
    source = write_texts(["x"] * 100, holdout=0.25)
    by_hand = [
        f"{i:03d}.txt"
        for i in range(100)
        if int.from_bytes(hashlib.sha256(f"{i:03d}.txt".encode()).digest()[:8], "big") / 2**64 < 0.25
    ]
    assert names(source, "heldout") == by_hand
    assert 10 < len(by_hand) < 40
    assert sorted(names(source, "train") + by_hand) == names(source, "all")
    for i in range(0, 100, 2):
        (tmp_path / "texts" / f"{i:03d}.txt").unlink()
    assert names(source, "heldout") == [name for name in by_hand if int(name[:3]) % 2]


@pytest.mark.parametrize("split", ["heldout", "train"])
def test_an_empty_split_says_which_holdout_fills_it(write_texts, split):
    source = write_texts(["x"] * 3, holdout=0.0001 if split == "heldout" else 0.9999)
    with pytest.raises(
        DataError, match=r"none of its 3 files is left for .*; set it to (\d\.\d+), which"
    ) as error:
        open_source(source, KEY, split)
    suggested = float(str(error.value).split("set it to ")[1].split(",")[0])
    source.holdout = suggested
    assert len(names(source, split)) == 1


def test_stdlib_is_pythons_own_library():
    source = open_source(Source(kind="stdlib"), KEY, "all")
    found = {file.name: i for i, file in enumerate(source.files)}
    assert {"argparse.py", "json/decoder.py", "pydoc_data/topics.py"} <= set(found)
    assert not any("site-packages" in name or "__pycache__" in name for name in found)
    assert all(file.size for file in source.files)
    assert source.num_units == len(source.files) > 500
    (argparse,) = source.documents(found["argparse.py"])
    assert "class ArgumentParser" in argparse
    topics = list(source.documents(found["pydoc_data/topics.py"]))
    assert len(topics) > 50
    assert not any("topics = {" in topic for topic in topics)


def test_stdlib_takes_no_path():
    with pytest.raises(
        ConfigError, match=r"data.sources.0.path = 'x': kind \"stdlib\" reads .*; leave path out"
    ):
        open_source(Source(kind="stdlib", path="x"), KEY, "all")


def test_a_python_without_its_sources(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(
        DataError, match=r"this Python comes without its library's sources; name text of your own"
    ):
        open_source(Source(kind="stdlib"), KEY, "all")


def test_a_path_that_is_not_there_or_has_no_file_of_the_kind(tmp_path):
    with pytest.raises(
        DataError, match=r"data.sources.0.path = 'nowhere': no such file or folder \(looked in /"
    ):
        open_source(Source(kind="text", path="nowhere"), KEY, "all")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(DataError, match=r"no \*.jsonl or \*.jsonl.gz below this folder; set path or kind"):
        open_source(Source(kind="jsonl", path=str(tmp_path)), KEY, "all")
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"a.jsonl: No such file or directory; mend or remove it"):
        open_source(Source(kind="jsonl", path=str(tmp_path)), KEY, "all")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda path: path.unlink(),
            "No such file or directory; it could be read when the run started: put it back",
        ),
        (
            lambda path: path.write_text("longer"),
            "6 bytes, but 1 when the run started; put the file back as it was",
        ),
    ],
)
def test_a_file_that_vanishes_or_changes_during_a_run(tmp_path, write_texts, change, message):
    source = open_source(write_texts(["a", "b"]), KEY, "all")
    change(tmp_path / "texts" / "001.txt")
    assert list(source.documents(0)) == ["a"]
    with pytest.raises(DataError, match=rf"001.txt: {message}"):
        list(source.documents(1))


@pytest.mark.skipif(sys.platform == "win32", reason="no file modes")
def test_a_file_that_cannot_be_read(tmp_path, write_texts, monkeypatch):
    source = open_source(write_texts(["a"]), KEY, "all")

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read everything, so a mode would prove nothing
    with pytest.raises(DataError, match=r"000.txt: Permission denied"):
        list(source.documents(0))


def test_changed_files_names_the_first_difference():
    assert changed_files({"a": 1, "b": 2}, {"a": 1, "b": 2}) == ""
    assert changed_files({"a": 1, "b": 2}, {"a": 1}) == "b is gone"
    assert changed_files({"a": 1}, {"a": 1, "b": 2}) == "b is new"
    assert changed_files({"a": 1}, {"a": 1000}) == "a had 1 bytes and now has 1,000"


def test_the_record_of_a_source_knows_no_folder(tmp_path, write_texts):
    first = open_source(write_texts(["a", "b"]), KEY, "all").record()
    second = open_source(write_texts(["a", "c"], folder="moved"), KEY, "all").record()
    assert first == second
    assert str(tmp_path) not in str(first)
    third = open_source(write_texts(["a", "cc"], folder="changed"), KEY, "all").record()
    assert third["fingerprint"] != first["fingerprint"]


def test_heldout_place_is_uniform():
    places = [heldout_place(f"shard_{i:05d}.parquet") for i in range(2000)]
    assert all(0 <= place < 1 for place in places)
    assert abs(sum(places) / len(places) - 0.5) < 0.02
