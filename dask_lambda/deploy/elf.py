"""Shared libraries without what only debuggers and linkers read.  May import: nothing.  Pure.

An ELF file is described twice: by segments, which is what the loader maps, and by sections, which
is what linkers and debuggers read.  Symbol tables for debuggers are in sections that no segment
covers, at the end of the file.  So the file may end where its last segment ends, if its header then
says that there are no sections (Tool Interface Standard, Executable and Linking Format 1.2, chapter
2: "Files used during linking must have a section header table; other object files may or may not").
"""

from __future__ import annotations

import struct

_MAGIC = b"\x7fELF\x02\x01"  # 64 bits, little-endian
_HEADER = 64
_SHARED = 3  # e_type ET_DYN
_SEGMENT = struct.Struct("<IIQQQQQQ")


def strip(library: bytes) -> bytes:
    """Return a library without its sections; what is no 64-bit shared library stays as it is.

    Parameters
    ----------
    library : bytes
        A whole file.
    """
    if len(library) < _HEADER or not library.startswith(_MAGIC):
        return library
    (kind,) = struct.unpack_from("<H", library, 16)
    (table,) = struct.unpack_from("<Q", library, 32)
    entry, count = struct.unpack_from("<HH", library, 54)
    end = table + entry * count
    if kind != _SHARED or not count or entry != _SEGMENT.size or end > len(library):
        return library
    for number in range(count):
        segment = _SEGMENT.unpack_from(library, table + entry * number)
        end = max(end, segment[2] + segment[5])  # offset, size in the file
    if end > len(library):
        return library
    header = bytearray(library[:_HEADER])
    struct.pack_into("<Q", header, 40, 0)  # e_shoff
    struct.pack_into("<HHH", header, 58, 0, 0, 0)  # e_shentsize, e_shnum, e_shstrndx
    return bytes(header) + library[_HEADER:end]
