"""The one table of virtio device kinds: what the VMM knows about a device besides its number.

Every row follows the specification's chapter 5 (or the only implementation, where the
specification reserves a number and says no more).  It must not know how any of it is served:
a kind is data, and an id that is not here works too.

`queue_rule` says what the number of queues has to do with anything:

    any     the minimum, or more of the same kind (blk, scsi, fs, crypto)
    pairs   receive and transmit pairs, with or without one control queue after them (net)
    ports   2, or a pair a port and the control pair: 4, 6, 8 ... (console)
    fixed   between the minimum and the usual number: some exist only with a feature

`write_policy` is what becomes of a driver's write to its configuration space:

    forward  handed on, exactly the bytes written
    whole    handed on with the rest of the space: the driver selects what it then reads, and backends want
             the selectors together, at offset 0 (input)
    absorb   kept by the VMM and read back: the driver tells the device what backends refuse to be told

`max_size` is the largest queue that the known backends take; those in Rust end the connection at a
larger one.  Drivers and backends themselves are in `served`, since only people ask for them.
"""

from __future__ import annotations

from ..record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    Field = tuple[str, int]  # name, width in bytes; widths above 8 are byte strings

FORWARD, WHOLE, ABSORB = "forward", "whole", "absorb"
ANY, PAIRS, PORTS, FIXED = "any", "pairs", "ports", "fixed"
UNCLASSIFIED = 0xFFFF  # base class and subclass of a device that fits no class
PAIR = 2
# CTRL_GUEST_OFFLOADS, CTRL_VQ and what it is for, MQ, CTRL_MAC_ADDR, VQ_NOTF_COAL, NOTF_COAL, RSS
_NET_CONTROL = sum(1 << bit for bit in (2, 17, 18, 19, 20, 21, 22, 23, 52, 53, 60))
CONFIG_MAX = 4096  # bytes of configuration that the transport has room for
SIZE_MAX, USUAL_SIZE = 32768, 256  # entries of a virtqueue (virtio 1.2, 2.7), and of one that nobody sized


class Kind(Record):
    """One device type.  `pci_class` is base class and subclass; `refused` says why a vhost-user
    backend cannot serve it."""

    device_id: int
    name: str
    aliases: tuple[str, ...] = ()
    min_queues: int = 1
    usual_queues: int = 1
    queue_rule: str = ANY
    config: tuple[Field, ...] = ()
    write_policy: str = FORWARD
    pci_class: int = UNCLASSIFIED
    title: str = ""
    max_size: int = SIZE_MAX
    refused: str = ""

    @property
    def usual_sizes(self) -> tuple[int, ...]:
        """Queue sizes for who gives none: as many as usual, and as large as every backend takes."""
        return (min(USUAL_SIZE, self.max_size),) * self.usual_queues

    @property
    def config_size(self) -> int:
        """Bytes of the whole configuration structure."""
        return sum(width for _, width in self.config)

    def fields(self) -> Iterator[tuple[str, int, int]]:
        """Name, offset and width of each configuration field."""
        offset = 0
        for name, width in self.config:
            yield name, offset, width
            offset += width

    def queue_fault(self, count: int) -> str | None:
        """What is wrong with `count` queues, in words, or None."""
        if count < self.min_queues:
            return f"{self.name} needs at least {self.min_queues} queues, {count} given"
        if self.queue_rule == PORTS and count % PAIR:
            return f"{self.name} needs an even number of queues (a pair for each port), {count} given"
        if self.queue_rule == FIXED and count > self.usual_queues:
            return f"{self.name} has at most {self.usual_queues} queues, {count} given"
        return None

    def size_fault(self, sizes: Iterable[int]) -> str | None:
        """What is wrong with queues of these sizes, in words, or None."""
        for size in sizes:
            if size > self.max_size:
                return f"{self.name} backends take at most {self.max_size} entries a queue, {size} given"
        return None

    def backend_limit(self, reported: int) -> int:
        """How many queues a backend has whose GET_QUEUE_NUM says `reported`.

        Network backends count pairs, as QEMU does (vhost_net_get_max_queues); a control queue may follow.
        """
        return PAIR * reported + 1 if self.queue_rule == PAIRS else reported

    def impossible_features(self, count: int) -> int:
        """Feature bits that need one queue more than `count`: a network card's control queue (5.1.3.1)."""
        return _NET_CONTROL if self.queue_rule == PAIRS and not count % PAIR else 0


_NET = (
    ("mac", 6), ("status", 2), ("max_virtqueue_pairs", 2), ("mtu", 2), ("speed", 4), ("duplex", 1),
    ("rss_max_key_size", 1), ("rss_max_indirection_table_length", 2), ("supported_hash_types", 4),
    ("supported_tunnel_types", 4),
)  # fmt: skip
_BLK = (
    ("capacity", 8), ("size_max", 4), ("seg_max", 4), ("cylinders", 2), ("heads", 1), ("sectors", 1),
    ("blk_size", 4), ("physical_block_exp", 1), ("alignment_offset", 1), ("min_io_size", 2),
    ("opt_io_size", 4), ("writeback", 1), ("unused0", 1), ("num_queues", 2),
    ("max_discard_sectors", 4), ("max_discard_seg", 4), ("discard_sector_alignment", 4),
    ("max_write_zeroes_sectors", 4), ("max_write_zeroes_seg", 4), ("write_zeroes_may_unmap", 1),
    ("unused1", 3), ("max_secure_erase_sectors", 4), ("max_secure_erase_seg", 4),
    ("secure_erase_sector_alignment", 4), ("zone_sectors", 4), ("max_open_zones", 4),
    ("max_active_zones", 4), ("max_append_sectors", 4), ("write_granularity", 4), ("model", 1),
    ("unused2", 3),
)  # fmt: skip
_CONSOLE = (("cols", 2), ("rows", 2), ("max_nr_ports", 4), ("emerg_wr", 4))
_BALLOON = (("num_pages", 4), ("actual", 4), ("free_page_hint_cmd_id", 4), ("poison_val", 4))
_SCSI = (
    ("num_queues", 4), ("seg_max", 4), ("max_sectors", 4), ("cmd_per_lun", 4), ("event_info_size", 4),
    ("sense_size", 4), ("cdb_size", 4), ("max_channel", 2), ("max_target", 2), ("max_lun", 4),
)  # fmt: skip
_GPU = (
    ("events_read", 4), ("events_clear", 4), ("num_scanouts", 4), ("num_capsets", 4), ("blob_alignment", 4),
)  # fmt: skip
_INPUT = (("select", 1), ("subsel", 1), ("size", 1), ("reserved", 5), ("u", 128))
_CRYPTO = (
    ("status", 4), ("max_dataqueues", 4), ("crypto_services", 4), ("cipher_algo_l", 4), ("cipher_algo_h", 4),
    ("hash_algo", 4), ("mac_algo_l", 4), ("mac_algo_h", 4), ("aead_algo", 4), ("max_cipher_key_len", 4),
    ("max_auth_key_len", 4), ("akcipher_algo", 4), ("max_size", 8),
)  # fmt: skip
_IOMMU = (
    ("page_size_mask", 8), ("input_range_start", 8), ("input_range_end", 8), ("domain_range_start", 4),
    ("domain_range_end", 4), ("probe_size", 4), ("bypass", 1), ("reserved", 3),
)  # fmt: skip
_MEM = (
    ("block_size", 8), ("node_id", 2), ("padding", 6), ("addr", 8), ("region_size", 8),
    ("usable_region_size", 8), ("plugged_size", 8), ("requested_size", 8),
)  # fmt: skip
_FS = (("tag", 36), ("num_request_queues", 4), ("notify_buf_size", 4))
_SPI = (
    ("cs_max_number", 1), ("cs_change_supported", 1), ("tx_nbits_supported", 1), ("rx_nbits_supported", 1),
    ("bits_per_word_mask", 4), ("mode_func_supported", 4), ("max_freq_hz", 4), ("max_word_delay_ns", 4),
    ("max_cs_setup_ns", 4), ("max_cs_hold_ns", 4), ("max_cs_inactive_ns", 4),
)  # fmt: skip

KINDS = (
    Kind(1, "net", ("network",), 2, 2, PAIRS, _NET, pci_class=0x0200, title="network card"),
    Kind(2, "block", ("blk", "disk"), 1, 1, ANY, _BLK, pci_class=0x0180, title="block device"),
    Kind(3, "console", ("serial",), 2, 4, PORTS, _CONSOLE, pci_class=0x0780, title="console", max_size=128),
    Kind(4, "rng", ("entropy",), 1, 1, FIXED, title="entropy source", max_size=1024),
    Kind(5, "balloon", (), 2, 5, FIXED, _BALLOON, title="memory balloon (traditional)"),
    Kind(6, "iomem", (), title="ioMemory"),
    Kind(7, "rpmsg", (), 2, 2, FIXED, title="remote processor messages"),
    Kind(8, "scsi", (), 3, 3, ANY, _SCSI, ABSORB, 0x0100, "SCSI host", 128),
    Kind(9, "9p", ("9pfs",), config=(("tag_len", 2), ("tag", 254)), pci_class=0x0180, title="9P transport"),
    Kind(10, "mac80211_wlan", ("mac80211-wlan",), pci_class=0x0280, title="mac80211 wireless card"),
    Kind(11, "rproc_serial", ("rproc-serial",), 2, 4, PORTS, _CONSOLE, title="remote processor serial link"),
    Kind(12, "caif", (), 2, 2, FIXED, title="CAIF"),
    Kind(13, "memory_balloon", ("memory-balloon",), title="memory balloon"),
    Kind(16, "gpu", (), 2, 2, FIXED, _GPU, pci_class=0x0380, title="graphics", max_size=1024),
    Kind(17, "rtc", ("clock", "timer"), 1, 2, FIXED, title="real-time clock", max_size=1024),
    Kind(18, "input", (), 2, 2, FIXED, _INPUT, WHOLE, 0x0980, "input device", 1024),
    Kind(19, "vsock", ("socket",), 3, 3, FIXED, (("guest_cid", 8),), title="socket", max_size=1024),
    Kind(20, "crypto", (), 2, 2, ANY, _CRYPTO, pci_class=0x1080, title="cryptography"),
    Kind(21, "signal_dist", ("signal-dist",), title="signal distribution module"),
    Kind(22, "pstore", (), title="persistent store"),
    Kind(
        23, "iommu", (), 2, 2, FIXED, _IOMMU, pci_class=0x0806, title="IOMMU",
        refused="the VMM itself would have to translate addresses",
    ),
    Kind(24, "mem", ("memory",), 1, 1, FIXED, _MEM, title="hot-pluggable memory"),
    Kind(
        25, "sound", ("snd",), 4, 4, FIXED,
        (("jacks", 4), ("streams", 4), ("chmaps", 4), ("controls", 4)), pci_class=0x0401, title="sound card",
        max_size=64,
    ),
    Kind(26, "fs", ("filesystem",), 2, 2, ANY, _FS, pci_class=0x0180, title="file system"),
    Kind(27, "pmem", (), 1, 1, FIXED, (("start", 8), ("size", 8)), title="persistent memory"),
    Kind(
        28, "rpmb", (), 1, 1, FIXED, (("capacity", 1), ("max_wr_cnt", 1), ("max_rd_cnt", 1)),
        title="replay-protected memory",
    ),
    Kind(29, "mac80211_hwsim", ("mac80211-hwsim",), 2, 2, FIXED, title="simulated wireless card"),
    Kind(30, "video_encoder", ("video-encoder",), 2, 2, FIXED, title="video encoder"),
    Kind(31, "video_decoder", ("video-decoder",), 2, 2, FIXED, title="video decoder"),
    Kind(32, "scmi", (), 1, 2, FIXED, title="system control and management", max_size=1024),
    Kind(33, "nitro_sec_mod", ("nitro-sec-mod",), title="Nitro secure module"),
    Kind(34, "i2c", ("i2c-adapter",), 1, 1, FIXED, pci_class=0x0C80, title="I2C adapter", max_size=1024),
    Kind(35, "watchdog", (), title="watchdog", refused="a backend has no way to reset the guest"),
    Kind(36, "can", (), 3, 3, FIXED, (("status", 2),), pci_class=0x0C09, title="CAN controller", max_size=64),
    Kind(37, "dmabuf", (), title="DMA buffers"),
    Kind(38, "param_serv", ("parameter-server",), title="parameter server"),
    Kind(39, "audio_policy", ("audio-policy",), title="audio policy"),
    Kind(
        40, "bt", ("bluetooth",), 2, 2, FIXED, (("type", 1), ("vendor", 2), ("msft_opcode", 2)),
        pci_class=0x0D11, title="Bluetooth controller",
    ),
    Kind(
        41, "gpio", (), 1, 2, FIXED, (("ngpio", 2), ("padding", 2), ("gpio_names_size", 4)),
        title="GPIO controller", max_size=256,
    ),
    Kind(42, "rdma", (), title="RDMA"),
    Kind(43, "camera", (), title="camera"),
    Kind(44, "ism", (), title="internal shared memory"),
    Kind(45, "spi", (), 1, 1, FIXED, _SPI, pci_class=0x0C80, title="SPI controller", max_size=1024),
    Kind(46, "tee", (), title="trusted execution environment"),
    Kind(47, "cpu_balloon", ("cpu-balloon",), title="CPU balloon"),
    Kind(
        48, "media", (), 2, 2, FIXED, (("device_caps", 4), ("device_type", 4), ("card", 32)),
        pci_class=0x0480, title="V4L2 media device", max_size=1024,
    ),
    Kind(49, "usb", (), title="USB controller"),
)  # fmt: skip

_BY_ID = {kind.device_id: kind for kind in KINDS}


def by_id(device_id: int) -> Kind | None:
    """The row of a virtio id, None when nobody has described it."""
    return _BY_ID.get(device_id)


def of(device_id: int) -> Kind:
    """The row of a virtio id, or a plain one for an id that nobody has described.

    The plain one has room for as much configuration as QEMU's backends may have at most.
    """
    return _BY_ID.get(device_id) or Kind(device_id, f"virtio-{device_id}", config=(("config", 256),))


def by_name(name: str) -> Kind | None:
    """The row of a name or an alias."""
    for kind in KINDS:
        if name == kind.name or name in kind.aliases:
            return kind
    return None
