"""Ordinary programs at work in the mount: they do there what they do on the filesystem below it."""

import itertools
import os
import shutil
from pathlib import Path

import pytest

from tests.conftest import Mounts
from tests.support.blocks import is_reference, share_blocks
from tests.support.flavours import BOTH_STRATEGIES, ONE_FLAVOUR, REFERENCES
from tests.support.mounted import Mounted
from tests.support.photos import photographs
from tests.support.tools import differences, read_afresh, shell, tool
from tests.support.trees import FOLDERS, make_tree, photograph, shared_copies, shared_state


@pytest.fixture
def plain(mounts: Mounts) -> Path:
    """An empty directory on the same filesystem, that dedupfs has nothing to do with."""
    return mounts.directory("plain")


# --- editing one of three copies


# What each does to $1, a file; $2 is a picture of other content.
EDITORS = {
    "append": 'echo caption >>"$1"',
    "tee": 'echo caption | tee --append "$1"',
    "overwrite": 'cat "$2" >"$1"',
    "dd into the middle": 'printf changed | dd of="$1" bs=1 seek=5000 conv=notrunc,fsync',
    "dd beyond the end": 'printf changed | dd of="$1" bs=1 seek=9M conv=notrunc',
    "dd from the start": 'head -c 9000 "$2" | dd of="$1" bs=512 conv=fsync',
    "dd direct": 'dd if="$2" of="$1" bs=4096 count=2 oflag=direct conv=notrunc',
    "cut off": 'truncate --size=4097 "$1"',
    "cut to nothing": 'truncate --size=0 "$1"',
    "lengthen": 'truncate --size=+12345 "$1"',
    "punch a hole": 'fallocate --punch-hole --offset 4096 --length 4096 "$1"',
    "zero a range": 'fallocate --zero-range --offset 100 --length 9000 "$1"',
    "grow": 'fallocate --length 9M "$1"',
    "sed in place": 'LC_ALL=C sed --in-place "1s/^/x/" "$1"',
    "rsync in place": 'rsync --inplace --no-whole-file --ignore-times "$2" "$1"',
    "rsync": 'rsync --ignore-times "$2" "$1"',
    "cp over": 'cp "$2" "$1"',
    "mv over": 'cp "$2" "$1.new"; mv "$1.new" "$1"',
    "install": 'install --mode=640 "$2" "$1"',
    "through a hard link": 'ln "$1" "$1.link"; echo caption >>"$1.link"',
    "through a symbolic link": 'ln --symbolic "$(basename "$1")" "$1.link"; echo caption >>"$1.link"',
    "exiftool in place": 'exiftool -q -overwrite_original_in_place -Artist="A. Tester" "$1"',
    "exiftool": 'exiftool -q -overwrite_original -Artist="A. Tester" "$1"',
    "jpegtran": 'jpegtran -copy all -rotate 90 -outfile "$1" "$1"',
    "mogrify": 'mogrify -strip -resize 50% "$1"',
}


def test_editing_one_copy_leaves_the_others_alone(mounted: Mounted, plain: Path) -> None:
    """All in one mount: each program has three copies of its own, which are references to the one content of all."""
    picture, other = photograph(jpeg=True), photographs(24)[-1]
    content = picture.read_bytes()
    copies = {name: shared_copies(mounted, picture, name=name) for name in EDITORS}
    expected = {}
    for name, script in EDITORS.items():
        on_plain = plain / name
        shutil.copyfile(picture, on_plain)
        shell(script, plain, on_plain, other)
        expected[name] = on_plain.read_bytes()
        assert expected[name] != content
        shell(script, mounted.path(), copies[name][1], other)
        assert copies[name][1].read_bytes() == expected[name], name

    mounted.settle()
    untouched = sorted(os.fsencode(f"{folder}/{name}") for folder in ("archive", "field") for name in EDITORS)
    for name, (first, edited, third) in copies.items():
        assert read_afresh(edited) == expected[name], name
        assert read_afresh(first) == read_afresh(third) == content, name
        assert mounted.duplicates(first) == [path for path in untouched if path != os.fsencode(f"field/{name}")], name
        assert mounted.state(first) == mounted.state(third) == shared_state(mounted), name


# --- copying and moving


def _bytes_moved(pid: int) -> int:
    """What a process has read and written so far, by whatever system call."""
    counters = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(counters["rchar"]) + int(counters["wchar"])


@REFERENCES
def test_cp_inside_the_mount_moves_no_bytes(mounted: Mounted) -> None:
    content = os.urandom(16 << 20)
    original, copy, another = mounted.path("original"), mounted.path("copy"), mounted.path("another")
    original.write_bytes(content)
    assert mounted.state("original") == "plain"
    inode = mounted.below("original").stat().st_ino
    before = _bytes_moved(mounted.pid)

    tool("cp", original, copy)
    if mounted.status()["passthrough"] and not mounted.passes_blobs_through():
        mounted.settle()  # nothing that is open becomes a blob there: the first copy was one of bytes
        before = _bytes_moved(mounted.pid)
    tool("cp", "-a", copy, another)

    # at once, not only when it is settled
    assert all(is_reference(mounted.below(name)) for name in ("original", "copy", "another"))
    assert mounted.state("copy") == mounted.state("another") == "reference"
    assert _bytes_moved(mounted.pid) - before < 1 << 20
    (blob,) = (mounted.store / "blobs").glob("*/*")
    assert blob.stat().st_ino == inode
    assert mounted.xattr("copy", "refs") == b"3"
    assert mounted.duplicates("copy") == [b"another", b"original"]
    assert another.stat().st_mtime_ns == copy.stat().st_mtime_ns > original.stat().st_mtime_ns
    assert read_afresh(copy) == read_afresh(another) == read_afresh(original) == content
    assert mounted.below("copy").stat().st_blocks * 512 <= 4096


@BOTH_STRATEGIES
def test_cp_a_of_everything(mounted: Mounted, plain: Path) -> None:
    make_tree(plain)
    inside, again, outside = mounted.path("inside"), mounted.path("again"), plain.parent / "outside"
    tool("cp", "-a", plain, inside)
    assert differences(plain, inside) == []
    mounted.settle()
    assert differences(plain, inside) == []
    tool("cp", "-a", inside, again)
    assert differences(plain, again) == []
    mounted.settle()
    assert differences(plain, again) == []
    picture = photographs(6)[0].name
    assert mounted.state(f"again/folder 1/2019/Sommer – Ausflug/{picture}") == shared_state(mounted)
    tool("cp", "-a", again, outside)
    assert differences(plain, outside) == []


@BOTH_STRATEGIES
def test_cp_of_a_part_and_onto_a_part(mounted: Mounted) -> None:
    """copy_file_range of less than everything is a copy."""
    picture = photograph()
    first, second, third = shared_copies(mounted, picture)
    content = picture.read_bytes()
    new = mounted.path("part")
    with open(first, "rb") as source, open(new, "wb") as target:
        assert os.copy_file_range(source.fileno(), target.fileno(), 10_000, 100, 0) == 10_000
    assert read_afresh(new) == content[100:10_100]
    with open(first, "rb") as source, open(second, "r+b") as target:
        assert os.copy_file_range(source.fileno(), target.fileno(), 5_000, 0, 20_000) == 5_000
    assert read_afresh(second) == content[:20_000] + content[:5_000] + content[25_000:]
    assert read_afresh(first) == read_afresh(third) == content


@BOTH_STRATEGIES
def test_a_copy_of_a_copy_that_is_still_written(mounted: Mounted) -> None:
    """What is copied is what the file holds at that moment, whatever is known of an earlier content."""
    picture = photograph()
    first, second, _ = shared_copies(mounted, picture)
    with open(second, "r+b") as writer:
        writer.write(b"changed")
        writer.flush()
        tool("cp", second, mounted.path("copy"))
    assert read_afresh(mounted.path("copy")) == b"changed" + picture.read_bytes()[7:]
    mounted.settle()
    assert mounted.duplicates("copy") == [b"office/picture.jpg"]
    assert read_afresh(first) == picture.read_bytes()


@BOTH_STRATEGIES
def test_mv(mounted: Mounted, plain: Path) -> None:
    picture = photograph()
    first, second, third = shared_copies(mounted, picture)
    below = mounted.below("field/picture.jpg").lstat()
    tool("mv", first, mounted.path("moved.jpg"))
    assert mounted.below("moved.jpg").lstat().st_ino == below.st_ino
    assert mounted.duplicates("moved.jpg") == [b"archive/picture.jpg", b"office/picture.jpg"]
    tool("mv", mounted.path("office"), mounted.path("department"))
    assert mounted.duplicates("moved.jpg") == [b"archive/picture.jpg", b"department/picture.jpg"]
    tool("mv", mounted.path("moved.jpg"), mounted.path("department/picture.jpg"))
    assert mounted.duplicates(third) == [b"department/picture.jpg"]
    assert mounted.xattr(third, "refs") == b"2"
    tool("mv", third, plain / "out.jpg")
    assert (plain / "out.jpg").read_bytes() == picture.read_bytes()
    assert not third.exists()
    tool("mv", plain / "out.jpg", third)
    mounted.settle()
    assert mounted.state(third) == shared_state(mounted)
    assert read_afresh(third) == read_afresh(mounted.path("department/picture.jpg")) == picture.read_bytes()
    assert not second.exists()


@BOTH_STRATEGIES
def test_rsync_finds_nothing_to_do_the_second_time(mounted: Mounted, plain: Path) -> None:
    make_tree(plain)
    mounted.path("tree").mkdir()
    command = ["rsync", "-aHAX", "--delete", "--itemize-changes", f"{plain}/", f"{mounted.path('tree')}/"]
    assert tool(*command)
    assert tool(*command) == b""
    mounted.settle()
    assert mounted.status()["saved_bytes"] >= sum(path.stat().st_size for path in photographs(6))
    # sharing gave the files other inodes, and their folders other contents; nobody sees any of it
    assert tool(*command) == b""
    assert tool(*command, "--checksum") == b""
    back = plain.parent / "back"
    tool("rsync", "-aHAX", f"{mounted.path('tree')}/", f"{back}/")
    assert differences(plain, back) == []
    mounted.restart()
    assert tool(*command, "--checksum") == b""


@BOTH_STRATEGIES
def test_tar_round_trip(mounted: Mounted, plain: Path) -> None:
    make_tree(plain)
    mounted.path("tree").mkdir()
    tool("rsync", "-aHAX", f"{plain}/", f"{mounted.path('tree')}/")
    mounted.settle()
    everything = ["--xattrs", "--acls", "--numeric-owner", "--format=posix"]
    # tar puts empty files of mode 0 where symbolic links will be: an ordinary user's mount cannot read them meanwhile
    mounted.expect_log(r"WARNING.*/odd/to .* is not settled: .*Permission denied")
    archive = mounted.path("tree.tar")
    # with --sparse tar asks where the holes are: a reference is no hole
    tool("tar", *everything, "--sparse", "--create", "--file", archive, "--directory", mounted.path("tree"), ".")
    tool("tar", *everything, "--compare", "--file", archive, "--directory", plain)
    for target in (mounted.path("unpacked"), plain.parent / "unpacked"):
        target.mkdir()
        tool("tar", *everything, "--preserve-permissions", "--extract", "--file", archive, "--directory", target)
        assert differences(plain, target) == []
    mounted.settle()
    assert differences(plain, mounted.path("unpacked")) == []


# --- programs with files of their own


@BOTH_STRATEGIES
def test_git(mounted: Mounted, plain: Path) -> None:
    shell(
        """
        git init --quiet --initial-branch main .
        for picture; do cp "$picture" .; cp "$picture" "copy of $(basename "$picture")"; git add .
            git commit --quiet --message "$picture"
        done
        """,
        plain,
        *photographs(5),
    )
    shell(
        """
        git clone --quiet "$1" clone
        cd clone
        for i in 1 2 3; do echo $i >>notes; git add notes; git commit --quiet --message "note $i"; done
        git mv notes remarks; git commit --quiet --message renamed
        git checkout --quiet -b side HEAD~2; echo side >side; git add side; git commit --quiet --message side
        git merge --quiet --message merged main
        git gc --quiet --prune=now
        git fsck --full --strict --no-progress
        """,
        mounted.path(),
        plain,
    )
    mounted.settle()
    first = photographs(5)[0].name
    assert mounted.duplicates(f"clone/{first}") == [os.fsencode(f"clone/copy of {first}")]
    # a clone of a local repository makes hard links
    tool("git", "clone", "--quiet", mounted.path("clone"), mounted.path("second"))
    mounted.settle()
    for clone in (mounted.path("clone"), mounted.path("second")):
        assert tool("git", "status", "--porcelain", cwd=clone) == b""
        assert b"side" in tool("git", "log", "--oneline", cwd=clone)
        tool("git", "fsck", "--full", "--strict", "--no-progress", cwd=clone)
    tool("git", "checkout", "--quiet", "HEAD~3", cwd=mounted.path("second"))
    assert tool("git", "status", "--porcelain", cwd=mounted.path("clone")) == b""


_FILL = """
    PRAGMA journal_mode={mode};
    CREATE TABLE picture (id INTEGER PRIMARY KEY, name TEXT UNIQUE, taken REAL, thumbnail BLOB);
    WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3000)
        INSERT INTO picture SELECT i, 'picture ' || i, i / 7.0, zeroblob(i % 300) FROM n;
    DELETE FROM picture WHERE id % 5 = 0;
    UPDATE picture SET taken = taken * 2 WHERE id % 3 = 0;
    CREATE INDEX by_time ON picture (taken);
"""


@BOTH_STRATEGIES
def test_sqlite_in_both_journal_modes(mounted: Mounted, plain: Path) -> None:
    names = {"delete": ("delete a.db", "delete b.db"), "wal": ("wal a.db", "wal b.db")}
    for mode, (original, copy) in names.items():
        for directory in (plain, mounted.path()):
            assert tool("sqlite3", directory / original, _FILL.format(mode=mode)).strip() == mode.encode()
            tool("cp", directory / original, directory / copy)
    mounted.settle()
    for original, copy in names.values():
        assert mounted.state(original) == shared_state(mounted)
        for directory in (plain, mounted.path()):
            tool("sqlite3", directory / copy, "UPDATE picture SET name = name || ' (b)'; VACUUM;")
    mounted.settle()
    for name in itertools.chain(*names.values()):
        assert tool("sqlite3", mounted.path(name), "PRAGMA integrity_check;") == b"ok\n"
        assert tool("sqlite3", mounted.path(name), ".dump") == tool("sqlite3", plain / name, ".dump")


@ONE_FLAVOUR
def test_sqlite_with_two_writers(mounted: Mounted) -> None:
    """Needs locks between processes, and in WAL mode a file that both have mapped."""
    for mode in ("delete", "wal"):
        database = mounted.path(f"{mode}.db")
        tool("sqlite3", database, f"PRAGMA journal_mode={mode}; CREATE TABLE t (who TEXT, i INTEGER);")
        shell(
            """
            for who in one two; do
                for i in $(seq 30); do echo "INSERT INTO t VALUES ('$who', $i);"; done |
                    sqlite3 -bail -cmd '.timeout 60000' "$1" &
            done
            wait
            """,
            mounted.path(),
            database,
        )
        count = "SELECT who, count(DISTINCT i) FROM t GROUP BY who; PRAGMA integrity_check;"
        assert tool("sqlite3", database, count) == b"one|30\ntwo|30\nok\n"


# --- looking


@ONE_FLAVOUR
def test_find_du_and_ls_see_ordinary_files(mounted: Mounted, plain: Path) -> None:
    make_tree(plain)
    tool("cp", "-a", plain, mounted.path("tree"))
    mounted.settle()
    assert mounted.status()["references"] >= 12
    looks = [
        r"find . -printf '%y %m %U %G %T@ %l %P\0' | sort --zero-terminated",
        r"find . ! -type d -printf '%s %n %P\0' | sort --zero-terminated",
        r"find . -type f -size +100k -printf '%P\0' | sort --zero-terminated",
        r"find . -type f -size -64k -size +0 -printf '%P\0' | sort --zero-terminated",
        r"find . -empty -printf '%P\0' | sort --zero-terminated",
        r"find . -name '*.jpg' -links 1 -printf '%P\0' | sort --zero-terminated",
        # what a program takes for a file with holes has fewer blocks than bytes
        r"find . -type f -printf '%S %P\0' | grep --null-data '^0' | sort --zero-terminated",
        r"ls -lRnA --time-style=full-iso | grep --invert-match --text ^total",
        r"find . -name '*.jpg' -print0 | sort --zero-terminated | du --block-size=1 --files0-from=-",
        r"find . -type f -print0 | sort --zero-terminated | xargs --null sha256sum",
        r"getfacl --recursive --numeric --physical .",
        r"getfattr --recursive --physical --dump --match=- . | sort",
    ]
    for look in looks:
        assert shell(look, mounted.path("tree")) == shell(look, plain), look


@ONE_FLAVOUR
def test_split_zip_and_checksums(mounted: Mounted) -> None:
    picture = photographs(24)[-1]
    shared_copies(mounted, picture)
    shell(
        """
        split --bytes=10000 --numeric-suffixes --suffix-length=4 field/picture.jpg part.
        cat part.* >whole.jpg
        cmp whole.jpg office/picture.jpg
        zip --quiet --recurse-paths pictures.zip field office archive whole.jpg
        mkdir unzipped
        cd unzipped
        unzip -q ../pictures.zip
        cd ..
        sha256sum field/* office/* archive/* whole.jpg >sums
        cd unzipped
        sha256sum --check --strict --quiet ../sums
        unzip -q -o ../pictures.zip
        sha256sum --check --strict --quiet ../sums
        """,
        mounted.path(),
    )
    mounted.settle()
    assert mounted.xattr("whole.jpg", "refs") == b"8"
    assert len(mounted.duplicates("whole.jpg")) == 7
    for folder in FOLDERS:
        assert read_afresh(mounted.path("unzipped", folder, "picture.jpg")) == picture.read_bytes()


@BOTH_STRATEGIES
def test_cp_in_its_other_ways(mounted: Mounted, plain: Path) -> None:
    picture = photograph()
    first, *_ = shared_copies(mounted, picture)
    for flags in ("--reflink=never", "--sparse=always", "--attributes-only"):
        for target in (mounted.path(flags), plain / flags):
            tool("cp", flags, first, target)
            assert target.read_bytes() == (b"" if flags == "--attributes-only" else picture.read_bytes())
    mounted.settle()
    assert mounted.xattr(first, "refs") == b"5"


@pytest.mark.parametrize("mounts", [("reflink", "xfs")], indirect=True, ids=["reflink-xfs"])
def test_cp_inside_a_reflink_mount_shares_blocks(mounted: Mounted) -> None:
    mounted.path("original").write_bytes(os.urandom(1 << 20))
    tool("cp", mounted.path("original"), mounted.path("copy"))
    assert mounted.state("copy") == "shared"
    assert share_blocks(mounted.below("original"), mounted.below("copy"))
