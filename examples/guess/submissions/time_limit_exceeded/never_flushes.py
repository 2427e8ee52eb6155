"""The guess stays in a buffer: both wait for each other."""

import sys

most, _ = map(int, sys.stdin.readline().split())
print((1 + most) // 2)
sys.stdin.readline()
