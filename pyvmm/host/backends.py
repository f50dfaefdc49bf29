"""vhost-user backends of this host: finding them, and starting them for one device.

It owns which programs there are and how each wants to be told what to serve.  How a program
gets its socket, and how it ends, is in `handover`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from .. import cache, log
from ..config import PLACEHOLDERS
from ..errors import ConfigError
from ..files import open_file
from ..record import Record
from .handover import BackendProcess, ListeningProcess

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..config import DiskDevice, FsDevice

# Where distributions put programs that are not meant for PATH
LIBRARY_DIRS = (
    "/usr/libexec",
    "/usr/lib/qemu",
    "/usr/lib",
    "/usr/libexec/qemu",
    "/usr/local/libexec",
    "/usr/local/bin",
)
# Where backends announce themselves (QEMU's docs/interop/vhost-user.json), best first
DESCRIPTION_DIRS = ("/etc/qemu/vhost-user", "/usr/share/qemu/vhost-user")

FD, SOCKET = PLACEHOLDERS
C_VIRTIOFSD_MARK = b"using FUSE kernel interface"  # printed by the C one's --version only
C_CACHE_NAMES = {"never": "none"}  # where it differs from the one in Rust
QCOW2_MAGIC = b"QFI\xfb"
READ_ONLY_ERRORS = (errno.EPERM, errno.EACCES, errno.EROFS)


# -- finding -----------------------------------------------------------------------


def find_programs(name: str) -> Iterator[str]:
    """Absolute paths in PATH, in cargo's directory, QEMU's, and where scripts/backends puts programs."""
    home = os.environ.get("HOME", "")
    dirs = [*os.get_exec_path(), f"{home}/.cargo/bin", *LIBRARY_DIRS, cache.directory("backends", "bin")]
    for path in (os.path.join(folder, name) for folder in dirs if folder):
        if os.access(path, os.X_OK) and os.path.isfile(path):
            yield os.path.abspath(path)


def find_program(name: str) -> str | None:
    """The first of `find_programs`."""
    return next(find_programs(name), None)


class Description(Record):
    """A backend as its JSON file describes it; `type` is fs, gpu, input, block, ..."""

    type: str
    binary: str
    description: str
    path: str


def descriptions() -> list[Description]:
    """The backends that installed packages announce; broken files are skipped with a warning."""
    import json

    config = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.environ.get("HOME", ""), ".config")
    found: dict[str, Description] = {}  # a file hides those of the same name in later directories
    for folder in (f"{config}/qemu/vhost-user", *DESCRIPTION_DIRS):
        for name in _json_files(folder):
            path = os.path.join(folder, name)
            try:
                with open(path, encoding="utf-8") as file:
                    data = json.load(file)
                entry = Description(data["type"], data["binary"], data.get("description", ""), path)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                log.warn(f"{path}: no usable backend description: {error}")
            else:
                found.setdefault(name, entry)
    return [found[name] for name in sorted(found)]


def _json_files(folder: str) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if name.endswith(".json"))
    except OSError:
        return []


def find_virtiofsd() -> str | None:
    """The virtiofsd to use: one in the usual places, else one that announces itself."""
    path = find_program("virtiofsd")
    if path is None:
        announced = (entry.binary for entry in descriptions() if entry.type == "fs")
        path = next((binary for binary in announced if os.access(binary, os.X_OK)), None)
    return path


def is_c_virtiofsd(path: str) -> bool:
    """Whether it is QEMU's own, which was replaced by the one in Rust; they share no options."""
    import mmap

    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        return text.find(C_VIRTIOFSD_MARK) >= 0


# -- what to start -----------------------------------------------------------------


def start_virtiofsd(device: FsDevice) -> BackendProcess:
    """Serve `device.dir` to one device.  Raises ConfigError."""
    folder = os.path.abspath(device.dir)
    if not os.path.isdir(folder):
        raise ConfigError(f"--fs: dir={device.dir}: no such directory; name the directory to share")
    path = find_virtiofsd()
    if path is None:
        raise ConfigError(
            "--fs: no virtiofsd found; apt install qemu-system-common, or cargo install virtiofsd"
        )
    in_c = is_c_virtiofsd(path)
    arguments = c_virtiofsd_arguments if in_c else rust_virtiofsd_arguments
    return BackendProcess(
        f"virtiofsd for {folder}",
        lambda fd: [path, *arguments(device, folder, fd)],
        prepare=make_read_only if in_c and device.readonly else None,
    )


def make_read_only() -> None:
    """In the child that becomes the C virtiofsd, which cannot refuse writes: let the kernel do it.

    A guest's own `mount -o ro` protects nothing from the guest's root.
    """
    from .._native.process import read_only_mounts

    try:
        read_only_mounts()
    except OSError as error:
        raise OSError(
            error.errno,
            f"serving files read-only with it needs CAP_SYS_ADMIN, Linux 5.12 and no chroot "
            f"({error.strerror}); allow that, or cargo install virtiofsd, which refuses writes itself",
        ) from None


def c_virtiofsd_arguments(device: FsDevice, folder: str, fd: int) -> list[str]:
    """For QEMU's virtiofsd (up to 7.2).  It must be root; a chroot also works in containers.

    It has no word for read-only: see `make_read_only`.
    """
    if os.geteuid():
        raise ConfigError("--fs: this virtiofsd needs root; run as root or cargo install virtiofsd")
    options = ["-o", "source=" + _escape(folder, "\\", ","), "-o", "sandbox=chroot"]
    if device.cache:
        options += ["-o", f"cache={C_CACHE_NAMES.get(device.cache, device.cache)}"]
    return [f"--fd={fd}", "-f", "-o", "log_level=err", *options]


def rust_virtiofsd_arguments(device: FsDevice, folder: str, fd: int) -> list[str]:
    """For the virtiofsd in Rust.  Users other than root get a sandbox where the kernel lets them."""
    sandbox = "chroot" if not os.geteuid() else "namespace" if _user_namespaces() else "none"
    options = [f"--fd={fd}", "--log-level=error", f"--shared-dir={folder}", f"--sandbox={sandbox}"]
    if device.cache:
        options.append(f"--cache={device.cache}")
    if device.readonly:
        options.append("--readonly")
    return options


def _user_namespaces() -> bool:
    """Whether a user who is not root may make a user namespace."""
    return (
        _sysctl("/proc/sys/user/max_user_namespaces", 0) > 0
        and _sysctl("/proc/sys/kernel/unprivileged_userns_clone", 1) > 0
        and _sysctl("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", 0) == 0
    )


def _sysctl(path: str, default: int) -> int:
    try:
        with open(path, "rb") as file:
            return int(file.read())
    except (OSError, ValueError):
        return default


def start_command(words: Sequence[str]) -> BackendProcess:
    """Start a command of the user's; see `config.PLACEHOLDERS`.  Raises ConfigError."""
    program = words[0] if "/" in words[0] else find_program(words[0]) or words[0]
    name = os.path.basename(program)

    def argv(mark: str, value: str) -> list[str]:
        return [program, *(word.replace(mark, value) for word in words[1:])]

    if any(SOCKET in word for word in words):
        return ListeningProcess(name, lambda path: argv(SOCKET, path), spoken=True)
    return BackendProcess(name, lambda fd: argv(FD, str(fd)), spoken=True)


def start_disk(device: DiskDevice) -> BackendProcess:
    """Serve an image file or a block device to one device.  Raises ConfigError."""
    program = find_program("qemu-storage-daemon")
    if program is None:
        raise ConfigError("--disk: no qemu-storage-daemon found; apt install qemu-system-common qemu-utils")
    path = os.path.abspath(device.path)
    image = open_image(device)
    try:
        form = image_format(device, image)
        name = f"qemu-storage-daemon for {path}"
        return BackendProcess(
            name, lambda fd: [program, *storage_daemon_arguments(device, path, form, fd)], image
        )
    except BaseException:
        os.close(image)
        raise


def open_image(device: DiskDevice) -> int:
    """A descriptor of the image that holds its lock.

    The storage daemon's export shares the image with every other writer, so two machines
    would destroy it; this lock is between machines of ours.
    """
    fd = _open_image(device)
    if not os.lseek(fd, 0, os.SEEK_END):
        os.close(fd)
        raise ConfigError(f"--disk: path={device.path}: is empty; give it the size that the disk shall have")
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if device.readonly else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise ConfigError(
            f"--disk: path={device.path}: another machine uses it; end that, or use readonly=on in both"
        ) from None
    except OSError as error:
        log.info(f"--disk: path={device.path}: cannot be locked: {error.strerror}")
    return fd


def _open_image(device: DiskDevice) -> int:
    subject, kinds = f"--disk: path={device.path}", (stat.S_ISREG, stat.S_ISBLK)
    mode = os.O_RDONLY if device.readonly else os.O_RDWR
    try:
        return open_file(subject, device.path, "name an image file or a block device", *kinds, flags=mode)
    except ConfigError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in READ_ONLY_ERRORS and not device.readonly:
            raise ConfigError(f"{subject}: {cause.strerror}; use readonly=on") from None
        raise


def image_format(device: DiskDevice, image: int) -> str:
    """`raw` or `qcow2`: what the user says, else by the image's first bytes.

    A guest can write a qcow2 header to a raw disk; one that refers to other files would make
    them readable at the next start, so those must be named by the user.
    """
    head = os.pread(image, 112, 0)
    if device.image_type:
        return device.image_type
    if not head.startswith(QCOW2_MAGIC):
        return "raw"
    if _refers_to_files(head):
        raise ConfigError(
            f"--disk: path={device.path}: a qcow2 image that refers to another file; "
            "add image_type=qcow2 if you trust it, or image_type=raw if it is a raw disk"
        )
    return "qcow2"


def _refers_to_files(head: bytes) -> bool:
    """Whether a qcow2 header names a backing file or an external data file (its docs/interop/qcow2.txt)."""
    backing_file_offset = int.from_bytes(head[8:16], "big")
    version = int.from_bytes(head[4:8], "big")
    incompatible = int.from_bytes(head[72:80], "big") if version >= 3 else 0
    return bool(backing_file_offset or incompatible & 1 << 2)


def storage_daemon_arguments(device: DiskDevice, path: str, form: str, fd: int) -> list[str]:
    """For qemu-storage-daemon: the file, the image's format, and the export."""
    switch = {True: "on", False: "off"}
    readonly, writable = switch[device.readonly], switch[not device.readonly]
    direct = switch[device.direct]
    driver = "host_device" if _is_block_device(path) else "file"
    file = f"driver={driver},node-name=file,filename={_double_commas(path)}"
    rules = f"read-only={readonly},cache.direct={direct},discard=unmap"
    image = f"driver={form},node-name=image,file=file"
    export = f"type=vhost-user-blk,id=disk,node-name=image,writable={writable}"
    return [
        "--blockdev",
        f"{file},{rules}",
        "--blockdev",
        f"{image},{rules}",
        "--export",
        f"{export},num-queues={device.num_queues},addr.type=fd,addr.str={fd}",
    ]


def _is_block_device(path: str) -> bool:
    return stat.S_ISBLK(os.stat(path).st_mode)


def _escape(text: str, mark: str, special: str) -> str:
    return text.replace(mark, mark * 2).replace(special, mark + special)


def _double_commas(text: str) -> str:
    return text.replace(",", ",,")
