"""Images: layers of strangers, unpacked once, checked before anything is visible, shared by all."""
