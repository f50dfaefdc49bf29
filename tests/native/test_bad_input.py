"""What bad input gets: one line that names it and its cure, status 2, and nothing left behind.

Every row of the tables is a real `pyvmm` process in a directory of its own, which holds a
good kernel `vmlinux` (it powers off at once), and what the row's `make` adds to it; what
`--force` allows is refused without it and taken with it.  In one file because the tables are
read as one list: what is not in it, nobody has tried.
"""

from __future__ import annotations

import os
import pathlib
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack, closing, contextmanager

import pytest

pytest.importorskip("pyvmm._native", reason="the compiled core is not built")

from fakes import kernels, program

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("need_kvm")]

GIB = 1 << 30
QUIET = ("--console", "off")
HEADER = struct.Struct("=3I")


# -- what a row finds in its directory -----------------------------------------------------


def file(name, data):
    def make(folder):
        (folder / name).write_bytes(data)

    return make


def sparse(name, size):
    def make(folder):
        with (folder / name).open("wb") as target:
            target.truncate(size)

    return make


def directory(name):
    return lambda folder: (folder / name).mkdir()


def fifo(name):
    return lambda folder: os.mkfifo(folder / name)


def all_of(*makers):
    def make(folder):
        return [maker(folder) for maker in makers]

    return make


def qcow2(version=3, backing=0, cluster_bits=16, size=1 << 20):
    """A qcow2 header with nothing behind it."""
    head = struct.pack(">4sIQIIQIIQQIIQQQQII", b"QFI\xfb", version, backing, 0, cluster_bits, size, 0, 1,
                       0x30000, 0x10000, 1, 0, 0, 0, 0, 0, 4, 104)  # fmt: skip
    return head.ljust(512, b"\0")


def locked(name):
    """An image that another process has open."""

    def make(folder):
        import fcntl

        sparse(name, 1 << 20)(folder)
        image = (folder / name).open("rb+")
        fcntl.flock(image, fcntl.LOCK_EX)
        return image

    return make


class Peer:
    """A socket at `name` whose every client gets to know `behave(connection)`."""

    def __init__(self, path, behave, kind=socket.SOCK_STREAM):
        self._stack = ExitStack()
        self._listener = self._stack.enter_context(socket.socket(socket.AF_UNIX, kind))
        self._listener.bind(os.path.relpath(path))
        self._behave = behave
        self._thread = None
        if kind == socket.SOCK_STREAM:
            self._listener.listen(4)
            self._thread = threading.Thread(target=self._serve, daemon=True)
            self._thread.start()

    def _serve(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._stack.enter_context(connection)
            try:
                self._behave(connection)
            except OSError:
                continue  # the program hung up first

    def close(self):
        if self._thread is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._thread.join()
        self._stack.close()


def peer(behave, kind=socket.SOCK_STREAM, name="s"):
    return lambda folder: Peer(folder / name, behave, kind)


def say(data):
    return lambda connection: connection.sendall(data)


def nothing(connection):
    """Accept and keep silent."""


def hang_up(connection):
    connection.recv(1)
    connection.shutdown(socket.SHUT_RDWR)


def http(connection):
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
    connection.shutdown(socket.SHUT_RDWR)


def backend(**answers):
    """A backend without protocol features but with these replies (by request number)."""

    def behave(connection):
        while head := connection.recv(12, socket.MSG_WAITALL):
            request, _, size = HEADER.unpack(head)
            if size:
                connection.recv(size, socket.MSG_WAITALL)
            if request in replies:
                connection.sendall(HEADER.pack(request, 5, 8) + struct.pack("=Q", replies[request]))

    replies = {1: 1 << 32 | 1 << 30, 15: 1, **{int(key[1:]): value for key, value in answers.items()}}
    return behave


def dead_socket(folder):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.path.relpath(folder / "dead"))


# -- kernels -------------------------------------------------------------------------------

ARM64 = b"\0" * 0x38 + b"ARM\x64" + b"\0" * 0x100
PE = b"MZ".ljust(0x1000, b"\0")
UNKNOWN_PAYLOAD = kernels.bzimage(b"\xde\xad\xbe\xef" * 300)
SHORT_BZIMAGE = kernels.bzimage(kernels.payload(kernels.elf(), "gzip"))[:-500]
BROKEN_GZIP = kernels.bzimage(b"\x1f\x8b\x08\x00" + b"\x55" * 600 + struct.pack("<I", 0x4000))

KERNELS = [
    ("missing", None, r"No such file or directory; a readable file is needed"),
    ("empty", file("k", b""), r"is empty; a vmlinux or bzImage is needed"),
    ("text", file("k", b"hello world\n" * 99), r"is no kernel that is known here; a vmlinux .* is needed"),
    ("script", file("k", b"#!/bin/sh\n"), r"is a script; a vmlinux or bzImage is needed"),
    ("directory", directory("k"), r"is a directory; a readable file is needed"),
    ("fifo", fifo("k"), r"is a pipe; a readable file is needed"),
    ("arm64", file("k", ARM64), r"is an AArch64 Image; this host needs a kernel for x86-64"),
    ("efi", file("k", PE), r"is an EFI program.*; a vmlinux or bzImage is needed"),
    ("gzip", file("k", b"\x1f\x8b\x08" + bytes(99)), r"is compressed by itself; unpack it"),
    ("elf-arm", file("k", kernels.elf(machine=183)), r"is for AArch64; this host needs one for x86-64"),
    ("elf-unknown", file("k", kernels.elf(machine=999)), r"is for machine 999; this host needs one for x86"),
    ("elf-object", file("k", kernels.elf(kind=1)), r"is no executable; vmlinux itself is needed"),
    ("elf-header", file("k", kernels.elf()[:40]), r"ELF header is cut off; is the file complete"),
    ("elf-short", file("k", kernels.elf()[:0x1100]), r"a segment ends at byte \d+ of \d+; is the file compl"),
    ("elf-nothing", file("k", kernels.elf([])), r"has nothing to load; a vmlinux executable is needed"),
    ("elf-entry", file("k", kernels.elf(entry=0x4000_0000)), r"its entry 0x40000000 lies outside"),
    ("elf-32", file("k", kernels.elf(bits=32)), r"no known entry; build it with CONFIG_PVH=y"),
    ("elf-low", file("k", kernels.elf([(0x1000, b"x", 0x1000)])), r"wants to lie at 0x1000; below 0x100000"),
    ("elf-high", file("k", kernels.elf([(0x2000_0000, b"x", 0x1000)])), r"give at least --memory size=\d+M"),
    ("bz-short", file("k", SHORT_BZIMAGE), r"bzImage is cut off; is the file complete"),
    ("bz-unknown", file("k", UNKNOWN_PAYLOAD), r"payload begins with de ad be ef, which is no compression"),
    ("bz-broken", file("k", BROKEN_GZIP), r"its gzip payload is damaged: .*"),
    ("bz-no-elf", file("k", kernels.bzimage(kernels.payload(b"x" * 999, "gzip"))), r"ELF"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), [pytest.param(*row[1:], id=row[0]) for row in KERNELS])
def test_kernel(tmp_path, make, message):
    refuses(tmp_path, make, ("--kernel", "k", *QUIET), rf"kernel k: .*{message}")


# -- options -------------------------------------------------------------------------------

GENERIC = "--generic-vhost-user"
TWENTY = "x" * 20

OPTIONS = [
    # the command line itself
    ("no-kernel", "--cmdline x", r"--kernel is missing: name a vmlinux or bzImage"),
    ("unknown-option", "--kernle vmlinux", r"unknown option --kernle; did you mean '--kernel'"),
    ("unknown-short", "-x", r"unknown option -x .see pyvmm boot --help"),
    ("unknown-command", "bot", r"unknown command 'bot'; did you mean 'boot'"),
    ("word", "boot vmlinux", r"unexpected word 'vmlinux'.*--help"),
    ("run-word", "run uname", r"unexpected word 'uname'.*-- uname"),
    ("no-value", "--kernel", r"--kernel needs a value: --kernel FILE"),
    ("switch-value", "--force=1", r"--force takes no value"),
    ("twice", "-k --kernel vmlinux", r"--kernel is given twice"),
    ("dashes", "-k -- ls", r"nothing can follow '--'"),
    ("protocol", "-k --protocol xen", r"--protocol: 'xen': one of auto, pvh, linux64, bzimage is needed"),
    ("protocol-elf", "-k --protocol bzimage", r"kernel vmlinux: is an ELF file.*use auto"),
    ("cmdline", "-k --cmdline " + "x" * 3000, r"--cmdline: 3000 bytes; Linux takes at most 2047"),
    ("deadline", "-k --deadline soon", r"--deadline: 'soon': a number of seconds above 0 is needed"),
    ("timeout", "-k --connect-timeout -1", r"--connect-timeout: '-1': a number of seconds above 0"),
    ("loss", "-k --on-backend-loss panic", r"--on-backend-loss=panic: one of reconnect, stop, fail"),
    ("no-loss", "-k --on-backend-loss=", r"--on-backend-loss: an empty value; --on-backend-loss .* needed"),
    ("no-initramfs", "-k --initramfs=", r"--initramfs: an empty value; --initramfs FILE is needed"),
    ("patience", "-k --reconnect-timeout 0", r"--reconnect-timeout: '0': a number of seconds above 0"),
    ("ages", "-k --deadline 1e10", r"--deadline: '1e10': a number of seconds .*, and at most 1000000000"),
    ("nan", "-k --deadline nan", r"--deadline: 'nan': a number of seconds above 0"),
    # processors and memory
    ("cpus-0", "-k --cpus boot=0", r"--cpus: boot=0: 1 to 32 virtual CPUs are possible"),
    ("cpus-33", "-k --cpus boot=33", r"--cpus: boot=33: 1 to 32"),
    ("cpus-huge", "-k --cpus boot=" + "9" * 5000, r"--cpus: boot=9+\S*: "),
    ("cpus-text", "-k --cpus boot=two", r"--cpus: boot=two: a number is needed, such as 2"),
    ("cpus-bare", "-k --cpus 4", r"--cpus: unknown key '4'; the keys are boot, max"),
    ("cpus-key", "-k --cpus bot=4", r"--cpus: unknown key 'bot'; did you mean 'boot'"),
    ("mem-small", "-k --memory size=4M", r"--memory: .*16M to 512G is possible"),
    ("mem-0", "-k --memory size=0", r"--memory: .*16M to 512G is possible"),
    ("mem-odd", "-k --memory size=100000001", r"--memory: .*not a multiple of the page size, 4096"),
    ("mem-absurd", "-k --memory size=90000G", r"--memory: .*16M to 512G is possible"),
    ("mem-unit", "-k --memory size=1T", r"--memory: size=1T: a size is needed: .* such as 512M"),
    ("mem-shared", "-k --memory size=1G,shared=off", r"--memory: shared=off.*use shared=on"),
    ("mem-toggle", "-k --memory size=1G,hugepages=maybe", r"--memory: hugepages=maybe: on or off is needed"),
    ("mem-prefault", "-k --memory size=500G,prefault=on", r"--memory: .*prefault.*host"),
    # consoles
    ("serial", "-k --serial ttyS0", r"--serial: 'ttyS0': off, null, tty, pty, file=PATH or socket=PATH is"),
    ("console", "--kernel vmlinux --console file=", r"--console: 'file=': off, null, tty"),
    ("both-tty", "--kernel vmlinux --serial tty", r"--serial tty: the terminal is --console's; give --con"),
    ("serial-nothing", '-k --serial socket=""', r"--serial: 'socket=\"\"': off, null, tty, pty, file=PATH"),
    ("serial-dir", "-k --serial file=.", r"--serial: \.: Is a directory; a writable file is needed"),
    ("serial-where", "-k --serial file=no/where", r"--serial: no/where: No such file.*a writable file"),
    ("serial-fifo", "-k --serial file=pipe", r"--serial: pipe: nobody is at its other end; a wri",
     fifo("pipe")),
    ("serial-kernel", "-k --serial file=vmlinux", r"--serial: vmlinux: is the file of --kernel; write to"),
    ("console-kernel", "--kernel vmlinux --console file=./vmlinux", r"--console: ./vmlinux: is the file of"),
    ("serial-disk", "-k --disk path=d --serial file=d", r"--serial: d: is the file of --disk; write to",
     sparse("d", 1 << 20)),
    ("serial-initramfs", "-k --initramfs i --serial file=i", r"--serial: i: is the file of --initramfs",
     file("i", b"x")),
    ("trace-kernel", "-k --trace vhost-user=vmlinux", r"--trace: vmlinux: is the file of --kernel"),
    ("trace-serial", "-k --serial file=l --trace vhost-user=l", r"--trace: l: is the file of --serial"),
    ("display-kernel", f"-k {GENERIC} socket=s,device_type=gpu,display=vmlinux", r"display=: vmlinux: is"),
    ("socket-long", "-k --serial socket=" + TWENTY * 6, r"--serial: .* longer than 107 bytes"),
    ("socket-long-2", "--kernel vmlinux --console socket=" + TWENTY * 6, r"--console: .* longer than 107"),
    ("socket-where", "-k --serial socket=no/where", r"--serial: cannot listen at no/where: No such file"),
    ("socket-file", "-k --serial socket=vmlinux", r"--serial: cannot listen at vmlinux: .* in use.*another"),
    ("socket-live", "-k --serial socket=s", r"--serial: .*s: .*another path", peer(nothing)),
    # initramfs
    ("initramfs-missing", "-k --initramfs i", r"initramfs i: No such file.*; a readable file is needed"),
    ("initramfs-empty", "-k --initramfs i", r"initramfs i: is empty; leave", file("i", b"")),
    ("initramfs-dir", "-k --initramfs i", r"initramfs i: is a directory", directory("i")),
    ("initramfs-large", "-k --initramfs i", r"initramfs i: .* do not fit .*--memory size=",
     sparse("i", GIB)),
    # generic devices
    ("type-unknown", f"-k {GENERIC} socket=s,device_type=foo", r"type 'foo'; pyvmm devices lists them"),
    ("type-near", f"-k {GENERIC} socket=s,device_type=blcok", r"'blcok'; did you mean 'block'"),
    ("type-0", f"-k {GENERIC} socket=s,virtio_id=0", r"device type 0: 1 to 63 are possible"),
    ("type-64", f"-k {GENERIC} socket=s,virtio_id=64", r"device type 64: 1 to 63 are possible"),
    ("type-huge", f"-k {GENERIC} socket=s,virtio_id=" + "9" * 5000, r"--generic-vhost-user: device type"),
    ("type-iommu", f"-k {GENERIC} socket=s,virtio_id=iommu", r"iommu is impossible: "),
    ("type-none", f"-k {GENERIC} socket=s", r"device_type= is missing"),
    ("socket-none", f"-k {GENERIC} device_type=fs", r"exactly one of socket=, fd= and exec= is needed"),
    ("exec-none", f"-k {GENERIC} device_type=fs,exec=/no/such{{fd}}",
     r"--generic-vhost-user: exec=/no/such{fd}: /no/such{fd} cannot be started: No such file .*; name one "),
    ("key-near", f"-k {GENERIC} soket=s,device_type=fs", r"unknown key 'soket'; did you mean 'socket'"),
    ("quote", f'-k {GENERIC} socket="s,device_type=fs', r"quote is not closed"),
    ("bracket", f"-k {GENERIC} socket=s,device_type=fs,queue_sizes=[1", r"bracket is not closed"),
    ("queues-few", f"-k {GENERIC} socket=s,device_type=fs,queue_sizes=[512]",
     r"fs needs at least 2 queues, 1 given; .*--force"),
    ("queues-odd", f"-k {GENERIC} socket=s,device_type=console,queue_sizes=[8,8,8]", r"an even number"),
    ("queues-size", f"-k {GENERIC} socket=s,device_type=fs,queue_sizes=[512,500]",
     r"queue size 500: a power of two from 1 to 32768 is needed"),
    ("queues-list", f"-k {GENERIC} socket=s,device_type=fs,queue_sizes=[a]", r"queue_sizes=\[a\]: a number"),
    ("queues-many", f"-k {GENERIC} socket=s,device_type=fs,queue_sizes=[{'2,' * 300}2]",
     r"301 queues; a device has 1 to 256"),
    ("config-hex", f"-k {GENERIC} socket=s,device_type=fs,config=xyz", r"config=xyz: .*give hex, @FILE or"),
    ("config-file", f"-k {GENERIC} socket=s,device_type=fs,config=@no", r"config=@no: .*No such file"),
    ("config-dir", f"-k {GENERIC} socket=s,device_type=fs,config=@.", r"config=@\.: is a directory; give"),
    ("config-fifo", f"-k {GENERIC} socket=s,device_type=fs,config=@p", r"config=@p: is a pipe", fifo("p")),
    ("config-field", f"-k {GENERIC} socket=s,device_type=fs,config=[tga=x]", r"did you mean 'tag'"),
    ("config-width", f"-k {GENERIC} socket=s,device_type=vsock,config=[guest_cid=x]",
     r"guest_cid=x is no number of 8 bytes"),
    ("config-open", f"-k {GENERIC} socket=s,device_type=fs,config=[tag=x]y", r"config=.*; give hex, @FILE"),
    ("config-long", f"-k {GENERIC} socket=s,device_type=fs,config=@big",
     r"config=@big: is longer than 4096 bytes", file("big", bytes(5000))),
    ("config-long-hex", f"-k {GENERIC} socket=s,device_type=fs,config={'00' * 5000}", r"longer than 4096"),
    # sockets of generic devices
    ("absent", f"-k {GENERIC} socket=s,device_type=fs --connect-timeout 0.3",
     r"socket s: does not exist \(waited 0.3 s\); start the backend or mend the path"),
    ("nobody", f"-k {GENERIC} socket=dead,device_type=fs --connect-timeout 0.3",
     r"socket dead: nobody listens there \(waited 0.3 s\); start the backend", dead_socket),
    ("socket-regular", f"-k {GENERIC} socket=vmlinux,device_type=fs", r"socket vmlinux: is not a socket"),
    ("socket-directory", f"-k {GENERIC} socket=.,device_type=fs", r"socket \.: is not a socket"),
    ("socket-dgram", f"-k {GENERIC} socket=s,device_type=fs", r"socket s: is no stream socket; vhost-user ",
     peer(nothing, socket.SOCK_DGRAM)),
    ("socket-too-long", f"-k {GENERIC} socket={TWENTY * 6},device_type=fs", r"longer than 107 bytes"),
    ("http", f"-k {GENERIC} socket=s,device_type=fs", r"no vhost-user dialogue with s: .*is a vhost-user b",
     peer(http)),
    ("garbage", f"-k {GENERIC} socket=s,device_type=fs", r"no vhost-user dial", peer(say(bytes(range(99))))),
    ("zeros", f"-k {GENERIC} socket=s,device_type=fs", r"no vhost-user dial", peer(say(bytes(64)))),
    ("silence", f"-k {GENERIC} socket=s,device_type=fs --deadline 0.5",
     r"no vhost-user dialogue with s: GET_FEATURES: it did not answer in time", peer(nothing)),
    ("hangs-up", f"-k {GENERIC} socket=s,device_type=fs", r"no vhost-user dialogue", peer(hang_up)),
    ("limit", f"-k {GENERIC} socket=s,device_type=fs,queue_sizes=[8,8,8]",
     r"3 queues, but the backend has 2; give at most 2 queue sizes", peer(backend(_15=1, _17=2))),
    ("fd-closed", f"-k {GENERIC} fd=77,device_type=fs", r"fd 77: .*; pass a connected Unix stream socket"),
    ("fd-file", f"-k {GENERIC} fd=0,device_type=fs", r"fd 0: .*; pass a connected Unix stream socket"),
    ("fd-huge", f"-k {GENERIC} fd=99999999999,device_type=fs", r"fd 99999999999: .*; pass a connected Unix"),
    ("same-socket", f"-k {GENERIC} socket=s,device_type=rng {GENERIC} socket=s,device_type=rng",
     r"socket s: .*two devices", peer(backend())),
    ("kernel-first", f"--kernel no --console off {GENERIC} socket=s,device_type=fs --connect-timeout 50",
     r"kernel no: No such file"),
    # disks
    ("disk-missing", "-k --disk path=d", r"--disk: path=d: No such file or directory"),
    ("disk-none", "-k --disk readonly=on", r"--disk: path= is missing"),
    ("disk-dir", "-k --disk path=.", r"--disk: path=\.: .*; name an image file"),
    ("disk-dir-ro", "-k --disk path=.,readonly=on", r"--disk: path=\.: .*; name an image file"),
    ("disk-fifo", "-k --disk path=p", r"--disk: path=p: .*; name an image file", fifo("p")),
    ("disk-fifo-ro", "-k --disk path=p,readonly=on", r"--disk: path=p: .*; name an image file", fifo("p")),
    ("disk-chr", "-k --disk path=/dev/zero,readonly=on", r"--disk: path=/dev/zero: .*; name an image file"),
    ("disk-empty", "-k --disk path=d", r"--disk: path=d: is empty", file("d", b"")),
    ("disk-type", "-k --disk path=vmlinux,image_type=vmware", r"--disk: image_type=vmware: .*raw.*qcow2"),
    ("disk-not-qcow2", "-k --disk path=vmlinux,image_type=qcow2", r"not in qcow2 format"),
    ("disk-corrupt", "-k --disk path=d", r"disk d: .* Unsupported cluster size",
     file("d", qcow2(cluster_bits=60))),
    ("disk-backing", "-k --disk path=d", r"path=d: a qcow2 image that refers to another file; .*image_type=",
     file("d", qcow2(backing=104))),
    ("disk-locked", "-k --disk path=d", r"path=d: another machine uses it; end that, or", locked("d")),
    ("disk-twice", "-k --disk path=d --disk path=d", r"path=d: .*(another|two)", sparse("d", 1 << 20)),
    ("disk-queues", "-k --disk path=vmlinux,num_queues=0", r"num_queues=0: 1 to 256 is possible"),
    ("disk-queue", "-k --disk path=vmlinux,queue_size=100", r"queue size 100: a power of two"),
    # file systems
    ("fs-missing", "-k --fs tag=t,dir=no", r"--fs: dir=no: no such directory; name the directory"),
    ("fs-file", "-k --fs tag=t,dir=vmlinux", r"--fs: dir=vmlinux: no such directory; name the directory"),
    ("fs-none", "-k --fs tag=t", r"--fs: one of dir= .* and socket= .* is needed"),
    ("fs-both", "-k --fs tag=t,dir=.,socket=s", r"--fs: one of dir= .* and socket= .* is needed"),
    ("fs-tag", f"-k --fs tag={TWENTY * 2},dir=.", r"--fs: tag=.*: 1 to 36 bytes are needed"),
    ("fs-tagless", "-k --fs dir=.", r"--fs: tag= is missing"),
    ("fs-queue", "-k --fs tag=t,dir=.,num_queues=0", r"--fs: num_queues=0: 1 to 255 is possible"),
    ("fs-queues", "-k --fs tag=t,dir=.,num_queues=999999999999", r"--fs: num_queues=9+: 1 to 255 is poss"),
    ("fs-twice", "-k --fs tag=t,dir=. --fs tag=t,dir=/", r"--fs: tag=t: .*two"),
    ("fs-cache", "-k --fs tag=t,dir=.,cache=sometimes", r"--fs: cache=sometimes: .*auto"),
    # entropy
    ("rng-missing", "-k --rng src=no", r"--rng: src=no: .*; name a readable file or device"),
    ("rng-dir", "-k --rng src=.", r"--rng: src=\.: .*; name a readable file or device"),
    ("rng-fifo", "-k --rng src=p", r"--rng: src=p: .*; name a readable file or device", fifo("p")),
    ("rng-socket", "-k --rng src=dead", r"--rng: src=dead: .*; name a readable file", dead_socket),
    # networks
    ("net-neither", "-k --net mac=52:54:00:12:34:56", r"--net: one of tap= .*and stream= .*is needed"),
    ("net-both", "-k --net tap=t,stream=s", r"--net: one of tap= .*and stream= .*is needed"),
    ("net-mac", "-k --net tap=t,mac=1", r"--net: mac=1: the address of one card is needed, such as 52:"),
    ("net-mtu", "-k --net tap=t,mtu=20", r"--net: mtu=20: a number from 68 to 65535 is needed"),
    ("net-absent", "-k --net stream=no", r"--net: stream no: No such file or directory"),
    ("net-nobody", "-k --net stream=dead", r"--net: stream dead: Connection refused", dead_socket),
    ("net-name", f"-k --net tap={TWENTY}", r"--net: TAP interface .*: an interface's name has 1 to 15"),
    ("net-twice", "-k --net tap=t --net tap=t", r"--net: tap=t: .*two"),
    ("ids", "-k --rng src=/dev/zero,id=a --rng src=/dev/zero,id=a", r"id=a: .*two"),
    ("slot-0", "-k --rng pci_device_id=0", r"--rng: pci_device_id=0: a slot from 1 to 31 is needed"),
    ("slot-32", "-k --disk path=d,pci_device_id=32", r"--disk: pci_device_id=32: a slot from 1 to 31 is"),
    ("slot-same", "-k --rng pci_device_id=5 --rng pci_device_id=5", r"pci_device_id=5: .*two"),
    ("segment", "-k --net tap=t,pci_segment=1", r"--net: pci_segment=1: there is one PCI segment, 0"),
    ("slots", "-k " + "--rng src=/dev/zero " * 32, r"all 31 PCI slots are taken; use fewer devices"),
    # the other commands
    ("run-kernel", "run --kernel no -- ls", r"no: .*kernel"),
    ("run-accel", "run --accel tcg -- ls", r"--accel: 'tcg': one of auto, kvm, lab is needed"),
    ("run-share", "run --kernel vmlinux --share no -- ls", r"--share no: no such directory; make it first"),
    ("run-no-share", "run --kernel vmlinux --share= -- ls", r"--share: an empty value; --share DIR is"),
    ("run-no-modules", "run --kernel vmlinux --modules= -- ls", r"--modules: an empty value; --modules DIR"),
    ("run-no-kernel", "run --kernel= -- ls", r"--kernel: an empty value; --kernel NAME.FILE is needed"),
    ("run-modules", "run --kernel vmlinux --modules no -- ls", r"--modules: no: no such directory; name"),
    ("run-timeout", "run --kernel vmlinux --timeout 0 -- ls", r"--timeout: '0': a number of seconds above 0"),
    ("run-memory", "run --kernel vmlinux --memory 1M -- ls", r"--memory: .*16M to 512G is possible"),
    ("run-cpus", "run --kernel vmlinux --cpus 0 -- ls", r"--cpus: boot=0: 1 to 32"),
    ("lab-share", "lab --share= -- ls", r"--share: an empty value; --share DIR is"),
    ("lab-cpus", "lab --cpus 9 -- ls", r"--cpus: '9': 1 to 8 CPUs are possible"),
    ("rings-none", "rings", r"SOCKET is missing: name the --control socket of a machine"),
    ("rings-two", "rings off x", r"rings off x: one SOCKET at most: name the --control socket of a machine"),
    ("kernel-word", "kernel lst", r"kernel lst: one of list, fetch, build is needed"),
]  # fmt: skip


FAILING = [
    ("kernel", "--kernel no", r"kernel no: No such file"),
    (
        "backend",
        f"--kernel vmlinux {GENERIC} socket=s,device_type=fs --connect-timeout 0.1",
        r"s: does not exi",
    ),
]


@pytest.mark.parametrize("output", ["--serial file=log", "--trace vhost-user=log", "--console file=log"])
@pytest.mark.parametrize(("line", "message"), [pytest.param(*row[1:], id=row[0]) for row in FAILING])
def test_a_start_that_fails_leaves_a_log_as_it_was(tmp_path, line, message, output):
    """But for the trace of backends that do not come: that is what it is for."""
    refuses(tmp_path, file("log", b"of before\n"), [*line.split(), *output.split()], message)
    kept = (tmp_path / "log").read_bytes() == b"of before\n"
    assert kept != (output.startswith("--trace") and "socket=" in line)


@pytest.mark.parametrize("row", [pytest.param(row, id=row[0]) for row in OPTIONS])
def test_options(tmp_path, row):
    _, line, message, *make = row
    words = ("boot --kernel vmlinux --console off" + line[2:] if line.startswith("-k") else line).split(" ")
    refuses(tmp_path, make[0] if make else None, [word for word in words if word], message)


FORCED = [
    ("queues", "device_type=fs,queue_sizes=[512],config=[tag=t]", r"fs needs at least 2 queues, 1 given"),
    ("size", "device_type=scsi,queue_sizes=[256,256,256],config=00", r"at most 128 entries a queue, 256"),
    ("config", f"device_type=vsock,config={'00' * 9}", r"config= is 9 bytes, vsock has 8"),
]


@pytest.mark.parametrize("row", [pytest.param(row, id=row[0]) for row in FORCED])
def test_force_allows_what_the_rules_of_a_kind_refuse(tmp_path, row):
    _, device, message = row
    words = ("--kernel", "vmlinux", *QUIET, GENERIC, f"socket=s,{device}")
    refuses(tmp_path, peer(backend(_17=3)), words, message)
    (tmp_path / "s").unlink()
    with working_directory(tmp_path), closing(Peer(tmp_path / "s", backend(_17=3))):
        assert program.run(tmp_path, "--force", *words) == (0, "", "")


# -- other users, other hosts --------------------------------------------------------------

NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--")
KVM = "mknod -m 666 /dev/kvm c 10 232"
DEVICES = "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && mknod -m 666 /dev/urandom c 1 9"


def inside(script):
    """Words that run what follows them in a mount namespace of its own, after `script`."""
    return ("unshare", "--mount", "sh", "-c", f'{script} && exec "$@"', "-")


def usable(under):
    found = subprocess.run(
        [*under, sys.executable, "-P", "-c", "import pyvmm.cli"],
        env=program.environment(), capture_output=True, check=False,
    )  # fmt: skip
    return not found.returncode


@pytest.fixture
def open_folder():
    """A directory that any user may use; pytest's own are private."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        os.chmod(name, 0o777)
        yield pathlib.Path(name)


def private(name, *makers):
    def make(folder):
        made = all_of(*makers)(folder)
        (folder / name).chmod(0)
        return made

    return make


ELSEWHERE = [
    ("kvm", NOBODY, "-k ", r"/dev/kvm: permission denied; add your user to the group kvm"),
    ("kernel", (*inside(f"{DEVICES} && {KVM}"), *NOBODY), "--kernel k --console off",
     r"kernel k: Permission denied; a readable file is needed",
     private("k", file("k", program.pvh_elf()))),
    ("socket", NOBODY, f"-k {GENERIC} socket=s,device_type=rng", r"/dev/kvm: permission denied"),
    ("disk", NOBODY, "-k --disk path=d", r"path=d: Permission denied; use readonly=on",
     private("d", sparse("d", 1 << 20))),
    ("rng", NOBODY, "-k --rng src=r", r"src=r: Permission denied; name a readable",
     private("r", file("r", b"x"))),
    ("serial", NOBODY, "-k --serial file=r", r"/dev/kvm: permission denied", private("r", file("r", b"x"))),
    ("tap", NOBODY, "-k --net tap=pyvmm0", r"TAP interface pyvmm0: .*CAP_NET_ADMIN is needed"),
    ("lo", ("unshare", "--net"), "-k --net tap=lo", r"--net: TAP interface lo: .*not a TAP interface"),
    ("no-kvm", inside(DEVICES), "-k ", r"/dev/kvm: there is no such device; load kvm_intel or kvm_amd"),
    ("not-kvm", inside("mount --bind /dev/null /dev/kvm"), "-k ", r"/dev/kvm: it is not KVM's device"),
    ("read-only", inside("mount --bind . . && mount -o remount,ro,bind . && cd ."), "-k --disk path=d",
     r"path=d: Read-only file system; use readonly=on", sparse("d", 1 << 20)),
    ("hugepages", (), "-k --memory size=500G,hugepages=on", r"hugepages: .*/proc/sys/vm/nr_hugepages"),
    ("hugepage", (), "-k --memory size=17M,hugepages=on", r"not a multiple of the page size 0x200000"),
]  # fmt: skip


@pytest.mark.parametrize("row", [pytest.param(row, id=row[0]) for row in ELSEWHERE])
def test_other_users_and_hosts(open_folder, row):
    _, under, line, message, *make = row
    if under and not usable(under):
        pytest.skip(f"{under[0]} is not permitted here; run as root with CAP_SYS_ADMIN and CAP_MKNOD")
    words = line.replace("-k ", "boot --kernel vmlinux --console off ").split()
    refuses(open_folder, make[0] if make else None, words, message, under=under)


def refuses(folder, make, argv, message, **options):
    """`pyvmm argv` says one line like `message`, ends with status 2 and leaves nothing."""
    (folder / "vmlinux").write_bytes(program.pvh_elf())
    with working_directory(folder):
        made = make(folder) if make else None
        try:
            status, stdout, stderr = program.run(folder, *argv, **options)
        finally:
            for thing in made if isinstance(made, list) else [made]:
                getattr(thing, "close", lambda: None)()
    assert re.fullmatch(rf"pyvmm: [^\n]*{message}[^\n]*\n", stderr), stderr
    assert (status, stdout) == (2, "")


@contextmanager
def working_directory(folder):
    """Sockets are made with relative paths: pytest's directories are too deep for them."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
