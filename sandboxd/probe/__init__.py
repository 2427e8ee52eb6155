"""What this machine can do, found out by doing it; and what to do where it cannot."""
