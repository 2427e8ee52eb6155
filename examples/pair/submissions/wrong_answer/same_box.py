"""Takes one box for two."""

count, wanted = map(int, input().split())
weights = list(map(int, input().split()))
for a in range(count):
    for b in range(a, count):
        if weights[a] + weights[b] == wanted:
            print(a + 1, b + 1)
            raise SystemExit
print("none")
