"""What lasts longer than a run: what builds left, volumes, caches. Folders, locks, records."""
