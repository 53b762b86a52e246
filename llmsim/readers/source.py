"""The bytes of a trace: where they come from and what they obviously are not.

A path, a directory or ``-`` (standard input) becomes a `Source`. gzip and Zstandard are unwrapped by their magic bytes,
whatever the file is called; a UTF-8 byte-order mark is removed; Git LFS pointers, web pages, archives and databases are
refused with a sentence saying what they are. The digest is that of the bytes as stored, so it can be compared with
``sha256sum``.
"""

from __future__ import annotations

import hashlib
import lzma
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GZIP = b"\x1f\x8b"
ZSTD = b"\x28\xb5\x2f\xfd"
XZ = b"\xfd7zXZ"
XZ_MEMORY_BYTES = 256 << 20  # of its dictionary; `xz -9` needs 65 MiB
PARQUET = b"PAR1"
# unpacked, a file may take so much whatever its size, and beyond that so many times its size: traces pack 3 to 20
# times, and gzip packs nothing but one repeated byte 1,000 times
UNPACKED_BYTES, UNPACKED_TIMES = 256 << 20, 200
PIECE_BYTES = 1 << 14  # of Zstandard data: a block of 128 KiB may take four bytes
REFUSED = {
    b"PARE": "a Parquet file whose footer is encrypted; write it unencrypted",
    b"PK\x03\x04": "a zip archive (or spreadsheet); unpack it, or save the sheet as CSV",
    b"SQLite format 3": "an SQLite database; export the table as CSV",
    b"BZh": "bzip2-compressed; unpack it first (gzip and Zstandard are read as they are)",
    XZ: "xz-compressed; unpack it first (gzip and Zstandard are read as they are)",
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
}


@dataclass(frozen=True)
class Source:
    """A trace file in memory, or (with `directory` set) a directory of them."""

    name: str
    data: bytes
    sha256: str
    directory: Path | None = None

    def text(self) -> str:
        """The data as text; not UTF-8 is an error naming line and byte."""
        try:
            return self.data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(self.name, self.data, error.start) from None


def not_utf8(name: str, data: bytes, offset: int, first_line: int = 1) -> ValueError:
    line = data.count(b"\n", 0, offset) + first_line
    return ValueError(
        f"{name}: line {line}: not UTF-8 (byte 0x{data[offset]:02x} at byte offset {offset}); convert the file, "
        "for example with: iconv -f latin1 -t utf-8"
    )


def open_source(path: str | Path) -> Source:
    """Read `path` whole; ``-`` is standard input."""
    if str(path) == "-":
        return _source("standard input", sys.stdin.buffer.read())
    if not str(path).strip():
        raise ValueError("the path of the trace is empty; give a file, or - for standard input")
    place = Path(path)
    if place.is_block_device() or place.is_char_device():
        raise ValueError(f"{path}: a device, not a trace; give a file, or - for standard input")
    if place.is_dir():
        return Source(place.name or str(place), b"", "", directory=place)
    try:
        stored = place.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file{_near(place)}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    return _source(place.name, stored)


def _near(place: Path) -> str:
    import difflib

    if not place.parent.is_dir():
        return f" (there is no directory {place.parent} either)"
    names = [entry.name for entry in place.parent.iterdir()]
    close = difflib.get_close_matches(place.name, names, n=1)
    return (
        f"; did you mean {place.parent / close[0]}?" if close else "; give the path of a file, or - for standard input"
    )


def _source(name: str, stored: bytes) -> Source:
    data = stored
    if data.startswith(GZIP):
        data = gunzip(name, data)
    elif data.startswith(ZSTD):
        data = _unzstd(name, data)
    data = data.removeprefix(b"\xef\xbb\xbf")
    _refuse(name, data)
    return Source(name, data, hashlib.sha256(stored).hexdigest())


def gunzip(name: str, stored: bytes) -> bytes:
    return _unpacked(name, stored, "gzip", lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS))  # header, check sum


def unxz(name: str, stored: bytes) -> bytes:
    """Recordings only: traces are unpacked by whoever packed them."""
    return _unpacked(name, stored, "xz", lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY_BYTES))


def _unpacked(name: str, stored: bytes, packing: str, begin: Callable[[], Any]) -> bytes:
    """All members of a file; `begin` gives the decompressor of one."""
    most = _most_bytes(stored)
    parts, rest, length = [], stored, 0
    try:
        while rest:
            member = begin()
            parts.append(member.decompress(rest, most - length + 1))
            length += len(parts[-1])
            _check_unpacked(name, stored, length)
            if not member.eof:
                raise EOFError("Compressed file ended before the end-of-stream marker was reached")
            rest = member.unused_data.lstrip(b"\x00")
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        reason = str(error).rstrip(".")
        raise ValueError(f"{name}: {packing} data is damaged or cut short ({reason}); fetch the file again") from None
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _most_bytes(stored: bytes) -> int:
    return max(UNPACKED_BYTES, UNPACKED_TIMES * len(stored))


def _check_unpacked(name: str, stored: bytes, length: int) -> None:
    if length > _most_bytes(stored):
        raise ValueError(
            f"{name}: {len(stored):,} bytes that unpack to more than {_most_bytes(stored):,}: no trace or recording "
            "packs so well; if it is one, unpack it first"
        )


def _unzstd(name: str, stored: bytes) -> bytes:
    try:
        import zstandard
    except ImportError:
        raise ValueError(
            f"{name}: Zstandard-compressed, and the zstandard package is not installed; "
            'pip install "llmsim[zstd]", or unpack it with: zstd -d'
        ) from None
    parts, length, at = [], 0, 0
    try:
        while at < len(stored):
            frame = zstandard.ZstdDecompressor().decompressobj()
            while at < len(stored) and not frame.eof:
                piece = stored[at : at + PIECE_BYTES]
                parts.append(frame.decompress(piece))
                at += len(piece) - len(frame.unused_data)
                length += len(parts[-1])
                _check_unpacked(name, stored, length)
            if not frame.eof:
                raise ValueError(f"{name}: Zstandard data is cut short; fetch the file again")
    except zstandard.ZstdError as error:
        raise ValueError(f"{name}: Zstandard data is damaged ({error}); fetch the file again") from None
    return b"".join(parts)


def _refuse(name: str, data: bytes) -> None:
    if not data.strip():
        raise ValueError(f"{name}: the file is empty; a trace needs at least one request")
    head = data[:512].lstrip()
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{name}: a Git LFS pointer of {len(data)} bytes, not the trace itself; fetch the content: git lfs pull"
        )
    if head.lower().startswith((b"<!doctype", b"<html")):
        raise ValueError(f"{name}: an HTML page, not a trace; download the raw file instead of the page that shows it")
    if head.startswith(b"<?xml"):
        raise ValueError(f"{name}: an XML document, not a trace; traces are CSV, JSON, JSON lines or Parquet")
    for magic, what in REFUSED.items():
        if data.startswith(magic):
            raise ValueError(f"{name}: {what}")
    if b"\x00" in data[:4096] and not data.startswith(PARQUET):
        raise ValueError(f"{name}: binary data, not a trace; traces are CSV, JSON, JSON lines or Parquet")
