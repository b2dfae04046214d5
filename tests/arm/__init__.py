"""The C++ loops as compiled for aarch64, run on this machine by qemu, one call at a time."""
