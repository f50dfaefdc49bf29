"""This host: what it can do, the programs and kernels it has, and the emulated machine on it."""
