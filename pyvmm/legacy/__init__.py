"""Devices without a virtio form: the serial port, power off, reset."""
