# The answers are right, the exit code is not.
import sys

for line in sys.stdin:
    a, b = map(int, line.split())
    print(abs(a - b))
sys.exit(3)
