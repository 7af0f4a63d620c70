"""Photographs for tests: real ones where there are any, else pictures that look like them to a program.

Real ones come from the directory in DEDUPFS_PHOTOS, or from where scripts/photos keeps them. Every picture returned has
a content of its own.
"""

import atexit
import functools
import hashlib
import os
import random
import shutil
import tempfile
import warnings
from pathlib import Path

from PIL import Image

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_SMALLEST_BYTES = 4096  # smaller files are not shared


def photographs(count: int, *, jpeg: bool = False) -> list[Path]:
    """The `count` smallest photographs, smallest first, all of different content; read-only for the tests.

    With `jpeg`, only ones that are sound JPEG files, for tools that are particular.
    """
    real = _sound_jpegs() if jpeg else _real()
    chosen = list(real[:count])
    return chosen + [_generated(number) for number in range(count - len(chosen))]


def real_count() -> int:
    """How many real photographs there are; beyond them `photographs` makes its own."""
    return len(_real())


def _directory() -> Path:
    named = os.environ.get("DEDUPFS_PHOTOS")
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "dedupfs" / "photos"


@functools.cache
def _real() -> tuple[Path, ...]:
    by_size: list[tuple[int, Path]] = []
    for directory, _, names in os.walk(_directory()):
        for name in names:
            path = Path(directory, name)
            if path.suffix.lower() in _SUFFIXES and path.is_file():
                by_size.append((path.stat().st_size, path))
    seen = set()
    distinct = []
    for size_bytes, path in sorted(by_size):
        content = hashlib.sha256(path.read_bytes()).digest()
        if size_bytes >= _SMALLEST_BYTES and content not in seen:
            seen.add(content)
            distinct.append(path)
    return tuple(distinct)


@functools.cache
def _sound_jpegs() -> tuple[Path, ...]:
    return tuple(path for path in _real() if _is_sound_jpeg(path))


def _is_sound_jpeg(path: Path) -> bool:
    try:
        with warnings.catch_warnings(), Image.open(path, formats=["JPEG"]) as image:
            warnings.simplefilter("ignore")
            image.load()
            return image.format == "JPEG"
    except (OSError, SyntaxError, ValueError):
        return False


@functools.cache
def _generated_directory() -> Path:
    path = Path(tempfile.mkdtemp(prefix="dedupfs-pictures."))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    path.chmod(0o755)
    return path


@functools.cache
def _generated(number: int) -> Path:
    """A JPEG of 60 to 400 KB with noise and EXIF, always the same for the same number."""
    noise = random.Random(number)
    width, height = 320 + 16 * (number % 40), 240 + 12 * (number % 40)
    coarse = Image.frombytes("RGB", (width // 8, height // 8), noise.randbytes(3 * (width // 8) * (height // 8)))
    fine = Image.frombytes("RGB", (width, height), noise.randbytes(3 * width * height))
    picture = Image.blend(coarse.resize((width, height), Image.Resampling.BICUBIC), fine, 0.3)
    exif = Image.Exif()
    exif[0x0110] = "dedupfs test camera"
    exif[0x0132] = f"2026:01:01 {number // 3600 % 24:02d}:{number // 60 % 60:02d}:{number % 60:02d}"
    path = _generated_directory() / f"generated-{number:04d}.jpg"
    picture.save(path, "JPEG", quality=90, exif=exif)
    return path
