"""Files that are small and become huge, or never end: refused in one line, before memory is gone."""

import gzip
import os
from pathlib import Path

import pytest
from needs import require

from llmsim.choice import on_disk
from llmsim.readers import source
from llmsim.trace import load_trace

require("zstandard")

CSV = b"arrival_time_s,prompt_tokens,output_tokens\n" + b"".join(b"%d,100,20\n" % i for i in range(5000))


def zstd(data: bytes) -> bytes:
    import zstandard

    return bytes(zstandard.ZstdCompressor().compress(data))


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_what_unpacks_to_far_more_is_refused(pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "UNPACKED_BYTES", 1 << 20)
    bomb = tmp_path / "bomb.csv"
    bomb.write_bytes(pack(b"0" * (16 << 20)))
    with pytest.raises(
        ValueError, match=r"^bomb.csv: [\d,]+ bytes that unpack to more than [\d,]+: .*unpack it first$"
    ):
        load_trace(bomb)
    (tmp_path / "two.csv").write_bytes(pack(CSV[:20_000]) + pack(CSV[20_000:]))  # members, one after the other
    assert len(load_trace(tmp_path / "two.csv")) == 5000
    monkeypatch.setattr(source, "UNPACKED_BYTES", len(CSV) - 1)
    monkeypatch.setattr(source, "UNPACKED_TIMES", 1)
    with pytest.raises(ValueError, match=f"more than {len(CSV) - 1:,}"):
        load_trace(tmp_path / "two.csv")


def test_a_line_too_long_for_a_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "line.csv"
    for text in ("0" * 200_000, f'"{"0" * 200_000}"\n1,2\n', ",".join(f"c{i}" for i in range(20_000))):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"^line.csv: line 1: "):
            load_trace(path)


def test_a_page_reads_files_and_folders_only(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    (tmp_path / "good.csv").write_bytes(CSV)
    refused = {
        "-": "standard input", str(tmp_path / "pipe"): "a pipe or a device", "/dev/zero": "a pipe or a device",
        str(tmp_path / "empty"): "the file is empty", "/" + "x" * 5000: "cannot be read: File name too long",
        "~no-such-user-here/x": "no such path", "a\0b": "no such path",
    }  # fmt: skip
    for path, words in refused.items():
        with pytest.raises(ValueError, match=words) as caught:
            on_disk(path)
        assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)
    assert len(on_disk(tmp_path / "good.csv").load()) == 5000
    with pytest.raises(FileNotFoundError, match="no such file"):
        on_disk(tmp_path / "x.csv").load()
