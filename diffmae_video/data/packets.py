"""What can be told of a stream from its packets alone: which are shown when, and which nothing refers to."""

from __future__ import annotations

import av


class Unusable(Exception):
    """A strategy met something it cannot be exact about."""


class PacketTable:
    """Every packet of a stream in decode order, as columns (an object for each costs as much as decoding a frame)."""

    def __init__(self, packets: list[av.Packet], codec: str):
        self.packets = packets
        self.pts = [packet.pts for packet in packets]
        self.keys = [place for place, packet in enumerate(packets) if packet.is_keyframe]
        self.hidden = {place for place, packet in enumerate(packets) if packet.is_discard}
        self.corrupt = any(packet.is_corrupt for packet in packets)
        if codec in ("vp8", "libvpx"):
            self.hidden |= {place for place, packet in enumerate(packets) if _is_hidden_vp8(packet)}

    def presentation(self) -> list[int] | None:
        """Places of the shown packets in display order, or None where times do not tell."""
        shown = [place for place in range(len(self.pts)) if place not in self.hidden]
        pts = [stamp for stamp in self.pts if stamp is not None]
        if not shown or not self.keys or self.keys[0] != 0 or self.corrupt or len(pts) < len(self.pts):
            return None
        stamps = {pts[place] for place in shown}
        if len(stamps) != len(shown) or min(stamps) < pts[0]:
            return None
        return sorted(shown, key=pts.__getitem__)


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


def has_orientation(data: bytes, codec: str) -> bool:
    """Whether the first packet of an MP4 holds a display orientation message (SEI 47; ITU-T H.264, D.1, H.265, D.2).

    NAL units are taken to have lengths of four bytes; with others the answer is no, as it nearly always is.
    """
    position = 0
    while position + 6 < len(data):
        size, header = int.from_bytes(data[position : position + 4], "big"), data[position + 4]
        body = position + 5 if codec == "h264" else position + 6
        if (header & 0x1F == 6) if codec == "h264" else (header >> 1 & 0x3F in (39, 40)):
            end = min(position + 4 + size, len(data))
            while body + 2 < end:  # messages of one unit: type, size, payload
                kind, length = data[body], data[body + 1]
                if kind == 47:
                    return True
                if 255 in (kind, length):
                    break
                body += 2 + length
        position += 4 + size
    return False


def _is_hidden_vp8(packet: av.Packet) -> bool:
    """VP8 keeps frames that are only referred to in packets of their own (RFC 6386, 9.1: show_frame)."""
    return packet.size > 0 and not memoryview(packet)[0] & 0x10


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


def needs_dolby_vision(data: bytes) -> bool:
    """Whether the picture of an MP4 means something only to Dolby Vision (profiles 5 and 10.0).

    That is told by the box of its configuration: a number of 0 for the standard that the picture itself follows
    (Dolby Vision Streams within the ISO Base Media File Format, 3.2). All other profiles are HDR10, HLG or SDR too.
    """
    for name in (b"dvcC", b"dvvC", b"dvwC"):
        at = data.find(b"\0\0\0\x20" + name)  # the box has 32 bytes
        if at >= 0 and len(data) > at + 12 and data[at + 8] == 1:
            return data[at + 12] >> 4 == 0
    return False


_UPRIGHT = bytes.fromhex("00010000" + "00000000" * 3 + "00010000")
