"""Ordinary programs at work in the mount: they do there what they do on the filesystem below it."""

import os
import shutil
from pathlib import Path

import pytest

from tests.conftest import Mounts
from tests.support.blocks import is_reference, share_blocks
from tests.support.flavours import BOTH_STRATEGIES, ONE_FLAVOUR, REFERENCES
from tests.support.mounted import Mounted
from tests.support.photos import photographs
from tests.support.tools import attempt, differences, shell, tool
from tests.support.trees import make_tree, photograph, shared_copies, shared_state


@pytest.fixture
def plain(mounts: Mounts) -> Path:
    """An empty directory on the same filesystem, that dedupfs has nothing to do with."""
    return mounts.directory("plain")


# --- editing one of three copies: $1 is the file, $2 a picture of other content


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
    "reserve": 'fallocate --keep-size --length 9M "$1"',
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


@pytest.mark.parametrize("script", EDITORS.values(), ids=[name.replace(" ", "-") for name in EDITORS])
def test_editing_one_copy_leaves_the_others_alone(mounted: Mounted, plain: Path, script: str) -> None:
    picture, other = photograph(), photographs(24)[-1]
    assert picture.read_bytes() != other.read_bytes()
    paths = shared_copies(mounted, picture)
    expected = plain / "picture.jpg"
    shutil.copyfile(picture, expected)

    shell(script, plain, expected, other)
    shell(script, mounted.path(), paths[1], other)

    assert paths[1].read_bytes() == expected.read_bytes() != picture.read_bytes() or script == EDITORS["reserve"]
    assert paths[0].read_bytes() == paths[2].read_bytes() == picture.read_bytes()
    mounted.settle()
    assert mounted.duplicates(paths[0])[-1:] == [b"office/picture.jpg"] * (script == EDITORS["reserve"]) or [
        b"archive/picture.jpg"
    ]
    mounted.restart()
    assert paths[1].read_bytes() == expected.read_bytes()
    assert paths[0].read_bytes() == paths[2].read_bytes() == picture.read_bytes()
