"""Pictures that are the same without having the same bytes: found, named and judged, for who may know of them."""

import csv
import errno
import io
import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw, ImageOps

from tests.conftest import Mounts
from tests.mount.test_life import fuse_for_everybody  # noqa: F401 - a fixture
from tests.support import hostile, raws
from tests.support.flavours import ONE_FLAVOUR
from tests.support.mounted import Mounted, dedupfs
from tests.support.photos import photographs
from tests.support.tools import USER, attempt, needs_root, tool

pytestmark = pytest.mark.either_way


def picture(number: int = 0) -> Image.Image:
    image = ImageOps.exif_transpose(Image.open(photographs(number + 1, jpeg=True)[number])).convert("RGB")
    image.thumbnail((1200, 1200))
    return image


def jpeg(image: Image.Image, quality: int = 90, **how: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality, **how)
    return out.getvalue()


def camera_exif(time: str = "2026:01:02 03:04:05", fraction: str = "25") -> Image.Exif:
    exif = Image.Exif()
    exif[0x010F], exif[0x0110] = "Maker", "Model"
    camera = exif.get_ifd(0x8769)
    camera[0x9003], camera[0x9291] = time, fraction
    return exif


def similar_of(mounted: Mounted, path: str) -> dict[str, str]:
    """Relation by path, as the xattr says; its order is kept."""
    records = mounted.xattr(path, "similar").split(b"\0")[:-1]
    found = {}
    for record in records:
        relation, distance, other = record.split(b" ", 2)
        assert 0 <= int(distance) <= 256
        found[os.fsdecode(other)] = relation.decode()
    return found


def similar_by_attribute(mounted: Mounted) -> list[str]:
    return list(similar_of(mounted, "0.jpg"))


def similar_by_command(mounted: Mounted) -> list[str]:
    answer = mounted.run("similar", mounted.mountpoint, "0.jpg", "--json").json()
    return [found["path"] for found in answer["similar"]]


def errno_of(mounted: Mounted, path: str, name: str) -> int:
    with pytest.raises(OSError) as raised:
        mounted.xattr(path, name)
    assert raised.value.errno is not None
    return raised.value.errno


def write_family(mounted: Mounted, image: Image.Image) -> None:
    """An original of a camera, and what departments make of it."""
    for folder in ("camera", "web", "office"):
        mounted.path(folder).mkdir()
    original = jpeg(image, 95, exif=camera_exif())
    mounted.path("camera/original.jpg").write_bytes(original)
    mounted.path("web/copy.jpg").write_bytes(original)
    mounted.path("web/stripped.jpg").write_bytes(jpeg(image, 95))
    mounted.path("web/small.jpg").write_bytes(jpeg(image.resize((image.width // 2, image.height // 2)), 80))
    mounted.path("web/again.jpg").write_bytes(jpeg(image, 60))
    mounted.path("office/turned.jpg").write_bytes(jpeg(image.transpose(Image.Transpose.ROTATE_90), 85))
    marked = image.copy()
    side = min(image.size) // 4
    ImageDraw.Draw(marked).ellipse((side, side, 2 * side, 2 * side), fill="white", outline="black", width=side // 8)
    mounted.path("office/marked.jpg").write_bytes(jpeg(marked, 85))
    mounted.path("office/other.jpg").write_bytes(jpeg(picture(3), 85))


FAMILY = {
    "web/copy.jpg": "identical",
    "web/stripped.jpg": "metadata",
    "web/again.jpg": "recompressed",
    "web/small.jpg": "resized",
    "office/turned.jpg": "rotated",
    "office/marked.jpg": "annotated",
}


@ONE_FLAVOUR
def test_a_family(mounted: Mounted) -> None:
    write_family(mounted, picture())
    mounted.settle()
    assert similar_of(mounted, "camera/original.jpg") == FAMILY
    assert next(iter(similar_of(mounted, "camera/original.jpg"))) == "web/copy.jpg"
    assert similar_of(mounted, "office/other.jpg") == {}
    answer = mounted.run("similar", mounted.mountpoint, "camera/original.jpg", "--json").json()
    assert answer["path"] == "camera/original.jpg"
    assert {found["path"]: found["relation"] for found in answer["similar"]} == FAMILY
    evidence = {found["path"]: found["evidence"] for found in answer["similar"]}
    assert evidence["web/stripped.jpg"]["taken"] == ["2026-01-02T03:04:05.25", ""]
    assert evidence["office/turned.jpg"]["form"] == "turned left"
    assert evidence["office/marked.jpg"]["differing"]
    # and for people
    shown = mounted.run("similar", mounted.mountpoint, "camera/original.jpg").stdout
    assert [line.split()[0] for line in shown.splitlines()] == [found["relation"] for found in answer["similar"]]
    # in one group
    (group,) = mounted.run("groups", mounted.mountpoint, "--json").json()
    assert sorted(group["authoritative"]) == ["camera/original.jpg", "web/copy.jpg"]
    members = {path: member["relation"] for member in group["members"] for path in member["paths"]}
    assert members == {path: relation for path, relation in FAMILY.items() if relation != "identical"}
    (resized,) = mounted.run("groups", mounted.mountpoint, "--relation", "resized", "--json").json()
    assert [member["relation"] for member in resized["members"]] == ["resized"]


@ONE_FLAVOUR
def test_who_writes_and_then_asks_gets_the_answer(mounted: Mounted) -> None:
    """Without any settle."""
    image = picture()
    for number, quality in enumerate((90, 80, 70)):
        path = f"{number}.jpg"
        mounted.path(path).write_bytes(jpeg(image, quality))
        assert len(bytes.fromhex(mounted.xattr(path, "phash").decode())) == 32
        assert len(similar_of(mounted, path)) == number
    about = json.loads(mounted.xattr("0.jpg", "image"))
    assert about == {"format": "JPEG", "width": image.width, "height": image.height, "taken": None}


@ONE_FLAVOUR
@pytest.mark.parametrize("ask", [similar_by_attribute, similar_by_command])
def test_who_asks_hears_of_what_was_written_after_it(mounted: Mounted, ask: Callable[[Mounted], list[str]]) -> None:
    """Without any settle, and beside a file that is still being written."""
    image = picture()
    mounted.path("0.jpg").write_bytes(jpeg(image, 95))
    assert ask(mounted) == []
    with open(mounted.path("unfinished.jpg"), "wb") as unfinished:
        unfinished.write(jpeg(image, 80)[:5000])
        unfinished.flush()
        for number in range(1, 13):
            mounted.path(f"{number}.jpg").write_bytes(jpeg(image, 95 - number))
        assert len(ask(mounted)) == 12
        mounted.path("last.jpg").write_bytes(jpeg(image, 60))
        assert len(ask(mounted)) == 13


@ONE_FLAVOUR
def test_the_answers_outlive_a_restart_a_crash_and_the_index(mounted: Mounted) -> None:
    write_family(mounted, picture())
    mounted.settle()
    answers = {path: similar_of(mounted, path) for path in ("camera/original.jpg", "web/small.jpg")}
    described = mounted.status()["pictures_described"]
    assert described == 7
    mounted.restart()
    assert {path: similar_of(mounted, path) for path in answers} == answers
    mounted.kill()
    mounted.start()
    assert {path: similar_of(mounted, path) for path in answers} == answers
    mounted.unmount()
    mounted.run("rebuild", mounted.source)
    mounted.start()
    mounted.settle()
    assert mounted.status()["pictures_described"] == described
    assert {path: similar_of(mounted, path) for path in answers} == answers


@ONE_FLAVOUR
def test_the_backlog_outlives_a_kill_at_any_time(mounted: Mounted) -> None:
    image = picture()
    for number in range(20):
        mounted.path(f"{number}.jpg").write_bytes(jpeg(image.resize((300 + number, 200)), 85))
    mounted.run("settle", mounted.mountpoint, "--exact")
    mounted.kill()
    mounted.start()
    mounted.settle()
    status = mounted.status()
    assert (status["pictures_described"], status["pictures_waiting"]) == (20, 0)
    assert len(similar_of(mounted, "7.jpg")) == 19


@ONE_FLAVOUR
def test_what_changes_is_described_anew_and_what_goes_is_forgotten(mounted: Mounted) -> None:
    image = picture()
    for name, quality in (("one.jpg", 90), ("two.jpg", 70), ("three.jpg", 50)):
        mounted.path(name).write_bytes(jpeg(image, quality))
    assert set(similar_of(mounted, "three.jpg")) == {"one.jpg", "two.jpg"}
    mounted.path("two.jpg").rename(mounted.path("moved.jpg"))
    assert set(similar_of(mounted, "three.jpg")) == {"one.jpg", "moved.jpg"}
    mounted.path("one.jpg").write_bytes(jpeg(picture(3)))
    assert similar_of(mounted, "one.jpg") == {}
    assert set(similar_of(mounted, "three.jpg")) == {"moved.jpg"}
    mounted.path("moved.jpg").unlink()
    assert similar_of(mounted, "three.jpg") == {}
    mounted.path("three.jpg").write_bytes(b"no picture at all, but text")
    assert errno_of(mounted, "three.jpg", "phash") == errno.ENODATA
    assert mounted.status()["pictures_described"] == 1


@ONE_FLAVOUR
def test_cuts_are_found_beside_their_original(mounted: Mounted) -> None:
    image = picture()
    inner = image.crop((image.width // 5, image.height // 5, image.width, image.height))
    for folder in ("permit", "elsewhere"):
        mounted.path(folder).mkdir()
    mounted.path("permit/whole.jpg").write_bytes(jpeg(image))
    mounted.path("permit/other.jpg").write_bytes(jpeg(picture(3)))
    mounted.path("permit/cut.jpg").write_bytes(jpeg(inner))
    assert similar_of(mounted, "permit/cut.jpg") == {"permit/whole.jpg": "cropped"}
    answer = mounted.run("similar", mounted.mountpoint, "permit/whole.jpg", "--json").json()
    assert answer["similar"][0]["evidence"]["cut"]["width_percent"] in range(75, 126)


@ONE_FLAVOUR
def test_a_burst_is_a_sequence_and_no_duplicate(mounted: Mounted) -> None:
    image = picture()
    for number in range(4):
        exif = camera_exif(fraction=str(10 + number))
        mounted.path(f"frame-{number}.jpg").write_bytes(
            jpeg(image.point([min(255, v + number) for v in range(256)] * 3), 90, exif=exif)
        )
    mounted.settle()
    assert set(similar_of(mounted, "frame-0.jpg").values()) == {"sequence"}
    assert mounted.run("groups", mounted.mountpoint, "--json").json() == []
    (group,) = mounted.run("groups", mounted.mountpoint, "--relation", "sequence", "--json").json()
    assert len(group["members"]) == 3


@ONE_FLAVOUR
def test_finding_a_picture_from_outside(mounted: Mounted, mounts: Mounts) -> None:
    write_family(mounted, picture())
    mounted.settle()
    outside = mounts.directory("outside")
    (outside / "sent.jpg").write_bytes(jpeg(picture().resize((400, 300)), 70))
    answer = mounted.run("find", mounted.mountpoint, outside / "sent.jpg", "--json").json()
    assert {found["path"] for found in answer["similar"]} == {"camera/original.jpg", *FAMILY}
    (outside / "same.jpg").write_bytes(mounted.path("office/other.jpg").read_bytes())
    answer = mounted.run("find", mounted.mountpoint, outside / "same.jpg", "--json").json()
    assert [(found["relation"], found["path"]) for found in answer["similar"]] == [("identical", "office/other.jpg")]
    (outside / "text.jpg").write_bytes(b"no picture")
    for name in ("text.jpg", "nothing.jpg"):
        refused = mounted.run("find", mounted.mountpoint, outside / name, exit_code=None)
        assert refused.exit_code in (66, 71)
        assert refused.stderr.count("\n") == 1


@needs_root
@ONE_FLAVOUR
def test_only_paths_that_the_asker_may_see(mounted: Mounted) -> None:
    image = picture()
    for folder, mode in (("public", 0o755), ("secret", 0o700)):
        mounted.path(folder).mkdir()
        mounted.path(folder).chmod(mode)
    mounted.path("public/small.jpg").write_bytes(jpeg(image.resize((300, 200)), 80))
    mounted.path("public/smaller.jpg").write_bytes(jpeg(image.resize((200, 150)), 80))
    mounted.path("secret/large.jpg").write_bytes(jpeg(image, 95, exif=camera_exif()))
    mounted.settle()

    def asked_by(user: int | None, name: str) -> bytes:
        command = ["getfattr", "--only-values", "--absolute-names", f"--name=user.dedupfs.{name}"]
        return tool(*command, mounted.path("public/small.jpg"), user=user)

    assert b"secret/large.jpg\0" in asked_by(None, "similar")
    assert asked_by(USER, "similar").count(b"\0") == 1
    assert asked_by(USER, "similar").endswith(b" public/smaller.jpg\0")
    assert asked_by(None, "authoritative") == b"secret/large.jpg"
    refused = attempt("getfattr", "--name=user.dedupfs.authoritative", mounted.path("public/small.jpg"), user=USER)
    assert b"large" not in refused.stdout + refused.stderr
    # nor by the command line, which is the owner's
    for command in ("similar", "authoritative"):
        path = mounted.path("public/small.jpg")
        assert dedupfs(command, mounted.mountpoint, path, exit_code=None, user=USER).exit_code == 71


@ONE_FLAVOUR
def test_the_authoritative_version(mounted: Mounted) -> None:
    write_family(mounted, picture())
    mounted.settle()
    for path in ("camera/original.jpg", "web/small.jpg", "office/marked.jpg"):
        assert mounted.xattr(path, "authoritative") in (b"camera/original.jpg", b"web/copy.jpg")
    answer = mounted.run("authoritative", mounted.mountpoint, "web/small.jpg", "--json").json()
    assert answer["authoritative"] in ("camera/original.jpg", "web/copy.jpg")
    assert answer["why"][1] == {"criterion": "original", "value": "Maker Model"}
    lost = {path: other["lost_by"] for other in answer["others"] for path in other["paths"]}
    assert set(lost.values()) == {"original"}
    assert "web/stripped.jpg" in lost

    mounted.run("authoritative", mounted.mountpoint, "office/marked.jpg", "--pin")
    mounted.run("authoritative", mounted.mountpoint, "office/marked.jpg", "--note", "as filed with the permit")
    mounted.restart()
    answer = mounted.run("authoritative", mounted.mountpoint, "camera/original.jpg", "--json").json()
    assert (answer["authoritative"], answer["pinned"]) == ("office/marked.jpg", True)
    assert answer["notes"] == ["as filed with the permit"]
    # another one instead
    mounted.run("authoritative", mounted.mountpoint, "camera/original.jpg", "--pin")
    mounted.run("authoritative", mounted.mountpoint, "camera/original.jpg", "--unpin")
    mounted.run("authoritative", mounted.mountpoint, "camera/original.jpg", "--unpin", exit_code=64)
    history = mounted.run("authoritative", mounted.mountpoint, "camera/original.jpg", "--history", "--json").json()
    assert [(entry["action"], entry["before"]) for entry in history] == [
        ("pin", "not pinned"),
        ("note", ""),
        ("unpin", "pinned"),
        ("pin", "not pinned"),
        ("unpin", "pinned"),
    ]
    assert all(entry["who"] and entry["at"].endswith("Z") for entry in history)
    # decisions are no part of the index
    mounted.unmount()
    mounted.run("rebuild", mounted.source)
    mounted.start()
    again = mounted.run("authoritative", mounted.mountpoint, "camera/original.jpg", "--history", "--json").json()
    assert again == history


@ONE_FLAVOUR
def test_not_similar_for_good(mounted: Mounted) -> None:
    image = picture()
    for name, quality in (("one.jpg", 90), ("two.jpg", 70)):
        mounted.path(name).write_bytes(jpeg(image, quality))
    assert set(similar_of(mounted, "one.jpg")) == {"two.jpg"}
    mounted.run("not-similar", mounted.mountpoint, "two.jpg", "one.jpg")
    for _ in range(2):
        assert similar_of(mounted, "one.jpg") == similar_of(mounted, "two.jpg") == {}
        assert mounted.run("groups", mounted.mountpoint, "--json").json() == []
        mounted.restart()
    refused = mounted.run("not-similar", mounted.mountpoint, "one.jpg", "one.jpg", exit_code=64)
    assert "same bytes" in refused.stderr


@ONE_FLAVOUR
def test_conflicts(mounted: Mounted) -> None:
    image = picture()
    changed = image.copy()
    ImageDraw.Draw(changed).rectangle((60, 60, image.width // 3, image.height // 3), fill="black")
    for folder in ("one", "two", "three"):
        mounted.path(folder).mkdir()
    mounted.path("one/permit-17.jpg").write_bytes(jpeg(image, 95, exif=camera_exif()))
    mounted.path("two/scan.jpg").write_bytes(jpeg(changed, 90, exif=camera_exif()))
    mounted.path("three/unrelated-name.jpg").write_bytes(jpeg(changed, 70))
    mounted.path("three/permit-17.jpg").write_bytes(jpeg(image, 70))
    mounted.settle()
    (conflict,) = mounted.run("conflicts", mounted.mountpoint, "--json").json()
    assert sorted(conflict["paths"]) == [["one/permit-17.jpg"], ["two/scan.jpg"]]
    assert (conflict["relation"], conflict["claim"]) == ("annotated", "taken 2026-01-02T03:04:05.25 by Model")


def changed(image: Image.Image) -> Image.Image:
    copy = image.copy()
    ImageDraw.Draw(copy).rectangle((60, 60, image.width // 3, image.height // 3), fill="black")
    return copy


def conflicts_of(mounted: Mounted, path: str, user: int | None = None) -> list[str]:
    command = ["getfattr", "--only-values", "--absolute-names", "--name=user.dedupfs.conflicts"]
    records = tool(*command, mounted.path(path), user=user).split(b"\0")
    assert records.pop() == b""
    assert all(record.split(b" ", 2)[0] in (b"tone", b"annotated", b"cropped") for record in records)
    assert all(0 <= int(record.split(b" ", 2)[1]) <= 256 for record in records)
    return [record.split(b" ", 2)[2].decode() for record in records]


@ONE_FLAVOUR
@pytest.mark.mount_options(r"name_pattern=(?i)permit[-_ ]?(\d+-\d+)")
def test_conflicts_by_the_number_in_the_name(mounted: Mounted) -> None:
    image = picture()
    mounted.path("Permit 2026-17.jpg").write_bytes(jpeg(image))
    mounted.path("permit_2026-17_new.jpg").write_bytes(jpeg(changed(image)))
    mounted.path("permit-2026-18.jpg").write_bytes(jpeg(changed(image), 70))
    mounted.path("permit-2026-17 small.jpg").write_bytes(jpeg(image.resize((400, 300))))
    mounted.path("permit-2026-17 back.jpg").write_bytes(jpeg(picture(3)))  # another photograph of the same permit
    mounted.path("scan.jpg").write_bytes(jpeg(image, 50))
    assert conflicts_of(mounted, "scan.jpg") == []
    assert conflicts_of(mounted, "permit-2026-17 back.jpg") == []
    assert set(conflicts_of(mounted, "permit_2026-17_new.jpg")) == {"Permit 2026-17.jpg", "permit-2026-17 small.jpg"}
    assert conflicts_of(mounted, "Permit 2026-17.jpg") == ["permit_2026-17_new.jpg"]
    found = mounted.run("conflicts", mounted.mountpoint, "--json").json()
    assert {conflict["claim"] for conflict in found} == {"numbered 2026-17"}
    assert len(found) == 2
    # what a copy is called counts as well, and so does what is called otherwise now
    mounted.path("permit-2026-18 too.jpg").write_bytes(mounted.path("scan.jpg").read_bytes())
    mounted.settle()
    assert conflicts_of(mounted, "scan.jpg") == ["permit-2026-18.jpg"]
    mounted.path("permit-2026-18 too.jpg").unlink()
    mounted.path("scan.jpg").rename(mounted.path("PERMIT2026-17"))
    assert conflicts_of(mounted, "PERMIT2026-17") == ["permit_2026-17_new.jpg"]
    mounted.run("not-similar", mounted.mountpoint, "PERMIT2026-17", "permit_2026-17_new.jpg")
    assert conflicts_of(mounted, "PERMIT2026-17") == []


@needs_root
@ONE_FLAVOUR
def test_conflicts_that_the_asker_may_know_of(mounted: Mounted) -> None:
    """Neither files that he may not see, nor what such files are called."""
    image = picture()
    for folder, mode in (("public", 0o755), ("secret", 0o700)):
        mounted.path(folder).mkdir()
        mounted.path(folder).chmod(mode)
    one, other = jpeg(image), jpeg(changed(image))
    mounted.path("public/one.jpg").write_bytes(one)
    mounted.path("public/other.jpg").write_bytes(other)
    mounted.path("secret/permit-17.jpg").write_bytes(one)
    mounted.path("secret/one.jpg").write_bytes(other)
    assert conflicts_of(mounted, "public/one.jpg") == ["public/other.jpg", "secret/one.jpg"]
    assert conflicts_of(mounted, "public/one.jpg", USER) == []
    assert conflicts_of(mounted, "public/other.jpg", USER) == []
    mounted.path("public/permit-17.jpg").write_bytes(other)
    mounted.settle()
    assert conflicts_of(mounted, "public/one.jpg", USER) == []
    mounted.path("public/copy").mkdir()
    mounted.path("public/copy/permit-17.jpg").write_bytes(one)
    mounted.settle()
    assert conflicts_of(mounted, "public/one.jpg", USER) == ["public/other.jpg", "public/permit-17.jpg"]


@ONE_FLAVOUR
def test_preferred_folders_decide_last(mounted: Mounted) -> None:
    image = picture()
    for folder in ("a", "scans", "originals"):
        mounted.path(folder).mkdir()
        path = mounted.path(folder, "one.jpg")
        path.write_bytes(jpeg(image, 80, comment=folder.encode()))
        os.utime(path, ns=(10**18, 10**18))
    mounted.path("a/copy.jpg").write_bytes(mounted.path("originals/one.jpg").read_bytes())
    os.utime(mounted.path("a/copy.jpg"), ns=(10**18, 10**18))
    mounted.settle()
    mounted.restart("share=reference", "prefer=originals/", "prefer=scans")
    answer = mounted.run("authoritative", mounted.mountpoint, "a/one.jpg", "--json").json()
    assert answer["authoritative"] == "originals/one.jpg"
    assert answer["why"][-1] == {"criterion": "preferred", "value": "originals"}
    lost = {other["paths"][0]: (other["lost_by"], other["value"]) for other in answer["others"]}
    assert lost == {"a/one.jpg": ("preferred", "in no preferred folder"), "scans/one.jpg": ("preferred", "scans")}
    # what was there earlier comes before
    os.utime(mounted.path("a/one.jpg"), ns=(10**17, 10**17))
    assert mounted.xattr("scans/one.jpg", "authoritative") == b"a/one.jpg"


@ONE_FLAVOUR
def test_groups_for_a_spreadsheet_that_runs_no_name(mounted: Mounted) -> None:
    image = picture()
    names = [b"=cmd|' !A0.jpg", b"+1.jpg", b"-2.jpg", b"@SUM(A1).jpg", "＝1.jpg".encode(), b"'=1.jpg"]
    names += [b'a","b\n=1.jpg', b"\t=1.jpg", b"\r=1.jpg", b"\xff=1.jpg", "\u202egpj.exe".encode(), b"plain.jpg"]
    mounted.path("camera.jpg").write_bytes(jpeg(image, 95, exif=camera_exif()))
    for number, name in enumerate(names):
        mounted.path(name).write_bytes(jpeg(image, 60 + number))
    mounted.settle()
    told = mounted.run("groups", mounted.mountpoint, "--csv").stdout
    head, *rows = csv.reader(io.StringIO(told, newline=""))
    assert head == ["group", "relation", "distance", "path"]
    assert rows[0] == ["1", "authoritative", "0", "camera.jpg"]
    assert len(rows) == 1 + len(names)
    assert {row[0] for row in rows} == {"1"}
    assert {row[1] for row in rows[1:]} == {"recompressed"}
    assert all(row[2].isdecimal() for row in rows)
    cells = [row[3] for row in rows]
    assert all(cell.isprintable() and cell[0] not in "=+-@\t\r＝＋－＠" for cell in cells)
    assert {"'=cmd|' !A0.jpg", "'+1.jpg", "'-2.jpg", "'@SUM(A1).jpg", "'＝1.jpg", "plain.jpg"} <= set(cells)
    mounted.run("groups", mounted.mountpoint, "--csv", "--json", exit_code=64)


@ONE_FLAVOUR
def test_pictures_of_phones_and_cameras(mounted: Mounted) -> None:
    image = picture()
    for name, kind in (("phone.heic", "HEIF"), ("phone.avif", "AVIF"), ("sent.jpg", "JPEG")):
        out = io.BytesIO()
        image.save(out, kind, quality=80, exif=camera_exif())
        mounted.path(name).write_bytes(out.getvalue())
    for kind, make in raws.ALL.items():
        mounted.path(f"camera.{kind}").write_bytes(make(image))
    mounted.settle()
    formats = {name: json.loads(mounted.xattr(name, "image"))["format"] for name in ("phone.heic", "camera.nef")}
    assert formats == {"phone.heic": "HEIF", "camera.nef": "RAW"}
    others = {"phone.avif", "sent.jpg", *(f"camera.{kind}" for kind in raws.ALL)}
    assert set(similar_of(mounted, "phone.heic")) == others
    assert set(similar_of(mounted, "phone.heic").values()) <= {"recompressed", "resized"}
    answer = mounted.run("authoritative", mounted.mountpoint, "sent.jpg", "--json").json()
    assert answer["authoritative"].startswith("camera.")


@needs_root
@ONE_FLAVOUR
@pytest.mark.usefixtures("fuse_for_everybody")
def test_a_mount_of_an_ordinary_user_describes_as_well(mounts: Mounts) -> None:
    mounted = mounts.new(user=USER).start()
    command = ["sh", "-c", 'cat >"$1"', "sh"]
    for number, quality in enumerate((90, 70)):
        tool(*command, mounted.path(f"{number}.jpg"), user=USER, stdin=jpeg(picture(), quality))
    mounted.settle()
    status = mounted.status()
    assert (status["pictures_described"], status["pictures_reason"]) == (2, "")
    answer = mounted.run("similar", mounted.mountpoint, "0.jpg", "--json").json()
    assert [(found["path"], found["relation"]) for found in answer["similar"]] == [("1.jpg", "recompressed")]
    for kind in ("HEIF", "AVIF"):
        tool(*command, mounted.path(kind), user=USER, stdin=hostile.sound(kind))
    mounted.settle()
    assert mounted.status()["pictures_described"] == 4
    workers = _workers_of(mounted.pid)
    assert len(workers) == 2  # one for comparing
    # Not in a chroot, nor where a distribution forbids it.
    may_be_alone = attempt("unshare", "--user", "--net", "true", user=USER).returncode == 0
    for worker in workers:
        rights = Path(f"/proc/{worker}/status").read_text()
        assert "CapEff:\t0000000000000000" in rights
        assert "Seccomp:\t2" in rights
        is_alone = os.stat(f"/proc/{worker}/ns/net").st_ino != os.stat("/proc/self/ns/net").st_ino
        assert is_alone == may_be_alone


@ONE_FLAVOUR
def test_a_mount_that_is_read_only_answers_what_it_can(mounted: Mounted) -> None:
    mounted.path("one.jpg").write_bytes(jpeg(picture()))
    mounted.settle()
    mounted.restart("share=reference", "ro")
    assert errno_of(mounted, "one.jpg", "phash") == errno.ENODATA
    refused = mounted.run("similar", mounted.mountpoint, "one.jpg", exit_code=69)
    assert "read-only" in refused.stderr
    assert mounted.status()["pictures_described"] == 1


# --- hostile files


@ONE_FLAVOUR
def test_malformed_pictures_leave_the_mount_serving_and_their_bytes_intact(mounted: Mounted) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    written: dict[str, bytes] = dict(hostile.malformed(220, seed))
    for name, data in written.items():
        mounted.path(name).write_bytes(data)
    good = jpeg(picture())
    mounted.path("good.jpg").write_bytes(good)
    mounted.settle()
    for name, data in written.items():
        assert mounted.path(name).read_bytes() == data, name
    status = mounted.status()
    assert status["pictures_waiting"] == 0
    assert status["pictures_undescribable"] > 40
    assert mounted.xattr("good.jpg", "phash")
    about = json.loads(mounted.xattr("only-the-magic.jpg", "image"))
    assert about["undescribable"]
    assert errno_of(mounted, "only-the-magic.jpg", "phash") == errno.ENODATA
    refused = mounted.run("similar", mounted.mountpoint, "bomb.png", exit_code=66)
    assert "cannot be described" in refused.stderr
    shown = mounted.run("status", mounted.mountpoint).stdout
    assert f"{status['pictures_undescribable']} undescribable" in shown


@needs_root
@ONE_FLAVOUR
def test_no_worker_is_started_for_what_is_no_picture(mounted: Mounted) -> None:
    for number in range(5):
        mounted.path(f"{number}.txt").write_bytes(b"%d" % number * 5000)
    mounted.settle()
    mounted.restart()
    mounted.path("letter.pdf").write_bytes(b"%PDF-1.7")
    mounted.settle()
    assert _workers_of(mounted.pid) == []
    mounted.path("one.jpg").write_bytes(jpeg(picture()))
    mounted.settle()
    assert len(_workers_of(mounted.pid)) == 1
    mounted.restart()
    mounted.settle()
    assert similar_of(mounted, "one.jpg") == {}
    assert _workers_of(mounted.pid) == []


@needs_root
@ONE_FLAVOUR
def test_workers_that_are_killed_cost_no_picture(mounted: Mounted) -> None:
    image = picture()
    killed: set[int] = set()
    for number in range(8):
        path = f"{number}.jpg"
        mounted.path(path).write_bytes(jpeg(image.resize((300 + number, 200)), 85))
        assert mounted.xattr(path, "phash")
        workers = _workers_of(mounted.pid)
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        killed.update(workers)
    assert len(killed) == 8 + 7  # the first picture is compared with nothing
    assert len(similar_of(mounted, "7.jpg")) == 7
    status = mounted.status()
    assert (status["pictures_described"], status["pictures_reason"]) == (8, "")


def _workers_of(pid: int) -> list[int]:
    """The processes that describe for this daemon."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and b"dedupfs.describer" in (entry / "cmdline").read_bytes():
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                found += [int(entry.name)] if parent == pid else []
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found
