"""Files of others, taken whole or not at all: from an HTTP(S) address, or from a path on this machine.

A file gets its name when all of it has arrived and is what was expected; beside it NAME.fetched.json says where it came
from, its size and its sha256. Until then its bytes are in NAME.part, and NAME.part.json says of which version of the
server's file, so that the same request resumes where an earlier one stopped.
"""

import contextlib
import datetime
import http.client
import json
import logging
import os
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from email.message import Message
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from tqdm import tqdm

from diffjax import __version__
from diffjax.errors import UserError, writing
from diffjax.files import atomic, file_sha256, remove_temporaries, write_json

logger = logging.getLogger(__name__)
RECORD = ".fetched.json"
TRIES = 6  # connections in a row that bring nothing, after which a request gives up
PAUSE = 1.0  # seconds before the second of them; doubles with each further one
SILENCE = 30.0  # seconds without a byte after which a connection counts as lost
PIECE = 2**20
BUSY = (408, 429, 500, 502, 503, 504)  # answers of a server that may do better in a moment
PAGE_STARTS = (b"<!", b"<?", b"<h", b"<H")


class Expected(NamedTuple):
    """What is known of a file before it arrives.

    Attributes:
        size: bytes; 0 where it is not known.
        sha256: hexadecimal digits; "" where it is not known.
    """

    size: int = 0
    sha256: str = ""


class Record(NamedTuple):
    """Where a file came from and what it was then."""

    source: str
    size: int
    sha256: str
    date: str


class _Lost(Exception):
    """The connection ended early; the message says how."""


class _Stale(_Lost):
    """What has arrived cannot be continued; the message says why."""


def is_address(text: str) -> bool:
    """Whether a text is a URL, not a path."""
    return "://" in text


def verified(out: Path, expected: Expected) -> Record | None:
    """The record of the file `out` that was fetched earlier; None where it was not.

    UserError where the file is not what it was when it came, or not what is expected.
    """
    if not out.is_file():
        return None
    try:
        record = Record(**json.loads(_sibling(out, RECORD).read_text()))
    except (OSError, ValueError, TypeError):
        raise UserError(f"{out} was not fetched by this command; remove it, or choose another place") from None
    try:
        _check(out, Expected(record.size, expected.sha256 or record.sha256), str(out))
    except UserError as error:
        raise UserError(f"{error}; remove it, and the same command fetches it again") from None
    return record


def download(address: str, out: Path, expected: Expected) -> Record:
    """Fetch the file `out` from an http or https address, going on where an earlier request was stopped.

    A lost connection is made again, as long as not TRIES of them in a row bring nothing.

    Raises:
        UserError: no such file, no access, another file than expected, no space, no connection; in words.
    """
    if urlsplit(address).scheme not in ("http", "https") or not urlsplit(address).netloc:
        raise UserError(f"{address}: valid: an http:// or https:// address, or a path")
    part = _sibling(out, ".part")
    failures, most = 0, -1
    while True:
        try:
            _receive(address, out, expected)
            break
        except _Lost as lost:
            if isinstance(lost, _Stale):
                _forget(out)
            arrived = part.stat().st_size if part.is_file() else 0
            failures, most = (1, arrived) if arrived > most else (failures + 1, most)
            _pause(address, lost, failures)
    try:
        sha256 = _check(part, expected, address)
    except UserError:
        _forget(out)
        raise
    record = _record(out, address, part.stat().st_size, sha256)
    part.replace(out)
    _forget(out)
    return record


def _pause(address: str, lost: _Lost, failures: int) -> None:
    """Wait before the next connection. UserError after TRIES of them that brought nothing."""
    if failures == TRIES:
        kept = "what has arrived is kept, the same command continues; --from takes a file or another address"
        raise UserError(f"{address}: {lost}, {TRIES} times in a row; {kept}") from lost
    pause = PAUSE * 2 ** (failures - 1)
    logger.info(f"{lost}; trying again in {pause:g} s")
    time.sleep(pause)


def copy(path: Path, out: Path, expected: Expected) -> Record:
    """Copy a file of this machine to `out`, which is checked before it gets its name. UserError as for `download`."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    remove_temporaries(out.parent, "fetch", out.name)
    _forget(out)
    _check_space(out, path.stat().st_size)
    with path.open("rb") as source, atomic(out, "fetch") as file:
        shutil.copyfileobj(source, file, PIECE)
        file.flush()
        written = Path(file.name)
        return _record(out, str(path.resolve()), written.stat().st_size, _check(written, expected, str(path)))


def _record(out: Path, source: str, size: int, sha256: str) -> Record:
    """Write the record of a file, before the file has its name: a file with its name has a record."""
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record = Record(source, size, sha256, date)
    write_json(_sibling(out, RECORD), record._asdict())
    return record


def _check(path: Path, expected: Expected, name: str) -> str:
    """The sha256 of a file. UserError, which calls it `name`, where it or the size is not the expected one."""
    if expected.size and (size := path.stat().st_size) != expected.size:
        raise UserError(f"{name} has {size:,} bytes, expected {expected.size:,}")
    sha256 = file_sha256(path)
    if expected.sha256 and sha256 != expected.sha256:
        raise UserError(f"{name} has sha256 {sha256}, expected {expected.sha256}")
    return sha256


def _check_space(out: Path, size: int) -> None:
    if size > (free := shutil.disk_usage(out.parent).free):
        raise UserError(f"{out.parent} has {free:,} bytes free, and {size:,} are to come; choose another place")


def _sibling(out: Path, ending: str) -> Path:
    return out.with_name(out.name + ending)


def _forget(out: Path) -> None:
    for ending in (".part", ".part.json"):
        _sibling(out, ending).unlink(missing_ok=True)


def _receive(address: str, out: Path, expected: Expected) -> None:
    """One connection: all of the file, or what is missing of it, into the part. _Lost where it ends early."""
    part, state = _sibling(out, ".part"), _read_state(out, address)
    earlier = part.stat().st_size if part.is_file() else 0
    start = earlier if state else 0
    if start and start == state["size"]:
        return  # all of it arrived, and the program was stopped then
    asked = {"Range": f"bytes={start}-", "If-Range": str(state["version"])} if start else {}
    with _answer(address, asked) as answer:
        if (coding := answer.headers.get("Content-Encoding", "identity").strip().lower()) != "identity":
            raise UserError(f"{address}: the server sends the file in the encoding {coding}; give it by --from=FILE")
        whole, version = _size(answer, start, expected), _version(answer.headers)
        changed = bool(state) and version != state["version"]
        if answer.status == 206 and changed:  # a server that does not know If-Range
            raise _Stale("the server's file is another one now")
        if answer.status != 206:
            if earlier:
                why = "the server's file is another one now" if changed else "what arrived earlier cannot be continued"
                logger.info(f"{why}; starting again after {earlier:,} bytes")
            start = 0
            _forget(out)
            _refuse_page(address, answer)
        if whole and expected.size and whole != expected.size:
            raise UserError(f"{address} has {whole:,} bytes, expected {expected.size:,}")
        _check_space(out, whole - start)
        if not start:
            write_json(_sibling(out, ".part.json"), {"address": address, "version": version, "size": whole})
        arrived = _write(answer, part, start, whole)
    if whole and arrived != whole:
        raise _Lost(f"the connection was lost after {arrived:,} of {whole:,} bytes")


def _write(answer: http.client.HTTPResponse, part: Path, start: int, whole: int) -> int:
    """Add the body of an answer to the `start` bytes of the part; returns how many bytes that has then."""
    with (
        writing(part),
        part.open("ab" if start else "wb") as file,
        tqdm(total=whole or None, initial=start, unit="B", unit_scale=True, disable=None) as bar,
    ):
        while True:
            with _connected():
                piece = answer.read1(PIECE)
            if not piece:
                break
            file.write(piece)
            bar.update(len(piece))
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


@contextlib.contextmanager
def _connected() -> Iterator[None]:
    """A connection that fails in here is _Lost."""
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        raise _Lost(f"the connection was lost ({str(error) or type(error).__name__})") from error


def _read_state(out: Path, address: str) -> dict[str, str | int]:
    """Of which version the part of `out` is: {"address", "version", "size"}; {} where it cannot be continued."""
    try:
        state = json.loads(_sibling(out, ".part.json").read_text())
        return state if state["address"] == address and state["version"] else {}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _version(headers: Message) -> str:
    """What tells one version of a file from another: a strong ETag, else its date, else "" (RFC 9110, 13.1.5)."""
    tag = headers.get("ETag") or ""
    return tag if tag.startswith('"') else headers.get("Last-Modified") or ""


def _size(answer: http.client.HTTPResponse, start: int, expected: Expected) -> int:
    """Bytes of the whole file; 0 where the server does not say.

    _Stale for a range that was not asked for. UserError where nothing would tell a whole file from a part of one.
    """
    if answer.status != 206:
        if answer.length is None and not answer.chunked and not expected.sha256:
            raise UserError("the server does not say how long the file is, and no sha256 is known; give --from=FILE")
        return answer.length or 0
    first, _, whole = answer.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
    if first.partition("-")[0] != str(start) or not whole.isdigit():
        raise _Stale(f"the server answered with the range {first or 'of nothing'}, asked for {start}-")
    return int(whole)


def _refuse_page(address: str, answer: http.client.HTTPResponse) -> None:
    with _connected():
        begins = answer.peek(2)
    if answer.headers.get_content_type() == "text/html" or begins.startswith(PAGE_STARTS):
        raise UserError(f"{address} is a web page, not a file; open it in a browser, and give the file by --from=FILE")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirections to http and https, but for those that would give up encryption."""

    def http_error_302(self, req, fp, code, msg, headers):  # type: ignore[no-untyped-def]
        place = headers.get("Location", "")
        if urlsplit(place).scheme not in ("http", "https", ""):
            fp.close()
            raise UserError(f"{req.full_url} leads to {place}; only http and https are followed")
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # type: ignore[no-untyped-def]
        if (urlsplit(req.full_url).scheme, urlsplit(newurl).scheme) == ("https", "http"):
            fp.close()
            raise UserError(f"{req.full_url} leads to {newurl}, which is not followed: it is not encrypted")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@contextlib.contextmanager
def _answer(address: str, headers: Mapping[str, str]) -> Iterator[http.client.HTTPResponse]:
    """The server's answer to a request. _Lost where there is none for now, UserError where there will be none."""
    agent = {"User-Agent": f"diffjax/{__version__}", "Accept-Encoding": "identity"}
    opener = urllib.request.build_opener(_Redirects)
    try:
        answer = opener.open(urllib.request.Request(address, headers={**agent, **headers}), timeout=SILENCE)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and headers:
            raise _Stale("the server's file is a shorter one now") from error
        if error.code in BUSY:
            raise _Lost(f"the server answered {error.code} ({error.reason})") from error
        raise UserError(_refusal(address, error.code, str(error.reason))) from error
    except http.client.InvalidURL as error:
        raise UserError(f"{address} is not a valid address ({error})") from error
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise UserError(f"{address}: the certificate is not valid ({reason.verify_message})") from error
        raise _Lost(f"no connection to {urlsplit(address).netloc} ({reason})") from error
    with answer:
        yield answer


def _refusal(address: str, code: int, reason: str) -> str:
    advice = "get it in a browser, and give it by --from=FILE"
    if code in (401, 403, 407):
        return f"{address}: the server refuses access or wants a login ({code}); {advice}"
    if code in (404, 410):
        return f"{address}: no such file at the server ({code}); give another address or a file by --from"
    return f"{address}: the server answered {code} ({' '.join(reason.split())}); {advice}"
