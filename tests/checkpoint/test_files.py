"""Where files may be written, and what is left of what was there."""

import errno
import io
import os
import stat

import pytest

from hdrq.checkpoint.files import output_path, write_atomically


def test_a_folder_is_refused(tmp_path):
    for path in (tmp_path, "", "."):
        with pytest.raises(ValueError, match="out must be a file, got the folder"):
            output_path(path)
    with pytest.raises(FileNotFoundError, match="folder that exists"):
        output_path(tmp_path / "none" / "file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_and_a_device_stay(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    for name in ("pipe", "link"):
        with pytest.raises(ValueError, match="regular file"):
            write_atomically(tmp_path / name, "x")
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "new"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link", "target"]


@pytest.mark.skipif(os.name != "posix", reason="permissions are those of POSIX")
def test_permissions_are_those_of_the_file_replaced_or_of_the_process(tmp_path):
    (tmp_path / "private").write_text("old")
    os.chmod(tmp_path / "private", 0o600)
    before = os.umask(0o077)
    try:
        write_atomically(tmp_path / "private", "new")
        write_atomically(tmp_path / "fresh", "new")
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / n).stat().st_mode) for n in ("private", "fresh")] == [0o600, 0o600]


def test_a_disk_that_is_full_at_the_end_is_named(tmp_path, monkeypatch):
    """Closing a file writes what is buffered, and fails again; the first error, which names the file, stays."""

    class Full(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    def full(handle, mode):
        os.close(handle)
        return io.BufferedWriter(Full())

    monkeypatch.setattr(os, "fdopen", full)
    with pytest.raises(OSError, match="model must be written to a disk with room, got No space left on device"):
        write_atomically(tmp_path / "model", b"abc")
    assert not any(tmp_path.iterdir())
