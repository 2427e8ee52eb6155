"""The floor: system calls and kernel files. Decides nothing; the only room with ctypes."""
