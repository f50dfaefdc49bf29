"""PCI: configuration space, host bridge, functions and MSI-X, for any kind of device."""
