"""Whether a file claims to be a picture, by its first bytes; its name says nothing."""

HEAD_BYTES = 32
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")


def looks_like_picture(head: bytes) -> bool:
    """Whether a file that begins with these bytes claims to be a picture of a format that is known."""
    return (
        head.startswith(_MAGIC)
        or (head.startswith(b"BM") and head[6:10] == bytes(4))
        or (head.startswith(b"RIFF") and head[8:12] == b"WEBP")
        or (head[4:8] == b"ftyp" and head[8:12] in _BRANDS)
    )
