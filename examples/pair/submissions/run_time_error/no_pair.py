"""Fails where there is no pair."""

count, wanted = map(int, input().split())
weights = list(map(int, input().split()))
pairs = [
    (a + 1, b + 1)
    for a in range(count)
    for b in range(a + 1, count)
    if weights[a] + weights[b] == wanted
]
print(*pairs[0])
