"""A cable that is slow: passes frames between two network devices on, each a while later.

    python3 slow_link.py ONE OTHER MILLISECONDS [PERCENT LOST]

Each frame waits so long, in each direction.  For kernels that have no netem.  As root, in the
namespace of both devices; `cluster.sh link` starts it there.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import random
import select
import socket
import struct
import sys
import time

ETHERNET = 0x0003  # all protocols
SIOCETHTOOL = 0x8946
OFFLOADS = (0x17, 0x1F, 0x24)  # checksums, and larger frames than the cable's, of who sends


def plug(name: str) -> socket.socket:
    """Return a socket that sends and hears each frame of a device."""
    plugged = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETHERNET))
    plugged.bind((name, 0))
    return plugged


def send_whole(name: str) -> None:
    """Let the kernel finish each frame before it leaves `name`: no device will do it later."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for command in OFFLOADS:
            value = ctypes.create_string_buffer(struct.pack("II", command, 0))
            request = struct.pack("16sP", name.encode(), ctypes.addressof(value))
            fcntl.ioctl(any_socket, SIOCETHTOOL, request)


def main() -> None:
    """Pass frames on until this process is killed."""
    one, other = plug(sys.argv[1]), plug(sys.argv[2])
    delay, lost = float(sys.argv[3]) / 1000, float([*sys.argv, "0"][4]) / 100
    ways = {one: other, other: one}
    on_the_way: list[tuple[float, int, socket.socket, bytes]] = []
    number = 0  # of the frame: none overtakes another
    while True:
        wait = max(0.0, on_the_way[0][0] - time.monotonic()) if on_the_way else None
        for end in select.select(list(ways), [], [], wait)[0]:
            frame, sender = end.recvfrom(1 << 17)
            if sender[2] != socket.PACKET_OUTGOING and random.random() >= lost:
                number += 1
                heapq.heappush(on_the_way, (time.monotonic() + delay, number, ways[end], frame))
        while on_the_way and on_the_way[0][0] <= time.monotonic():
            _, _, end, frame = heapq.heappop(on_the_way)
            end.send(frame)


if __name__ == "__main__":
    if sys.argv[1] == "--whole":
        send_whole(sys.argv[2])
    else:
        main()
