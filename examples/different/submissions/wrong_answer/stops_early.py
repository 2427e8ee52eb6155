# Says nothing after the first thousand lines.
import itertools
import sys

for line in itertools.islice(sys.stdin, 1000):
    a, b = map(int, line.split())
    print(abs(a - b))
