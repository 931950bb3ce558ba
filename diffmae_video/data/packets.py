"""What can be told of a stream from its packets alone: which are shown when, and which nothing refers to."""

from __future__ import annotations

from dataclasses import dataclass

import av


class Unusable(Exception):
    """A strategy met something it cannot be exact about."""


@dataclass
class StoredPacket:
    """A packet of the table that `Video` keeps, with what is asked of it often."""

    packet: av.Packet
    pts: int | None
    key: bool
    hidden: bool


def presentation(table: list[StoredPacket]) -> list[int] | None:
    """Places of the shown packets in display order, or None where times do not tell."""
    shown = [place for place, packet in enumerate(table) if not packet.hidden]
    if not shown or not table[0].key:
        return None
    stamps = [table[place].pts for place in shown]
    if any(stamp is None for stamp in stamps) or len(set(stamps)) != len(stamps):
        return None
    if any(packet.pts is None or packet.packet.is_corrupt for packet in table) or min(stamps) < table[0].pts:
        return None
    return [place for _, place in sorted(zip(stamps, shown, strict=True))]


def nal_length(codec: av.VideoCodecContext) -> int:
    """Bytes of the length field before each NAL unit of an H.264 stream in AVCC form; 0 for anything else."""
    extra = codec.extradata
    if codec.name != "h264" or not extra or len(extra) < 7 or extra[0] != 1:
        return 0
    return (extra[4] & 3) + 1


def is_unreferenced(packet: av.Packet, length: int) -> bool:
    """Whether no other frame refers to this H.264 packet (nal_ref_idc = 0 on its first slice; ITU-T H.264, 7.4.1)."""
    data = memoryview(packet)
    position = 0
    while position + length < len(data):
        header = data[position + length]
        if 1 <= header & 0x1F <= 5:
            return header & 0x60 == 0
        position += length + int.from_bytes(data[position : position + length], "big")
    return False


def is_hidden(codec: str, packet: av.Packet) -> bool:
    """VP8 keeps frames that are only referred to in packets of their own (RFC 6386, 9.1: show_frame)."""
    return codec in ("vp8", "libvpx") and packet.size > 0 and not memoryview(packet)[0] & 0x10


def has_turned_track(data: bytes) -> bool:
    """Whether any track header of an MP4 asks for a turn: its matrix is not the identity (ISO 14496-12, 8.3.2)."""
    start = 0
    while (at := data.find(b"tkhd", start)) >= 0:
        version = data[at + 4] if at + 4 < len(data) else 0
        matrix = data[at + 4 + (52 if version else 40) :][:36]
        if len(matrix) == 36 and matrix[:20] != _UPRIGHT:
            return True
        start = at + 4
    return False


_UPRIGHT = bytes.fromhex("00010000" + "00000000" * 3 + "00010000")
