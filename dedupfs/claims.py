"""What a file's name claims of the photograph in it: a number (of a permit, say) that a configured pattern finds. Pure.

Names are whatever somebody called a file, and the pattern is whatever an administrator thought of: the two together
must not keep the daemon busy. RE2 takes time in proportion to the length of a name, for any pattern; what cannot be had
so (references back, looking around) it refuses. The only importer of it.
"""

import os

from .errors import UsageError

_LONGEST_PATTERN = 1000


class NamePattern:
    """A regular expression of RE2's with one group. Any thread."""

    def __init__(self, text: str) -> None:
        """Raises UsageError with what is wrong with it, in one line."""
        import re2  # a large library, and most commands and mounts do without

        if len(text) > _LONGEST_PATTERN:
            raise UsageError(f"name_pattern may have {_LONGEST_PATTERN} characters, and has {len(text):,}")
        options = re2.Options()
        options.log_errors = False
        try:
            self._pattern = re2.compile(text, options)
        except UnicodeEncodeError:
            raise UsageError(f"name_pattern={text!r} is no text") from None
        except re2.error as error:
            reason = error.args[0]
            words = reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
            raise UsageError(f"name_pattern={text} is no regular expression: {words}") from None
        if self._pattern.groups != 1:
            raise UsageError(
                f"name_pattern={text} has {self._pattern.groups} groups; put parentheses around the one number, and "
                "(?:…) around the rest"
            )

    def number_in(self, path: bytes) -> str:
        """What the group finds in the last part of a path, in lower case; "" where there is nothing."""
        found = self._pattern.search(os.path.basename(path).decode(errors="replace"))
        return (found.group(1) or "").lower() if found is not None else ""
