"""What runs outside the supervisor: standard library only, a single thread, no trio."""
