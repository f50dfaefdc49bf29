"""Option texts become configuration values, or one error that names option and cure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pyvmm import config
from pyvmm.config import FsDevice, GenericDevice, MemoryConfig, StreamConfig
from pyvmm.errors import ConfigError


def test_cloud_hypervisors_memory_and_cpus() -> None:
    assert config.memory("size=1G,shared=on") == MemoryConfig(1 << 30)
    assert config.cpus("boot=1") == config.CpusConfig(1)
    assert config.cpus("boot=4,max=4").boot == 4


def test_a_generic_device_by_either_key() -> None:
    text = 'socket="/tmp/a""b",virtio_id=26,queue_sizes=[512,512]'
    assert config.generic(text) == GenericDevice("26", '/tmp/a"b', (512, 512))
    assert config.generic(text.replace("virtio_id", "device_type")) == config.generic(text)


def test_how_a_generic_backend_is_had() -> None:
    device = config.generic('device_type=fs,exec="serve --opt=a,b  --fd {fd}",on_loss=stop')
    assert (device.exec, device.on_loss) == (("serve", "--opt=a,b", "--fd", "{fd}"), "stop")
    device = config.generic("device_type=fs,socket=x,server=on")
    assert device.server and not device.exec and not device.on_loss


def test_fs_by_directory() -> None:
    assert config.fs("tag=root,dir=/,cache=always") == FsDevice("root", "/", cache="always")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("off", StreamConfig("off")),
        ("tty", StreamConfig("tty")),
        ("file=/x=y", StreamConfig("file", "/x=y")),
        ('socket="/a,b"', StreamConfig("socket", "/a,b")),
    ],
)
def test_streams(text: str, value: StreamConfig) -> None:
    assert config.stream("--serial", text) == value


@pytest.mark.parametrize(
    ("convert", "text", "message"),
    [
        (config.cpus, "boot=0", "1 to 32 virtual CPUs"),
        (config.cpus, "boot=33", "1 to 32 virtual CPUs"),
        (config.cpus, "boot=1,max=2", "not hot-plugged"),
        (config.memory, "size=1000001", "multiple of the page size"),
        (config.memory, "size=8M", "16M to 512G"),
        (config.memory, "size=1G,shared=off", "shared=on"),
        (config.memory, "sise=1G", "did you mean 'size'"),
        (config.generic, "device_type=fs", "exactly one of socket=, fd= and exec="),
        (config.generic, "device_type=fs,socket=x,fd=3", "exactly one of socket=, fd= and exec="),
        (config.generic, 'device_type=fs,socket=x,exec="y {fd}"', "exactly one of socket=, fd= and exec="),
        (config.generic, "device_type=fs,exec=y", "exec=y: one of {fd} .* and {socket}"),
        (config.generic, 'device_type=fs,exec="y {fd} {socket}"', "one of {fd} .* and {socket}"),
        (config.generic, "device_type=fs,fd=3,server=on", "server=on: socket= must say where to listen"),
        (config.generic, "device_type=fs,fd=3,on_loss=panic", "on_loss=panic: one of reconnect, stop, fail"),
        (config.generic, "socket=x", "device_type= is missing"),
        (config.generic, "socket=x,virtio_id=1,queue_sizes=[100]", "queue size 100: a power of two"),
        (config.generic, "socket=x,virtio_id=1,queue_sizes=[0]", "queue size 0: a power of two"),
        (config.generic, "socket=x,virtio_id=1,queue_sizes=[65536]", "power of two"),
        (config.fs, "tag=x", "one of dir="),
        (config.fs, "tag=x,socket=s,readonly=on", "readonly= needs dir=; the virtiofsd at socket="),
        (config.fs, "tag=x,socket=s,cache=never", "cache= needs dir="),
        (config.fs, f"tag={'x' * 37},dir=/", "1 to 36 bytes"),
        (config.disk, "readonly=on", "path= is missing"),
        (config.disk, "path=x,num_queues=0", "1 to 256"),
    ],
)
def test_errors_name_the_cause(convert: Callable[[str], Any], text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        convert(text)
    assert str(caught.value).startswith("--")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "ttyS0", "file=", 'socket=""', "file", "tty=x"])
def test_bad_streams(text: str) -> None:
    with pytest.raises(ConfigError, match="--serial: .* is needed"):
        config.stream("--serial", text)


@pytest.mark.parametrize(
    ("convert", "keys"),
    [
        (config.generic, "device_type=fs,socket=s"),
        (config.disk, "path=d"),
        (config.fs, "tag=t,dir=/"),
        (config.rng, "src=r"),
        (config.net, "tap=t"),
    ],
)
def test_every_device_may_have_a_name_and_a_slot(convert: Callable[[str], Any], keys: str) -> None:
    device = convert(f"{keys},id=x,pci_segment=0,pci_device_id=7")
    assert (device.id, device.pci_device_id) == ("x", 7)
    assert convert(keys).pci_device_id == 0
    with pytest.raises(ConfigError, match="pci_segment=2: there is one PCI segment, 0"):
        convert(f"{keys},pci_segment=2")
