"""The README inside a store: what the directory is, and how to get the files back where there is no dedupfs.

For a person who finds an archive years from now. What it needs of the on-disk format (docs/format.md) is what the
format promises not to change within its version. The loop in it is tested as it is printed.
"""

_TEXT = """\
This directory belongs to dedupfs, a filesystem that stores files of equal bytes once.

The directory above it is an archive. Some of its files are ordinary ones. Others are only REFERENCES: they have the
right name, owner and time, and the right length, but read as zeros; their bytes are in .dedupfs/blobs, each content
once. Do not write to references, and do not delete anything in here, before all files are whole again.

With dedupfs, "dedupfs mount SOURCE MOUNTPOINT" shows all files as they are, and "dedupfs leave SOURCE" makes each of
them an ordinary file, proves it, and removes this directory.

Without dedupfs, a shell can do it, with the programs getfattr and setfattr (package attr) and those of GNU coreutils.
A reference carries an extended attribute, @NAME@, that names its blob: after a version, flags, a collision
number and the size come the 16 bytes of the digest (XXH3-128). Make sure that nothing is mounted there, and that there
is room for all copies; go to the directory of the archive (the one that holds .dedupfs), as @MAKER@;
and paste this as it is:

@LOOP@
It can be interrupted and run again. Each file that it restores is a new one with the same bytes as its blob; hard links
between references become separate files. When a second run says nothing, all files are whole, and this directory is
not needed any more:

    chattr -R -f -i .dedupfs; rm -r .dedupfs
"""

_LOOP = r"""
find . -xdev -path ./.dedupfs -prune -o -type f -exec sh -c '
for file do
    record=$(getfattr --absolute-names -h -e hex -n @NAME@ "$file" 2>/dev/null |
        sed -n "s/^@NAME@=0x//p")
    [ -n "$record" ] || continue
    part() { printf %s "$record" | cut -c "$1"; }
    digest=$(part 25-56) size=$((0x$(part 9-24)))
    blob=.dedupfs/blobs/$(part 25-26)/$digest.$((0x$(part 5-8)))
    copy=${file%/*}/.dedupfs-copy.$$
    if [ ${#record} -ne 88 ] || [ "$(part 1-2)" != 01 ]; then
        echo "NOT restored, its record is of another version: $file"
    elif [ "$(part 3-4)" = 00 ] && [ ! -s "$file" ]; then
        setfattr -x @NAME@ "$file" && echo "restored: $file"
    elif [ "$(part 3-4)" = 00 ] && { [ "$(stat -c %s "$file")" -ne "$size" ] ||
        [ "$(tr -d "\\000" <"$file" | head -c 1 | wc -c)" -ne 0 ]; }; then
        echo "NOT restored, something has written to it: $file"
    elif cat "$blob" >"$copy" && cmp -s "$blob" "$copy" && [ "$(stat -c %s "$copy")" -eq "$size" ] &&
        cp --attributes-only --preserve=all "$file" "$copy" && chmod u+w "$copy" &&
        setfattr -x @NAME@ "$copy" && chmod --reference="$file" "$copy" && touch -r "$file" "$copy" &&
        sync "$copy" && mv -f "$copy" "$file"; then
        echo "restored: $file"
    else
        rm -f "$copy"
        echo "NOT restored: $file"
    fi
done' sh {} +
"""


def readme(reference_xattr: str) -> str:
    """The text for a store whose references are in this xattr."""
    loop = "".join(f"    {line}".rstrip() + "\n" for line in _LOOP.strip().splitlines())
    maker = "root" if reference_xattr.startswith("trusted.") else "the user whose files they are"
    return _TEXT.replace("@LOOP@", loop).replace("@NAME@", reference_xattr).replace("@MAKER@", maker)
