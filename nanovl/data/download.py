"""Shards of public data sets over HTTP: resumed where they broke off, checked, and complete or not there."""

from __future__ import annotations

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any

from nanovl.data.sources import heldout_place
from nanovl.errors import ConfigError, DataError

TRIES = 5
TIMEOUT_SECONDS = 60
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Dataset:
    """A data set in shards `shard_00000.parquet` and so on."""

    url: str
    """Folder of the shards."""
    shards: int

    def name(self, number: int) -> str:
        return f"shard_{number:05d}.parquet"


DATASETS = {
    "climbmix": Dataset("https://huggingface.co/datasets/karpathy/climbmix-400b-shuffle/resolve/main", 6543),
    "fineweb-edu": Dataset(
        "https://huggingface.co/datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main", 1823
    ),
}


def choose_shards(dataset: Dataset, number: int, holdout: float) -> list[str]:
    """The first `number` shards, and the first that a source's `holdout` keeps for validation (0 = none).

    Raises ConfigError for more shards than there are.
    """
    if not 0 < number <= dataset.shards:
        raise ConfigError(f"--shards = {number}: the data set has {dataset.shards}; choose from 1 to that")
    chosen = [dataset.name(i) for i in range(number)]
    held_out = (dataset.name(i) for i in range(dataset.shards) if heldout_place(dataset.name(i)) < holdout)
    first = next(held_out, None)
    return chosen if first is None or first in chosen else [*chosen, first]


def download_all(
    base_url: str, names: list[str], folder: Path, say: Callable[[str], None], workers: int = 4
) -> None:
    """Fetch every file that `folder` lacks, `workers` at a time. Raises DataError for one that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if not (folder / name).exists()]
    if len(missing) < len(names):
        say(f"{len(names) - len(missing)} of {len(names)} files are there already")

    def fetch(name: str) -> None:
        began = time.perf_counter()
        size = download(f"{base_url.rstrip('/')}/{name}", folder / name)
        seconds = time.perf_counter() - began
        say(f"{name}  {size / 1e6:,.1f} MB  {seconds:.0f} s  {size / 1e6 / max(seconds, 1e-3):,.1f} MB/s")

    with ThreadPoolExecutor(workers) as pool:
        tasks = [pool.submit(fetch, name) for name in missing]
        try:
            for task in tasks:
                task.result()
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure the rest need not be tried


def download(url: str, file: Path, sleep: Callable[[float], None] = time.sleep) -> int:
    """Fetch `url` into `file` by way of `file`.tmp, which is gone on from where it stands; returns the bytes.

    The length is checked, the sha256 where the server names one (Hugging Face does), and the magic number of
    parquet. Raises DataError where the server refuses, or after TRIES tries.
    """
    draft = file.with_name(file.name + ".tmp")
    for attempt in range(1, TRIES + 1):
        try:
            _fetch_rest(url, draft)
            break
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                raise DataError(
                    f"{url}: HTTP {error.code} {error.reason}; check the number of shards, or --base-url"
                ) from None
            failure: Exception = error
        except (OSError, http.client.HTTPException) as error:  # URLError, a reset connection, a time-out
            failure = error
        if attempt == TRIES:
            raise DataError(
                f"{url}: {failure} ({TRIES} tries); run the command again to go on from {draft.name}"
            ) from None
        sleep(2.0**attempt)
    os.replace(draft, file)
    return file.stat().st_size


def _fetch_rest(url: str, draft: Path) -> None:
    """One try: append to `draft` what it lacks. Raises OSError for what another try may mend."""
    have = draft.stat().st_size if draft.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "nanovl"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    redirects = _Redirects()
    try:
        response = urllib.request.build_opener(redirects).open(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # the range begins at the end: the draft is whole, or not a part of this file
            raise
        total = _total(error.headers, 0)
        if total != have:
            draft.unlink()
            raise OSError(
                f"{draft.name} had {have:,} bytes, the file has {total or 'an unknown number'}"
            ) from None
        _check(draft, total, redirects.sha256)
        return
    with response:
        if response.status != 206:
            have = 0  # a server without ranges sends the file from its beginning
        total = _total(response.headers, have)
        with draft.open("r+b" if have else "wb") as file:
            file.seek(have)
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
    _check(draft, total, redirects.sha256)


def _check(draft: Path, total: int | None, sha256: str) -> None:
    """Raise OSError where `draft` is not the whole file; what cannot become it is removed."""
    size = draft.stat().st_size
    if total is not None and size < total:
        raise OSError(f"the connection ended after {size:,} of {total:,} bytes")
    wrong = ""
    if total is not None and size > total:
        wrong = f"{size:,} bytes, {total:,} expected"
    elif sha256 and (found := _sha256(draft)) != sha256:
        wrong = f"sha256 {found[:12]}, {sha256[:12]} expected"
    elif draft.name.endswith(".parquet.tmp") and not _is_parquet(draft):
        wrong = "not a parquet file"
    if wrong:
        draft.unlink()
        raise OSError(wrong)


def _total(headers: Message, have: int) -> int | None:
    """Bytes of the whole file, where the server says."""
    total = (headers.get("Content-Range") or "").rpartition("/")[2]
    if total.isdigit():
        return int(total)
    length = headers.get("Content-Length") or ""
    return have + int(length) if length.isdigit() else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(4)
        file.seek(-min(4, path.stat().st_size), os.SEEK_END)
        return head == file.read(4) == b"PAR1"


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, and keeps the checksum that Hugging Face sends with the first."""

    sha256 = ""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        tag = (headers.get("X-Linked-Etag") or "").strip('"')
        if len(tag) == 64:
            self.sha256 = tag
        return super().redirect_request(req, fp, code, msg, headers, newurl)
