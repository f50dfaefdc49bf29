"""Kernel images, boot protocols, and the state a virtual CPU starts with."""
