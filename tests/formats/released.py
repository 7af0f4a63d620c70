"""The stores that releases made, kept as images of the filesystem they lie on: inode numbers and times are part of a
store, for its index goes by them.

`python -m tests.formats.released IMAGE.xz` makes one with the dedupfs of this checkout, as root; a release keeps its
own, and never changes that of an earlier one. In the image are `archive/`, a source that was mounted, settled and
unmounted, and `manifest.json`: what an application saw of each path before dedupfs was there.
"""

import contextlib
import hashlib
import json
import lzma
import os
import random
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from tests.support.filesystems import Unsupported, run
from tests.support.mounted import dedupfs

IMAGES = Path(__file__).with_name("stores")

_IMAGE_BYTES = 6 << 20
_A_DATE_NS = 1_234_567_890_123_456_789


def looks_like(path: Path) -> dict[str, Any]:
    """Everything that belongs to a file or directory, but for what sharing may change; attributes of dedupfs are not
    listed to applications."""
    st = path.lstat()
    found: dict[str, Any] = {"mode": st.st_mode, "owner": [st.st_uid, st.st_gid], "mtime_ns": st.st_mtime_ns}
    if stat.S_ISLNK(st.st_mode):
        return found | {"target": os.readlink(path)}
    found["xattrs"] = {name: os.getxattr(path, name).hex() for name in sorted(os.listxattr(path))}
    if stat.S_ISREG(st.st_mode):
        found |= {"size": st.st_size, "links": st.st_nlink, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    return found


def tree(top: Path) -> dict[str, dict[str, Any]]:
    """The same for all below a directory but a store, by path."""
    found = {}
    for directory, directories, names in os.walk(top):
        if Path(directory) == top and ".dedupfs" in directories:
            directories.remove(".dedupfs")
        for name in directories + names:
            path = Path(directory, name)
            found[os.fsencode(path.relative_to(top)).decode(errors="backslashreplace")] = looks_like(path)
    return found


@contextlib.contextmanager
def unpacked(image: Path, directory: Path) -> Iterator[Path]:
    """The filesystem of a kept image, mounted in a directory until the end of the block. Raises Unsupported."""
    plain, mountpoint = directory / "image", directory / "filesystem"
    with lzma.open(image) as packed:
        plain.write_bytes(packed.read())
    mountpoint.mkdir()
    with _mounted(plain, mountpoint):
        yield mountpoint


@contextlib.contextmanager
def _mounted(image: Path, mountpoint: Path) -> Iterator[None]:
    done = run("mount", "-o", "loop", image, mountpoint)
    if done.returncode:
        raise Unsupported(f"cannot mount {image}: {done.stderr}")
    try:
        yield
    finally:
        done = run("umount", mountpoint)
        if done.returncode:
            raise RuntimeError(f"cannot unmount {image}: {done.stderr}")


def _fill(top: Path) -> None:
    """One of everything that an archive may hold."""
    for name in ("permits/2024", "inspections", "police", "empty directory"):
        (top / name).mkdir(parents=True)
    picture = Image.linear_gradient("L").resize((320, 240)).convert("RGB")
    noise = Image.frombytes("RGB", (80, 60), random.Random("noise").randbytes(80 * 60 * 3)).resize((320, 240))
    Image.blend(picture, noise, 0.5).save(top / "permits/2024/a.jpg", quality=70)
    smaller = Image.open(top / "permits/2024/a.jpg").resize((240, 180))
    smaller.save(top / "inspections/smaller.jpg", quality=80)
    contents = {
        "permits/2024/one": _bytes("one", 9001),
        "inspections/one again": _bytes("one", 9001),
        os.fsdecode(b"permits/caf\xe9 \xff\n.tif"): _bytes("one", 9001),
        "inspections/a.jpg": (top / "permits/2024/a.jpg").read_bytes(),
        "police/one": _bytes("one", 9001),
        "police/one again": _bytes("one", 9001),
        "alone": _bytes("alone", 5000),
        "tiny": b"t",
        "tiny too": b"t",
        "empty": b"",
        "linked": _bytes("linked", 6000),
    }
    for name, data in contents.items():
        (top / name).write_bytes(data)
    os.link(top / "linked", top / "permits/linked too")
    for name in ("sparse", "permits/sparse too"):
        with open(top / name, "wb") as file:
            file.truncate(1 << 20)
            file.seek(500_000)
            file.write(_bytes("island", 5000))
    (top / "to one").symlink_to("permits/2024/one")
    os.mkfifo(top / "fifo", 0o640)
    os.setxattr(top / "permits/2024/one", "user.comment", b"north\0side")
    os.setxattr(top / "inspections/one again", "user.long", b"x" * 1000)
    run("setfacl", "--modify", "u:1234:rw", top / "inspections/one again")
    run("setfacl", "--default", "--modify", "g:1234:rx", top / "inspections")
    os.chown(top / "permits/2024/one", 1001, 1002)
    os.chmod(top / "permits/2024/one", 0o4711)
    os.chmod(top / "sparse", 0o400)
    for number, path in enumerate(sorted(top.rglob("*"), reverse=True)):
        os.utime(path, ns=(_A_DATE_NS, _A_DATE_NS + number), follow_symlinks=False)


def _bytes(name: str, size_bytes: int) -> bytes:
    return random.Random(name).randbytes(size_bytes)


def _make(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
        image, filesystem, view = Path(place, "image"), Path(place, "filesystem"), Path(place, "view")
        filesystem.mkdir()
        view.mkdir()
        with open(image, "wb") as file:
            file.truncate(_IMAGE_BYTES)
        run("mkfs.ext4", "-q", "-F", "-b", "4096", "-O", "^has_journal", "-m", "0", "-N", "256", image)
        with _mounted(image, filesystem):
            archive = filesystem / "archive"
            archive.mkdir()
            _fill(archive)
            (filesystem / "manifest.json").write_text(json.dumps(tree(archive), indent=1))
            dedupfs("mount", "-o", "share=reference,domain=police/", archive, view)
            try:
                dedupfs("settle", view)
                dedupfs("authoritative", view, "inspections/a.jpg", "--pin")
            finally:
                dedupfs("umount", view)
        with lzma.open(target, "wb", preset=9) as packed:
            packed.write(image.read_bytes())


if __name__ == "__main__":
    _make(Path(sys.argv[1]))
