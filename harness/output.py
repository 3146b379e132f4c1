"""What a script prints: it never ends the script, and an error is a line.

    output.protect()                  # by flags.Parser, before a script prints anything
    reason = output.in_a_line(error)
"""
import os
import sys
from contextlib import suppress

LOST = OSError, ValueError  # what cannot be written; a closed file raises ValueError


class Output:
    """A text stream, of which what cannot be written is left out: after the end of a
    pipe or a terminal, into a closed file, on a full disk. A letter that the encoding
    lacks is written as its number, "\\u6570"."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        try:
            self.stream.write(text)
        except UnicodeEncodeError:
            encoding = self.stream.encoding or "ascii"
            self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except LOST:
            pass
        return len(text)

    def flush(self):
        with suppress(*LOST):
            self.stream.flush()

    def isatty(self):
        try:
            return self.stream.isatty()
        except ValueError:  # it is closed
            return False

    def __getattr__(self, name):
        return getattr(self.stream, name)


def in_a_line(error, most=200):
    """Return what an exception says in a line of so many letters at most; the name of
    its class if it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def open_missing():
    """Open the streams that the process was started without, on the null device: no
    file of a run then takes the number of stdout or stderr."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


def protect():
    """Make an Output of stdout and stderr, if they are none yet."""
    open_missing()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, Output):
            setattr(sys, name, Output(stream))
