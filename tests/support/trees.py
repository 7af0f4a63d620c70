"""Directory trees for tests: one with everything an archive may hold, and photographs spread over folders."""

import os
import shutil
from pathlib import Path

from .mounted import Mounted
from .photos import photographs
from .tools import GROUP, OTHER_GROUP, USER, tool

FOLDERS = ("field", "office", "archive")


def photograph(*, jpeg: bool = False) -> Path:
    """One that is not tiny; with `jpeg`, one that particular programs are content with."""
    return next(path for path in photographs(24, jpeg=jpeg) if path.stat().st_size > 64 << 10)


def shared_state(mounted: Mounted) -> str:
    """What `user.dedupfs.state` says on this mount of files that share."""
    return "shared" if "share=reflink" in mounted.options else "reference"


def shared_copies(mounted: Mounted, content: Path | bytes, *, name: str = "picture.jpg") -> list[Path]:
    """One content in each of three folders of the mount, settled and sharing."""
    paths = []
    for folder in FOLDERS:
        mounted.path(folder).mkdir(exist_ok=True)
        path = mounted.path(folder, name)
        if isinstance(content, Path):
            shutil.copyfile(content, path)
        else:
            path.write_bytes(content)
        paths.append(path)
    for path in paths:
        mounted.state(path)  # returns when this one is settled; the first was, before it had anybody to share with
    expected = shared_state(mounted)
    assert [mounted.state(path) for path in paths] == [expected] * 3
    return paths


def make_tree(top: Path, *, copies: int = 2) -> None:
    """Photographs, each `copies` times, and one of everything else that a directory may hold."""
    pictures = photographs(6)
    for number in range(copies):
        folder = top / f"folder {number}" / "2019" / "Sommer – Ausflug"
        folder.mkdir(parents=True)
        for picture in pictures:
            shutil.copyfile(picture, folder / picture.name)
            os.utime(folder / picture.name, ns=(1_500_000_000_123_456_789, 1_400_000_000_987_654_321 + number))
    odd = top / "odd"
    odd.mkdir()
    (odd / "empty").touch()
    (odd / "small.txt").write_text("too small to share\n")
    (odd / "small copy.txt").write_text("too small to share\n")
    (odd / "holes").touch()
    os.truncate(odd / "holes", 10 << 20)
    (odd / os.fsdecode(b"caf\xe9 \xff\n.jpg")).write_bytes(pictures[0].read_bytes())
    shutil.copyfile(pictures[1], odd / "linked.jpg")
    os.link(odd / "linked.jpg", odd / "linked too.jpg")
    (odd / "to a file").symlink_to("linked.jpg")
    (odd / "to a directory").symlink_to("..")
    (odd / "to nowhere").symlink_to("nowhere/at/all")
    os.mkfifo(odd / "fifo", 0o640)
    shutil.copyfile(pictures[2], odd / "described.jpg")
    os.setxattr(odd / "described.jpg", "user.comment", b"with\0bytes")
    os.chmod(odd / "described.jpg", 0o604)
    tool("setfacl", "--modify", f"u:{OTHER_GROUP}:rw", odd / "described.jpg")
    tool("setfacl", "--default", "--modify", f"g:{OTHER_GROUP}:rwx", odd)
    if os.geteuid() == 0:
        shutil.copyfile(pictures[3], odd / "theirs.jpg")
        os.chown(odd / "theirs.jpg", USER, GROUP)
        os.chmod(odd / "theirs.jpg", 0o4711)
        os.mknod(odd / "device", 0o20600, os.makedev(1, 3))
    os.utime(odd / "to a file", ns=(10**18, 10**18 + 1), follow_symlinks=False)
    os.utime(odd, ns=(10**18, 10**18 + 7))
