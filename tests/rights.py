"""Gives up the rights of root, which may read and write everything, so that modes of files mean something."""

from __future__ import annotations

import ctypes
import os

_VERSION = 0x20080522  # of the structure below, with two words of 32 bits for each set


def drop_rights() -> None:
    """The process, or the one thread that calls it, keeps its user and loses every capability. No way back.

    Nothing happens where it is not root.
    """
    if os.geteuid():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(_VERSION, 0), (ctypes.c_uint32 * 6)()
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capabilities cannot be dropped")
