"""The tests: one folder a room of sandboxd, same file names. Folders below need no __init__.py."""
