"""Files arrive whole or not at all, and go on where they stopped; against a server on the loopback."""

import errno
import hashlib
import io
import json
import logging
import shutil
import urllib.request

import numpy as np
import pytest

from diffjax import download
from diffjax.download import Expected, copy, verified
from diffjax.errors import UserError
from tests.download_server import serving

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
WHOLE = Expected(len(CONTENT), SHA256)


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0.0)
    monkeypatch.setattr(download, "SILENCE", 5.0)
    with serving() as site:
        site.files["/a.bin"] = CONTENT
        yield site


@pytest.fixture
def fetch(site, tmp_path):
    def run(expected=WHOLE, path="/a.bin"):
        return download.download(site.address + path, tmp_path / "a.bin", expected)

    return run


@pytest.fixture
def said(caplog, monkeypatch):
    """What the module logs; the program's own handler may stand there."""
    monkeypatch.setattr(download.logger, "handlers", [caplog.handler])
    monkeypatch.setattr(download.logger, "propagate", False)
    caplog.set_level(logging.INFO, logger=download.logger.name)
    return caplog


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_with_its_record(site, fetch, tmp_path):
    record = fetch()
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert names(tmp_path) == ["a.bin", "a.bin.fetched.json"]
    assert json.loads((tmp_path / "a.bin.fetched.json").read_text()) == record._asdict()
    assert record[:3] == (f"{site.address}/a.bin", len(CONTENT), SHA256)
    assert verified(tmp_path / "a.bin", WHOLE) == record


def test_a_lost_connection_is_tried_again_from_where_it_was(site, fetch, tmp_path, said):
    site.cut = [1000, 50_000]
    fetch()
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert [(asked, sent) for _, asked, sent in site.asked] == [
        ("", 1000),
        ("bytes=1000-", 50_000),
        ("bytes=51000-", 249_000),
    ]
    assert "the connection was lost after 1,000 of 300,000 bytes; trying again in 0 s" in said.text


def test_a_connection_that_brings_something_is_no_failure(site, fetch, tmp_path):
    """Twenty that do, and then six that do not."""
    site.cut = [1000] * 20 + [0] * download.TRIES
    with pytest.raises(UserError, match="after 20,000 of 300,000 bytes, 6 times in a row"):
        fetch()
    assert len(site.asked) == 20 + download.TRIES - 1  # the last that brought something was the first of them
    fetch()
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_server_that_never_ends_a_file(site, fetch, tmp_path):
    site.ranges, site.cut = False, [1000] * 100
    with pytest.raises(UserError, match="6 times in a row"):
        fetch()
    assert len(site.asked) == download.TRIES


@pytest.mark.parametrize("etag, modified", [('"1"', ""), ("", "Mon, 30 Nov 2026 10:00:00 GMT"), ('W/"1"', "Mon, 30")])
def test_the_same_request_goes_on_later(site, fetch, tmp_path, monkeypatch, etag, modified):
    site.etag, site.modified = etag, modified
    monkeypatch.setattr(download, "TRIES", 1)
    site.cut = [1000]
    with pytest.raises(
        UserError, match="1,000 of 300,000 bytes, 1 times in a row; what has arrived is kept, the same command"
    ):
        fetch()
    assert names(tmp_path) == ["a.bin.part", "a.bin.part.json"]
    fetch()
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert site.asked[1][1:] == ("bytes=1000-", 299_000)
    assert names(tmp_path) == ["a.bin", "a.bin.fetched.json"]


@pytest.mark.parametrize(
    "change, connections, words",
    [
        ({"etag": '"2"'}, 1, "the server's file is another one now; starting again after 1,000 bytes"),
        ({"etag": '"2"', "honest": False}, 2, "the server's file is another one now; trying again"),
        (
            {"etag": '"2"', "files": {"/a.bin": CONTENT[:900]}, "honest": False},
            2,
            "the server's file is a shorter one now; trying again",
        ),
        ({"ranges": False}, 1, "what arrived earlier cannot be continued; starting again after 1,000 bytes"),
    ],
    ids=["changed", "changed, the server does not know If-Range", "shorter now", "no ranges"],
)
def test_what_cannot_be_continued_starts_again(site, fetch, tmp_path, monkeypatch, said, change, connections, words):
    site.cut, tries = [1000], download.TRIES
    monkeypatch.setattr(download, "TRIES", 1)
    with pytest.raises(UserError, match="the same command continues"):
        fetch()
    monkeypatch.setattr(download, "TRIES", tries)
    site.files = {"/a.bin": CONTENT[::-1]} if "etag" in change else site.files
    for name, value in change.items():
        setattr(site, name, value)
    fetch(Expected())
    assert (tmp_path / "a.bin").read_bytes() == site.files["/a.bin"]
    assert site.asked[-1][2] == len(site.files["/a.bin"])
    assert len(site.asked) == 1 + connections
    assert words in said.text
    assert names(tmp_path) == ["a.bin", "a.bin.fetched.json"]


def test_versions_that_are_not_told_start_again(site, fetch, tmp_path, said):
    site.etag, site.cut = "", [1000]
    fetch()
    assert [asked for _, asked, _ in site.asked] == ["", ""]
    assert "what arrived earlier cannot be continued; starting again after 1,000 bytes" in said.text
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_program_stopped_between_the_last_byte_and_the_name(site, fetch, tmp_path):
    state = {"address": f"{site.address}/a.bin", "version": '"1"', "size": len(CONTENT)}
    (tmp_path / "a.bin.part").write_bytes(CONTENT)
    (tmp_path / "a.bin.part.json").write_text(json.dumps(state))
    fetch()
    assert site.asked == []
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_wrong_hash_leaves_nothing(site, fetch, tmp_path):
    with pytest.raises(UserError, match=f"/a.bin has sha256 {SHA256}, expected {'0' * 64}"):
        fetch(Expected(0, "0" * 64))
    assert names(tmp_path) == []


def test_a_wrong_size_costs_no_transfer(site, fetch, tmp_path):
    with pytest.raises(UserError, match="/a.bin has 300,000 bytes, expected 7"):
        fetch(Expected(7))
    assert names(tmp_path) == []


def test_redirections_are_followed(site, fetch, tmp_path):
    site.redirects = {"/old": "/older", "/older": f"{site.address}/a.bin"}
    assert fetch(path="/old").source == f"{site.address}/old"
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_encryption_is_not_given_up():
    request = urllib.request.Request("https://a/file")
    with pytest.raises(UserError, match="https://a/file leads to http://b/file, which is not followed: it is not enc"):
        download._Redirects().redirect_request(request, io.BytesIO(), 302, "Found", {}, "http://b/file")
    follows = download._Redirects().redirect_request(
        urllib.request.Request("http://a/file"), None, 302, "Found", {}, "https://b/file"
    )
    assert follows.full_url == "https://b/file"


@pytest.mark.parametrize(
    "site_is, words",
    [
        ({"answers": [404]}, "no such file at the server (404); give another address or a file by --from"),
        ({"answers": [401]}, "the server refuses access or wants a login (401); get it in a browser"),
        ({"answers": [403]}, "the server refuses access or wants a login (403); get it in a browser"),
        ({"answers": [418]}, "the server answered 418"),
        (
            {"answers": [503] * 6},
            "the server answered 503 (Service Unavailable), 6 times in a row; what has arrived is kept",
        ),
        ({"kind": "text/html; charset=utf-8"}, "is a web page, not a file; open it in a browser"),
        ({"files": {"/a.bin": b"<!DOCTYPE html><p>log in"}}, "is a web page, not a file; open it in a browser"),
        ({"redirects": {"/a.bin": "/a.bin"}}, "the server answered 302"),
        ({"redirects": {"/a.bin": "file:///etc/passwd"}}, "to file:///etc/passwd; only http and https are followed"),
        ({"redirects": {"/a.bin": "ftp://127.0.0.1:1/a"}}, "to ftp://127.0.0.1:1/a; only http and https are followed"),
        ({"redirects": {"/a.bin": "data:,a"}}, "leads to data:,a; only http and https are followed"),
        ({"coding": "gzip"}, "the server sends the file in the encoding gzip; give it by --from=FILE"),
    ],
)
def test_refusals_are_words(site, fetch, tmp_path, site_is, words):
    for name, value in site_is.items():
        setattr(site, name, value)
    with pytest.raises(UserError) as error:
        fetch(Expected())
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert names(tmp_path) == []


def test_no_encoding_is_an_encoding(site, fetch, tmp_path):
    site.coding = "identity"
    fetch()
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_busy_server_is_asked_again(site, fetch, tmp_path):
    site.answers = [503, 429]
    fetch()
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_silence_counts_as_lost(site, fetch, tmp_path, monkeypatch, said):
    monkeypatch.setattr(download, "SILENCE", 0.2)
    site.amid = site.closing.wait
    fetch()
    assert "the connection was lost (timed out); trying again" in said.text
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_length_that_is_not_told(site, fetch, tmp_path):
    """Nothing but a known sha256 can tell then whether all has arrived."""
    site.length = False
    with pytest.raises(UserError, match="the server does not say how long the file is, and no sha256 is known"):
        fetch(Expected())
    fetch()
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_no_connection(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0.0)
    with serving() as site:
        address = site.address
    with pytest.raises(UserError, match=r"no connection to 127.0.0.1:\d+ \(.*refused\), 6 times in a row"):
        download.download(f"{address}/a", tmp_path / "a", Expected())


@pytest.mark.parametrize("address", ["ftp://a/b", "https:///b", "file:///etc/passwd", "http://a b/c"])
def test_addresses(address, tmp_path):
    with pytest.raises(UserError, match="valid"):
        download.download(address, tmp_path / "a", Expected())


def test_no_space(site, fetch, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="has 1,000 bytes free, and 300,000 are to come; choose another place"):
        fetch()
    (tmp_path / "b.bin").write_bytes(CONTENT)
    with pytest.raises(UserError, match="has 1,000 bytes free, and 300,000 are to come; choose another place"):
        copy(tmp_path / "b.bin", tmp_path / "a.bin", WHOLE)
    assert names(tmp_path) == ["b.bin"]


def test_a_disk_that_fills_up(site, fetch, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"a.bin.*: No space left on device"):
        fetch()
    assert "a.bin" not in names(tmp_path)


def test_a_local_file(tmp_path):
    (tmp_path / "b.bin").write_bytes(CONTENT)
    (tmp_path / ".a.bin.fetch-0.tmp").write_bytes(b"of a copy that was killed")
    record = copy(tmp_path / "b.bin", tmp_path / "a.bin", WHOLE)
    assert record[:3] == (str(tmp_path / "b.bin"), len(CONTENT), SHA256)
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes() == CONTENT
    assert names(tmp_path) == ["a.bin", "a.bin.fetched.json", "b.bin"]
    with pytest.raises(UserError, match="gone.bin: no such file"):
        copy(tmp_path / "gone.bin", tmp_path / "c.bin", WHOLE)
    with pytest.raises(UserError, match="b.bin has 300,000 bytes, expected 7"):
        copy(tmp_path / "b.bin", tmp_path / "c.bin", Expected(7))
    assert not (tmp_path / "c.bin").exists()


def test_a_file_is_what_it_was(tmp_path):
    out = tmp_path / "a.bin"
    assert verified(out, WHOLE) is None
    out.write_bytes(CONTENT)
    with pytest.raises(UserError, match="a.bin was not fetched by this command; remove it"):
        verified(out, WHOLE)
    (tmp_path / "b.bin").write_bytes(CONTENT)
    copy(tmp_path / "b.bin", out, Expected())
    out.write_bytes(CONTENT[::-1])
    for expected in (Expected(), WHOLE):
        with pytest.raises(UserError, match=f"has sha256 .*, expected {SHA256}; remove it, and the same command"):
            verified(out, expected)
    out.write_bytes(CONTENT[1:])
    with pytest.raises(UserError, match="has 299,999 bytes, expected 300,000; remove it"):
        verified(out, Expected())
