"""What KVM's refusals mean and what helps: the words for errno values.

It makes the exceptions that the compiled modules raise, so that texts stay out of native
code.  It knows requests by name only.
"""

from __future__ import annotations

import errno
import os

from pyvmm.errors import ConfigError, KvmError

HINTS: dict[tuple[str, int], str] = {
    ("KVM_CREATE_VM", errno.EBUSY): "another hypervisor holds the processor's virtualisation; stop it",
    ("KVM_CREATE_VM", errno.ENOMEM): "the host is short of memory",
    ("KVM_CREATE_VCPU", errno.EINVAL): "the number is beyond what this host's KVM allows",
    ("KVM_CREATE_VCPU", errno.EEXIST): "there is a vCPU of this number",
    ("KVM_CREATE_IRQCHIP", errno.EINVAL): "it must come before the first vCPU",
    ("KVM_SET_USER_MEMORY_REGION", errno.EEXIST): "it overlaps another memory slot",
    ("KVM_SET_USER_MEMORY_REGION", errno.EINVAL): "slot number, alignment or size is out of bounds",
    ("KVM_IOEVENTFD", errno.EEXIST): "another eventfd is bound to this address",
    ("KVM_IOEVENTFD", errno.ENOSPC): "KVM has no room for more bus devices",
    ("KVM_IRQFD", errno.EBUSY): "this eventfd is bound to an interrupt",
    ("KVM_IRQFD", errno.EINVAL): "it needs an in-kernel irqchip, and an eventfd",
    ("KVM_SET_CPUID2", errno.E2BIG): "more leaves than KVM takes",
    ("KVM_RUN", errno.EFAULT): "the guest reached memory that has no host page behind it",
}

UNUSABLE: dict[int, str] = {
    0: "its API version is not 12; this is no KVM that pyvmm knows",
    errno.ENOENT: "there is no such device; load kvm_intel or kvm_amd, or enable virtualisation in the "
    "firmware (in a cloud machine: nested virtualisation)",
    errno.ENODEV: "no driver is behind it; load kvm_intel or kvm_amd",
    errno.ENXIO: "no driver is behind it; load kvm_intel or kvm_amd",
    errno.EACCES: "permission denied; add your user to the group kvm and log in again",
    errno.EPERM: "not permitted here; allow the device in this container or sandbox",
    errno.ENOTTY: "it is not KVM's device",
}


def refused(request: str, number: int, why: str = "") -> KvmError:
    """The KvmError for a request that ended with errno `number` (0: no errno says why)."""
    number = number or errno.EINVAL
    hint = why or HINTS.get((request, number), "")
    return KvmError(number, f"{request}: {os.strerror(number)}" + (f"; {hint}" if hint else ""))


def unusable(path: str, number: int) -> ConfigError:
    """The ConfigError for a KVM device that cannot be opened or is not one."""
    return ConfigError(f"{path}: {UNUSABLE.get(number) or os.strerror(number)}")
