"""`dedupfs diff`: what it writes, what it refuses, and that no picture is decoded where there are rights to lose."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.conftest import Mounts
from tests.mount.test_pictures import jpeg, picture
from tests.support import hostile
from tests.support.flavours import ONE_FLAVOUR
from tests.support.mounted import REPOSITORY, Mounted, dedupfs
from tests.support.tools import USER, needs_root

pytestmark = pytest.mark.either_way


def write_two(mounted: Mounted) -> tuple[Path, Path]:
    image = picture()
    marked = image.copy()
    ImageDraw.Draw(marked).rectangle((60, 60, image.width // 3, image.height // 3), fill="black")
    mounted.path("one.jpg").write_bytes(jpeg(image))
    mounted.path("other.jpg").write_bytes(jpeg(marked, 75))
    return mounted.path("one.jpg"), mounted.path("other.jpg")


@ONE_FLAVOUR
def test_both_and_where_they_differ(mounted: Mounted, mounts: Mounts) -> None:
    one, other = write_two(mounted)
    output = mounts.directory("outside") / "diff.png"
    answer = mounted.run("diff", one, other, "-o", output, "--json").json()
    assert (answer["output"], answer["relation"]) == (str(output), "annotated")
    assert answer["evidence"]["differing"]
    with Image.open(output) as sheet:
        assert (sheet.format, sheet.size) == ("PNG", (answer["width"], answer["height"]))
        panel = (sheet.width - 2 * 16) // 3
        across, down = 2 * (panel + 16) + panel // 5, sheet.height // 5
        marked = np.asarray(sheet)[down, across]
        assert marked[0] > 150
        assert marked[1:].max() < 80
    # two that have nothing in common are shown all the same
    mounted.path("third.jpg").write_bytes(jpeg(picture(3)))
    shown = mounted.run("diff", one, mounted.path("third.jpg"), "-o", mounted.path("third.png")).stdout
    assert "two different pictures" in shown
    assert Image.open(io.BytesIO(mounted.path("third.png").read_bytes())).format == "PNG"


@ONE_FLAVOUR
def test_what_exists_is_not_overwritten(mounted: Mounted) -> None:
    one, other = write_two(mounted)
    before = other.read_bytes()
    refused = mounted.run("diff", one, other, "-o", other, exit_code=64)
    assert refused.stderr.count("\n") == 1
    assert "not overwritten" in refused.stderr
    assert other.read_bytes() == before
    link = mounted.path("link.png")
    link.symlink_to("nowhere.png")
    mounted.run("diff", one, other, "-o", link, exit_code=64)
    assert not mounted.path("nowhere.png").exists()


@ONE_FLAVOUR
def test_what_cannot_be_compared_leaves_nothing_behind(mounted: Mounted) -> None:
    one, _ = write_two(mounted)
    output = mounted.path("diff.png")
    bad = {"text.jpg": b"no picture", **dict(hostile.malformed(12, 5)), "empty": b""}
    for name, data in bad.items():
        mounted.path(name).write_bytes(data)
        told = mounted.run("diff", one, mounted.path(name), "-o", output, exit_code=None)
        if told.exit_code == 0:  # damaged, and still a picture
            output.unlink()
            continue
        assert (told.exit_code, told.stderr.count("\n")) == (66, 1), told
        assert f"{name} cannot be described" in told.stderr
        assert not output.exists()
    for path in (mounted.path("missing"), mounted.mountpoint):
        told = mounted.run("diff", path, one, "-o", output, exit_code=None)
        assert told.exit_code in (66, 71)
        assert told.stderr.count("\n") == 1
    os.mkfifo(mounted.path("fifo"))
    mounted.run("diff", mounted.path("fifo"), one, "-o", output, exit_code=66)
    mounted.run("diff", one, one, "-o", mounted.path("no/such/place.png"), exit_code=71)
    mounted.run("diff", one, one, exit_code=64)
    assert not output.exists()


@needs_root
@ONE_FLAVOUR
def test_with_the_rights_of_who_asks(mounted: Mounted, mounts: Mounts) -> None:
    one, other = write_two(mounted)
    outside = mounts.directory("outside")
    outside.chmod(0o777)
    assert dedupfs("diff", one, other, "-o", outside / "diff.png", user=USER).exit_code == 0
    assert (outside / "diff.png").stat().st_uid == USER
    other.chmod(0o600)
    refused = dedupfs("diff", one, other, "-o", outside / "second.png", exit_code=71, user=USER)
    assert "Permission denied" in refused.stderr
    assert not (outside / "second.png").exists()


@ONE_FLAVOUR
def test_no_decoder_is_loaded_by_who_asks(mounted: Mounted) -> None:
    one, other = write_two(mounted)
    script = (
        "import sys; from dedupfs.cli import main; code = main(sys.argv[1:]);"
        "sys.exit(code or any(name.split('.')[0] in ('PIL', 'imagehash', 'pillow_heif') for name in sys.modules))"
    )
    command = [sys.executable, "-c", script, "diff", str(one), str(other), "-o", str(mounted.path("diff.png"))]
    assert subprocess.run(command, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, check=False).returncode == 0


@ONE_FLAVOUR
def test_it_needs_no_mount(mounts: Mounts) -> None:
    outside = mounts.directory("outside")
    (outside / "a.jpg").write_bytes(jpeg(picture()))
    told = dedupfs("diff", outside / "a.jpg", outside / "a.jpg", "-o", outside / "d.png").stdout
    assert told == f"{outside}/d.png: metadata, 0\n"
