"""Ends by itself, in order, without having found anything."""

input()
print(1, flush=True)
