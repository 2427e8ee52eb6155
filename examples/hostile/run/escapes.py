import sys

sys.stdout.buffer.write(b"\x1b[2J\x1b]0;owned\x07\0\xff\xfe\xe2\x80\xae\r" * 100)
