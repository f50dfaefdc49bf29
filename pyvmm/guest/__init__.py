"""What runs inside the guest: its first process, its modules, and the channel to it."""
