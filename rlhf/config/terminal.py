"""Text on its way to people: nothing in it steers their terminal, and a stream that is gone never ends a run."""

import atexit
import contextlib
import io
import os
import re
import select
import sys
import threading
import time
from typing import Any, TextIO

# Control characters but for tab and line feed, what separates lines elsewhere, what turns the direction of the text
# around it, and halves of characters, which no encoding has.
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def shown(text: str) -> str:
    """The text as it may be shown: what would steer a terminal is written as an escape such as \\x1b.

    Tabs and line breaks stay. What is shown already stays as it is.
    """
    return _STEERING.sub(lambda found: _escape(found[0]), text.replace("\r\n", "\n"))


def shown_json(text: str) -> str:
    """The same for a JSON text in one line, whose meaning stays: JSON's own escapes begin with \\u."""
    return _STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def shown_name(name: object) -> str:
    r"""A name or a path on one line: what cannot be printed stands as an escape, such as \n or \xff."""
    text = str(name)
    if text.isprintable() and text.isascii():
        return text
    return "".join(_one_line(character) for character in text)


def _one_line(character: str) -> str:
    if character.isprintable():
        return character
    if "\udc80" <= character <= "\udcff":  # A byte that is no UTF-8, as Python keeps it.
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


class Outlet:
    """Writes to a descriptor without waiting for who reads there: a pager that rests, a terminal that is held.

    What nobody takes for a second waits for them. Of more than a mebibyte of it the rest is left out, and what is left
    out is told. A descriptor that is closed, or whose disk is full, takes everything.
    """

    patience = 1.0  # Seconds that a write waits, where nothing waits already.
    last_patience = 10.0  # The same at the process's end.
    _MOST = 1 << 20
    _PIECE = 256  # Bytes for which there is room where a descriptor says that it can be written to.

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._waiting = bytearray()
        self._left_out = 0
        self._stuck = False
        self._lock = threading.RLock()  # Signals' handlers write, too.

    def write(self, content: bytes) -> None:
        """Take bytes, and write them as soon as there is room."""
        with self._lock:
            if self._left_out or (self._waiting and len(self._waiting) + len(content) > self._MOST):
                self._left_out += len(content)
            else:
                self._waiting += content
            self.flush()

    def flush(self, *, patience: float | None = None) -> None:
        """Write what waits, with `patience` in seconds for the next bytes to be taken; the rest goes on waiting."""
        wait = (0.0 if self._stuck else self.patience) if patience is None else patience
        with self._lock:
            refused = 0
            while self._waiting and refused < 1000 and self._room(wait):
                try:
                    written = os.write(self._descriptor, self._waiting[: self._PIECE])
                except BlockingIOError:  # Of a descriptor that does not block, which had less room than it said.
                    time.sleep(0.001)
                    refused += 1
                    continue
                except OSError:
                    self._waiting.clear()
                    self._left_out = 0
                    return
                del self._waiting[:written]
                if not self._waiting and self._left_out:
                    told = f"\n[{self._left_out} bytes that nobody took are left out here]\n"
                    self._waiting += told.encode("ascii")
                    self._left_out = 0

    def _room(self, wait: float) -> bool:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        self._stuck = not poll.poll(1000 * wait)
        return not self._stuck


class Screen(io.TextIOBase):
    """A stream to people. It escapes what is written, and an encoding that lacks a character is no error.

    With `lasting` writing never fails nor waits for long: a closed terminal, a pipe that nobody reads and a full disk
    do not end or hold up a run that has trained for days. What cannot be written is left out.
    """

    def __init__(self, stream: TextIO, *, lasting: bool) -> None:
        self._stream = stream
        self._ignored: tuple[type[Exception], ...] = (OSError, ValueError) if lasting else ()
        self._outlet: Outlet | None = None
        if lasting:
            with contextlib.suppress(OSError, ValueError):
                self._outlet = Outlet(stream.fileno())
                stream.flush()

    def write(self, text: str) -> int:
        """Write a text, escaped. A carriage return at either end is let through: progress bars need it."""
        body = text.strip("\r")
        before, _, after = text.partition(body) if body else (text, "", "")
        self.steer(f"{before}{shown(body)}{after}")
        return len(text)

    def steer(self, text: str) -> None:
        """Write a text of this program as it is, with its own colours and movements of the cursor."""
        if self._outlet is not None:
            self._outlet.write(text.encode(self._stream.encoding or "ascii", "backslashreplace"))
            return
        with contextlib.suppress(*self._ignored):
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding or "ascii"
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def flush(self) -> None:
        """Pass on what is buffered, if somebody takes it."""
        if self._outlet is not None:
            self._outlet.flush()
            return
        with contextlib.suppress(*self._ignored):
            self._stream.flush()

    def let_go(self) -> None:
        """Pass on what is buffered before the process ends."""
        if self._outlet is not None:
            self._outlet.flush(patience=Outlet.last_patience)

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        try:
            return self._stream.isatty()
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:
        """The descriptor below."""
        return self._stream.fileno()

    def writable(self) -> bool:
        """Always."""
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The stream's encoding."""
        return self._stream.encoding or "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        """What becomes of characters that the encoding lacks."""
        return "backslashreplace"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def close(self) -> None:
        """Leave the stream open: it is the process's."""


def steer(stream: TextIO, text: str) -> None:
    """Write a text of this program's own, control sequences included, to any stream."""
    if isinstance(stream, Screen):
        stream.steer(text)
    else:
        stream.write(text)


def guard_output(*, lasting: bool = True) -> None:
    """Make this process's standard streams safe: see `Screen`. Calling it again does nothing.

    `lasting` is whether the process goes on where nobody takes what it says.
    """
    # A file opened later must not get the number of a closed standard stream, and what is printed to that.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    if isinstance(sys.stdout, Screen) and isinstance(sys.stderr, Screen):
        return
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, Screen):
            nothing = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
            setattr(sys, name, Screen(stream or nothing, lasting=lasting))
    atexit.register(_let_go)


def _let_go() -> None:
    """Before the interpreter ends and complains: give what nobody takes to nobody."""
    for screen in (sys.stdout, sys.stderr):
        if isinstance(screen, Screen):
            screen.let_go()
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is None:
            continue
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
