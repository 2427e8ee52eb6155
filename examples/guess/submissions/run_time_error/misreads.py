"""Takes the answer for a number."""

input()
print(1, flush=True)
int(input())
