"""The daemon: HTTP, the journal, who is next, events; and its client."""
