"""The control groups of sandboxes: where there are some to be had, and one for each."""
