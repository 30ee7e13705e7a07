"""What a task prints, on the caller's own streams."""

from __future__ import annotations

import codecs
import sys
from typing import Literal, TextIO


class Printer:
    """Writes a task's bytes to the stream that ``sys.stdout`` or ``sys.stderr`` is at that moment.

    A worker is not trusted with the user's terminal: there, its control
    characters are shown as pictures and do nothing. Files and pipes get all.
    """

    def __init__(self, name: Literal["stdout", "stderr"]) -> None:
        self._name = name
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")

    def write(self, data: bytes, *, final: bool = False) -> None:
        """Write *data* and flush; half a character waits for its other half."""
        text = self._decoder.decode(data, final)
        # None where Python runs without a console.
        stream: TextIO | None = getattr(sys, self._name)
        if not text or stream is None:
            return
        if stream.isatty():
            text = visible(text)
        encoding = getattr(stream, "encoding", None) or "utf-8"
        try:
            text.encode(encoding)
        except UnicodeEncodeError:
            text = text.encode(encoding, "backslashreplace").decode(encoding)
        stream.write(text)
        stream.flush()

    def close(self) -> None:
        """Write what waits for its other half."""
        self.write(b"", final=True)


_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n\r"}
_PICTURES |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def visible(text: str) -> str:
    """Return *text* with the control characters that can command a terminal made visible."""
    return text.translate(_PICTURES)
