"""Puts a picture on a display through the kernel's mode setting interface, with its ioctls alone.

It owns the few structs of <drm/drm_mode.h> that this takes: a dumb buffer is made, mapped, filled,
and shown on the first connector that is connected.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os

READ_WRITE = 3 << 30
CONNECTED = 1
U8, U16, U32, U64 = ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64


def layout(name: str, *fields: tuple[str, object]) -> type[ctypes.Structure]:
    """A struct of the kernel's."""
    return type(name, (ctypes.Structure,), {"_fields_": list(fields)})


Mode = layout(
    "Mode", ("clock", U32), ("hdisplay", U16), ("rest1", U16 * 4), ("vdisplay", U16), ("rest2", U16 * 4),
    ("vrefresh", U32), ("flags", U32), ("type", U32), ("name", ctypes.c_char * 32),
)  # fmt: skip
Resources = layout(
    "Resources", ("fbs", U64), ("crtcs", U64), ("connectors", U64), ("encoders", U64),
    ("count_fbs", U32), ("count_crtcs", U32), ("count_connectors", U32), ("count_encoders", U32),
    ("limits", U32 * 4),
)  # fmt: skip
Connector = layout(
    "Connector", ("encoders", U64), ("modes", U64), ("props", U64), ("prop_values", U64),
    ("count_modes", U32), ("count_props", U32), ("count_encoders", U32), ("encoder_id", U32),
    ("connector_id", U32), ("type", U32), ("type_id", U32), ("connection", U32), ("mm_width", U32),
    ("mm_height", U32), ("subpixel", U32), ("pad", U32),
)  # fmt: skip
CreateDumb = layout(
    "CreateDumb", ("height", U32), ("width", U32), ("bpp", U32), ("flags", U32), ("handle", U32),
    ("pitch", U32), ("size", U64),
)  # fmt: skip
MapDumb = layout("MapDumb", ("handle", U32), ("pad", U32), ("offset", U64))
AddFb = layout(
    "AddFb", ("fb_id", U32), ("width", U32), ("height", U32), ("pitch", U32), ("bpp", U32), ("depth", U32),
    ("handle", U32),
)  # fmt: skip
SetCrtc = layout(
    "SetCrtc", ("connectors", U64), ("count_connectors", U32), ("crtc_id", U32), ("fb_id", U32), ("x", U32),
    ("y", U32), ("gamma_size", U32), ("mode_valid", U32), ("mode", Mode),
)  # fmt: skip
NUMBERS = {
    Resources: 0xA0, SetCrtc: 0xA2, Connector: 0xA7, AddFb: 0xAE, CreateDumb: 0xB2, MapDumb: 0xB3,
}  # fmt: skip


class Display:
    """The first connected display of /dev/dri/card`number`."""

    def __init__(self, number: int) -> None:
        self._fd = os.open(f"/dev/dri/card{number}", os.O_RDWR | os.O_CLOEXEC)

    def _do(self, request: ctypes.Structure) -> None:
        number = READ_WRITE | ctypes.sizeof(request) << 16 | ord("d") << 8 | NUMBERS[type(request)]
        fcntl.ioctl(self._fd, number, request)

    def frame(self, picture: bytes, width: int, height: int) -> int:
        """A frame buffer with `picture`: rows of blue, green, red and an unused byte for each pixel."""
        buffer = CreateDumb(height=height, width=width, bpp=32)
        self._do(buffer)
        assert buffer.pitch == width * 4
        place = MapDumb(handle=buffer.handle)
        self._do(place)
        with mmap.mmap(self._fd, buffer.size, offset=place.offset) as view:
            view[: len(picture)] = picture
        made = AddFb(width=width, height=height, pitch=buffer.pitch, bpp=32, depth=24, handle=buffer.handle)
        self._do(made)
        return int(made.fb_id)

    def show(self, picture: bytes, width: int, height: int) -> None:
        """Set a mode of the picture's size and show it."""
        crtc, connector, mode = self._find(width, height)
        connectors = (U32 * 1)(connector)
        self._do(
            SetCrtc(
                connectors=ctypes.addressof(connectors), count_connectors=1, crtc_id=crtc,
                fb_id=self.frame(picture, width, height), mode_valid=1, mode=mode,
            )
        )  # fmt: skip

    def _find(self, width: int, height: int) -> tuple[int, int, ctypes.Structure]:
        """A CRTC, a connected connector, and its mode of this size."""
        crtcs, connectors, encoders = (U32 * 16)(), (U32 * 16)(), (U32 * 16)()
        found = Resources(
            crtcs=ctypes.addressof(crtcs), connectors=ctypes.addressof(connectors),
            encoders=ctypes.addressof(encoders), count_crtcs=16, count_connectors=16, count_encoders=16,
        )  # fmt: skip
        self._do(found)
        for connector in connectors[: found.count_connectors]:
            for mode in self._modes(connector):
                if (mode.hdisplay, mode.vdisplay) == (width, height):
                    return crtcs[0], connector, mode
        raise LookupError(f"no connected display has a mode of {width} x {height}")

    def _modes(self, connector: int) -> list[ctypes.Structure]:
        """The modes of a connector; the kernel looks for them when it is asked for none."""
        self._do(Connector(connector_id=connector))
        modes = (Mode * 128)()
        found = Connector(connector_id=connector, modes=ctypes.addressof(modes), count_modes=128)
        self._do(found)
        return list(modes[: found.count_modes]) if found.connection == CONNECTED else []
