from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from nanovl.data.download import DATASETS, choose_shards, download, download_all
from nanovl.data.sources import heldout_place
from nanovl.errors import ConfigError, DataError


def no_sleep(seconds: float) -> None:
    raise AssertionError(f"slept {seconds} s: a try failed")


def test_a_file_arrives_whole_and_under_its_name_only_then(server, tmp_path):
    assert download(f"{server.url}/a.parquet", tmp_path / "a.parquet", no_sleep) == len(server.body)
    assert (tmp_path / "a.parquet").read_bytes() == server.body
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]
    assert server.seen == [("/a.parquet", "")]


def test_a_cut_connection_is_resumed_where_it_broke(server, tmp_path):
    server.cut_after = 1000
    slept: list[float] = []
    download(f"{server.url}/a.parquet", tmp_path / "a.parquet", slept.append)
    assert (tmp_path / "a.parquet").read_bytes() == server.body
    assert server.seen == [("/a.parquet", ""), ("/a.parquet", "bytes=1000-")]
    assert slept == [2.0]


def test_a_draft_of_an_earlier_command_is_gone_on_with(server, tmp_path):
    (tmp_path / "a.parquet.tmp").write_bytes(server.body[:5000])
    download(f"{server.url}/a.parquet", tmp_path / "a.parquet", no_sleep)
    assert (tmp_path / "a.parquet").read_bytes() == server.body
    assert server.seen == [("/a.parquet", "bytes=5000-")]


def test_a_server_without_ranges_sends_it_all_again(server, tmp_path):
    server.ranges = False
    (tmp_path / "a.parquet.tmp").write_bytes(b"x" * 5000)
    download(f"{server.url}/a.parquet", tmp_path / "a.parquet", no_sleep)
    assert (tmp_path / "a.parquet").read_bytes() == server.body


def test_a_whole_draft_needs_no_more_bytes_and_a_too_long_one_is_thrown_away(server, tmp_path):
    (tmp_path / "a.parquet.tmp").write_bytes(server.body)
    download(f"{server.url}/a.parquet", tmp_path / "a.parquet", no_sleep)
    assert (tmp_path / "a.parquet").read_bytes() == server.body
    (tmp_path / "b.parquet.tmp").write_bytes(server.body + b"more")
    slept: list[float] = []
    download(f"{server.url}/b.parquet", tmp_path / "b.parquet", slept.append)
    assert (tmp_path / "b.parquet").read_bytes() == server.body
    assert slept == [2.0]


def test_errors_of_the_server_are_tried_five_times(server, tmp_path):
    server.errors = [500, 503, 429, 408]
    slept: list[float] = []
    download(f"{server.url}/a.parquet", tmp_path / "a.parquet", slept.append)
    assert slept == [2.0, 4.0, 8.0, 16.0]
    server.errors = [500] * 6
    with pytest.raises(DataError, match=r"b.parquet: HTTP Error 500: .* \(5 tries\); run the command again"):
        download(f"{server.url}/b.parquet", tmp_path / "b.parquet", slept.append)
    assert len(server.errors) == 1
    assert not (tmp_path / "b.parquet").exists()


def test_a_file_that_is_not_there_is_tried_once(server, tmp_path):
    server.errors = [404]
    with pytest.raises(
        DataError, match=r"/a.parquet: HTTP 404 Not Found; check the number of shards, or --base-url"
    ):
        download(f"{server.url}/a.parquet", tmp_path / "a.parquet", no_sleep)


def test_nobody_listens(tmp_path):
    with pytest.raises(DataError, match=r"refused.* \(5 tries\); run the command again to go on"):
        download("http://127.0.0.1:9/a.parquet", tmp_path / "a.parquet", lambda seconds: None)


def test_the_checksum_of_a_redirect_is_verified(server, tmp_path):
    server.sha256 = hashlib.sha256(server.body).hexdigest()
    (tmp_path / "a.parquet.tmp").write_bytes(server.body[:300])
    download(f"{server.url}/a.parquet", tmp_path / "a.parquet", no_sleep)
    assert server.seen == [("/a.parquet", "bytes=300-"), ("/cdn/a.parquet", "bytes=300-")]
    (tmp_path / "b.parquet.tmp").write_bytes(
        b"?" * 300
    )  # the beginning of another file: found out, fetched anew
    slept: list[float] = []
    download(f"{server.url}/b.parquet", tmp_path / "b.parquet", slept.append)
    assert slept == [2.0]
    assert (tmp_path / "b.parquet").read_bytes() == server.body
    server.sha256 = "0" * 64
    with pytest.raises(
        DataError, match=rf"sha256 {hashlib.sha256(server.body).hexdigest()[:12]}, 000000000000 expected"
    ):
        download(f"{server.url}/c.parquet", tmp_path / "c.parquet", slept.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "b.parquet"]


def test_a_page_instead_of_parquet_is_refused(server, tmp_path):
    server.body = b"<html>please log in</html>"
    with pytest.raises(DataError, match=r"not a parquet file \(5 tries\)"):
        download(f"{server.url}/a.parquet", tmp_path / "a.parquet", lambda seconds: None)


def test_download_all_fetches_what_is_missing(server, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "b.parquet").write_bytes(b"here")
    said: list[str] = []
    download_all(server.url + "/", ["a.parquet", "b.parquet", "c.parquet"], tmp_path / "out", said.append)
    assert sorted(path for path, _ in server.seen) == ["/a.parquet", "/c.parquet"]
    assert (tmp_path / "out" / "b.parquet").read_bytes() == b"here"
    assert said[0] == "1 of 3 files are there already"
    assert sorted(line.split()[0] for line in said[1:]) == ["a.parquet", "c.parquet"]


def test_download_all_ends_with_the_first_failure(server, tmp_path):
    server.errors = [404] * 20
    with pytest.raises(DataError, match=r"HTTP 404"):
        download_all(server.url, [f"{i}.parquet" for i in range(20)], tmp_path, lambda line: None, workers=1)
    assert len(server.seen) < 20


def test_the_first_heldout_shard_comes_along():
    climbmix = DATASETS["climbmix"]
    assert choose_shards(climbmix, 3, 0.0) == [f"shard_{i:05d}.parquet" for i in range(3)]
    # by hand: shard 39 is the first whose name's place is below 0.02
    assert heldout_place("shard_00039.parquet") < 0.02
    assert choose_shards(climbmix, 3, 0.02)[3:] == ["shard_00039.parquet"]
    assert len(choose_shards(climbmix, 50, 0.02)) == 50
    with pytest.raises(ConfigError, match=r"--shards = 6544: the data set has 6543; choose from 1 to that"):
        choose_shards(climbmix, 6544, 0.0)
    with pytest.raises(ConfigError, match=r"--shards = 0"):
        choose_shards(DATASETS["fineweb-edu"], 0, 0.0)


def test_names_of_the_shards():
    assert DATASETS["climbmix"].name(6542) == "shard_06542.parquet"
    assert Path(DATASETS["fineweb-edu"].url).name == "main"
