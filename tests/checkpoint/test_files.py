"""Where files may be written, and what is left of what was there."""

import errno
import io
import os
import stat
import subprocess
import sys

import pytest

from hdrq.checkpoint.files import new_folder, output_path, write_atomically


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


KILLED = """
import os, sys
from hdrq.checkpoint.files import new_folder, replacing
with replacing(sys.argv[1]) as file, new_folder(sys.argv[2]) as folder:
    file.write(b"half")
    file.flush()
    (folder / "part").write_text("half")
    print("written", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_stays(tmp_path):
    pytest.importorskip("fcntl")
    out, folder = tmp_path / "a[1].bin", tmp_path / "folder"
    command = [sys.executable, "-c", KILLED, str(out), str(folder)]
    both = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == b"written\n"
    before = set(tmp_path.iterdir())
    assert len(before) == 4
    for path in before:
        os.utime(path, (0, 0))
    both[0].kill()
    both[0].wait()
    write_atomically(out, b"whole")
    with new_folder(folder) as new:
        (new / "part").write_text("whole")
    left = set(tmp_path.iterdir()) - {out, folder}
    assert len(left) == 2 and left < before  # a file and a folder of the process that lives
    both[1].communicate(b"")  # the folder is not empty any more, so it gives up, and takes its own away
    assert not [path for path in tmp_path.iterdir() if path not in (out, folder)]


def test_a_temporary_file_that_was_just_written_is_nobodys_leftover(tmp_path):
    other = tmp_path / ".out.bin.hdrq-0123abcd"
    other.write_bytes(b"")
    write_atomically(tmp_path / "out.bin", b"whole")
    assert other.exists()


def test_files_of_others_stay(tmp_path):
    other = tmp_path / ".env.20240115"
    other.write_bytes(b"")
    os.utime(other, (0, 0))
    write_atomically(tmp_path / "env", b"whole")
    assert other.exists()


def test_a_name_may_be_as_long_as_the_disk_takes(tmp_path):
    write_atomically(tmp_path / ("あ" * 83 + ".bin"), b"whole")
