"""Virtio devices as a guest sees them: kinds, status, queues, and the PCI transport."""
