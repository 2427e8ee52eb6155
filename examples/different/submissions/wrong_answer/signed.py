# Forgets that a distance has no sign.
import sys

for line in sys.stdin:
    a, b = map(int, line.split())
    print(a - b)
