"""Judging: a stranger's submission held against a problem package."""
